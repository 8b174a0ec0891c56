r"""Log-sum-exp and cross-entropy of a linear layer without its logits.

With N examples, D features and V classes the logits :math:`z = X W^T + b` are an N x V array, for a
large vocabulary by far the largest of a training step. Here they exist for one block of classes at
a time, forward and in every derivative, which computes them again. What is kept between the two is
one or two numbers per example.

Shapes: `features` (N, D), `weights` (V, D), `bias` (V,), `labels` (N,). Products are accumulated in
float32 or wider, and all that follows is computed there. Losses are in nats.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from jaxsoftmax import _checks, _rows
from jaxsoftmax._checks import AxisName
from jaxsoftmax._rows import compute_dtype


def linear_logsumexp(
    features: Shaped[ArrayLike, "examples features"],
    weights: Shaped[ArrayLike, "classes features"],
    bias: Shaped[ArrayLike, " classes"] | None = None,
    *,
    block_size: int | None = None,
    softcap: float | None = None,
    axis_name: AxisName = None,
) -> Float[Array, " examples"]:
    r"""Log-sum-exp over the classes of the logits of a linear layer.

    .. math:: L_i = \log\sum_k \exp(z_{ik}), \qquad z = X W^T + b, \qquad
              dL_i = \sum_k \sigma(z_i)_k \, dz_{ik}

    or of :math:`c \tanh(z / c)` with a `softcap` c.

    Args:
      features: X, (examples, features), real.
      weights: W, (classes, features), real.
      bias: b, (classes,), real; None for 0.
      block_size: the number of classes whose logits are formed at a time; None for one that suits
        the shapes.
      softcap: the bound c of the logits, a number above 0; None for none.
      axis_name: the mesh axis or axes over which the classes of `weights` and `bias` are sharded,
        inside `jax.shard_map`.

    Returns:
      Log-sum-exp per example, in float32, or in float64 if an input has it.

    Raises:
      TypeError: an array is not real, `block_size` is not an integer, or `axis_name` not a string.
      ValueError: the shapes do not fit, `block_size` is below 1, or `softcap` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import linear_logsumexp
      >>> print(f"{linear_logsumexp(jnp.ones((1, 3)), jnp.zeros((130, 3)), block_size=128)[0]:.4f}")
      4.8675
    """
    x, w, b = _layer(features, weights, bias)
    form = _form(block_size, softcap, axis_name)._replace(log_z=True)
    return _logsumexp(x, w, b, form)


def linear_cross_entropy(
    features: Shaped[ArrayLike, "examples features"],
    weights: Shaped[ArrayLike, "classes features"],
    labels: Shaped[ArrayLike, " examples"],
    bias: Shaped[ArrayLike, " classes"] | None = None,
    *,
    block_size: int | None = None,
    softcap: float | None = None,
    label_smoothing: Shaped[ArrayLike, ""] = 0.0,
    class_weight: Shaped[ArrayLike, " classes"] | None = None,
    z_loss: Shaped[ArrayLike, ""] = 0.0,
    ignore_label: int | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    axis_name: AxisName = None,
) -> Float[Array, "*examples"]:
    r"""Cross-entropy of integer labels under the softmax of a linear layer.

    .. math:: \ell_i = -\sum_k w_k y'_{ik} \log\sigma(z_i)_k
              + \zeta \Bigl(\log\sum_k \exp(z_{ik})\Bigr)^2, \qquad z = X W^T + b

    the same loss as `cross_entropy(features @ weights.T + bias, labels, ...)`, whose docstring
    explains `label_smoothing`, `class_weight`, `z_loss` and `ignore_label`, with the same
    derivatives of every order.

    Args:
      features: X, (examples, features), real.
      weights: W, (classes, features), real.
      labels: integer classes in [0, classes), (examples,).
      bias: b, (classes,), real; None for 0. At -inf it excludes a class.
      block_size: the number of classes whose logits are formed at a time; None for one that suits
        the shapes.
      softcap: the bound c of the logits, which become :math:`c \tanh(z / c)`, a number above 0;
        None for none.
      label_smoothing: the share of each label that is spread over the classes, in [0, 1].
      class_weight: w, (classes,), real; None for 1.
      z_loss: the factor :math:`\zeta` of the squared log-sum-exp, at least 0.
      ignore_label: the label of examples that do not count.
      reduction: "mean" over the examples that count, which is 0 over none of them; "sum"; or "none"
        for one loss per example. `class_weight` does not enter the divisor of the mean.
      axis_name: the mesh axis or axes over which the classes of `weights`, `bias` and
        `class_weight` are sharded inside `jax.shard_map`. Labels then count over all shards.

    Returns:
      The loss in nats, a scalar or (examples,), in float32, or in float64 if an input has it. An
      example whose label is out of range has loss NaN and NaN derivatives.

    Raises:
      TypeError: an array is not real, `labels` is not integer, `block_size` or `ignore_label` is
        not an integer, or `axis_name` not a string.
      ValueError: the shapes do not fit, `block_size` is below 1, `softcap` is not above 0,
        `label_smoothing` is not in [0, 1], `z_loss` is negative, or `reduction` is none of the
        three.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import linear_cross_entropy
      >>> features, weights = jnp.eye(2), jnp.array([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
      >>> losses = linear_cross_entropy(features, weights, jnp.array([0, 2]), reduction="none")
      >>> [f"{loss:.3f}" for loss in losses]
      ['0.240', '2.240']
      >>> jax.grad(linear_cross_entropy, 1)(features, weights, jnp.array([0, 2])).shape
      (3, 2)

    Reference:
      Wijmans et al. (2025), Cut your losses in large-vocabulary language models, section 4.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')
    x, w, b = _layer(features, weights, bias)
    if ignore_label is not None:
        ignore_label = _checks.integer("ignore_label", ignore_label)
    y = _checks.label_array(labels, ignore_label)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integer classes, got dtype {y.dtype}")
    _checks.has_shape("labels", y, x.shape[:1], "(examples,)")
    if class_weight is not None:
        class_weight = _checks.real_array("class_weight", class_weight)
        _checks.has_shape("class_weight", class_weight, w.shape[:1], "(classes,)")
    smoothing = _checks.scalar("label_smoothing", label_smoothing, most=1.0)
    factor = _checks.scalar("z_loss", z_loss)
    smooth, penalised = (not _rows.is_zero(value) for value in (label_smoothing, z_loss))
    form = _form(block_size, softcap, axis_name)._replace(log_z=penalised, spread=smooth)
    return _cross_entropy(
        x,
        w,
        y,
        b,
        class_weight,
        smoothing if smooth else None,
        factor if penalised else None,
        ignore_label,
        reduction,
        form,
    )


def _layer(
    features: ArrayLike, weights: ArrayLike, bias: ArrayLike | None
) -> tuple[Array, Array, Array | None]:
    x, w = _checks.real_array("features", features), _checks.real_array("weights", weights)
    if x.ndim != 2:
        raise ValueError(f"features must have shape (examples, features), got shape {x.shape}")
    if w.ndim != 2 or w.shape[0] == 0 or w.shape[1] != x.shape[1]:
        raise ValueError(
            f"weights must have shape (classes, {x.shape[1]}) for features of shape {x.shape}, "
            f"got shape {w.shape}"
        )
    if bias is None:
        return x, w, None
    b = _checks.real_array("bias", bias)
    return x, w, _checks.has_shape("bias", b, w.shape[:1], "(classes,)")


class _Form(NamedTuple):
    """What is static: how many classes a block has (None for what suits the shapes), the bound of
    the logits, the mesh axes of the classes, and which statistics are wanted beside the loss."""

    block_size: int | None
    softcap: float | None
    axis_name: AxisName
    log_z: bool = False
    spread: bool = False


def _form(block_size: int | None, softcap: float | None, axis_name: AxisName) -> _Form:
    if block_size is not None:
        block_size = _checks.integer("block_size", block_size, least=1)
    if softcap is not None:
        _checks.scalar("softcap", softcap, positive=True)
        if (known := _checks.known(softcap)) is None:
            raise TypeError("softcap must be a number known to the trace, got a tracer")
        softcap = float(known)
    return _Form(block_size, softcap, _checks.axis_names(axis_name))


class _Statistics(NamedTuple):
    """One number per example: the log-sum-exp L; if there are labels y, L - z_y; and for label
    smoothing the sum of a_k (L - z_k) with the class weights a. None for what is not wanted."""

    log_z: Any
    loss: Any
    spread: Any


@partial(jax.jit, static_argnums=(3,))
def _logsumexp(x: Array, w: Array, b: Array | None, form: _Form) -> Array:
    log_z: Array = _over_examples(x, w, b, None, None, form).log_z
    return log_z


@partial(jax.jit, static_argnums=(7, 8, 9))
def _cross_entropy(
    x: Array,
    w: Array,
    y: Array,
    b: Array | None,
    class_weight: Array | None,
    smoothing: Array | None,
    z_loss: Array | None,
    ignore_label: int | None,
    reduction: str,
    form: _Form,
) -> Array:
    """The loss of the formula above, on checked arrays."""
    dtype = _dtype(x, w, b)
    counted = jnp.ones(y.shape, bool)
    if ignore_label is not None and _rows.holds(y.dtype, ignore_label):
        counted = y != ignore_label
        x, y = jnp.where(counted[:, None], x, 0), jnp.where(counted, y, 0)
    shards = 1 if form.axis_name is None else lax.axis_size(form.axis_name)
    valid = (y >= 0) & (y < shards * w.shape[0])
    y = jnp.where(valid, y, -1).astype(jnp.int32)

    log_z, loss, spread = _over_examples(x, w, b, y, class_weight, form)
    share: Any = 1.0
    if smoothing is not None:
        smoothing = _rows.only_if((smoothing >= 0) & (smoothing <= 1), smoothing.astype(dtype))
        share = 1 - smoothing
    if class_weight is not None:
        share = share * _own_weight(class_weight.astype(dtype), y, form)
    loss = _rows.product(share, loss)
    if smoothing is not None:
        loss = loss + _rows.product(smoothing / (shards * w.shape[0]), spread)
    if z_loss is not None:
        log_z = jnp.where(log_z == -jnp.inf, 0, log_z)
        loss = loss + _rows.only_if(z_loss >= 0, z_loss.astype(dtype)) * log_z * log_z
    loss = jnp.where(counted, _rows.only_if(valid, loss), 0)
    if reduction == "none":
        return loss
    total = jnp.sum(loss)
    if reduction == "sum":
        return total
    return total / jnp.maximum(jnp.sum(counted.astype(dtype)), 1)


def _own_weight(class_weight: Array, y: Array, form: _Form) -> Array:
    """The weight of each example's class."""
    position = y - _first_class(class_weight, form)
    here = (position >= 0) & (position < class_weight.shape[0])
    weight = jnp.where(here, class_weight[jnp.where(here, position, 0)], 0)
    return weight if form.axis_name is None else lax.psum(weight, form.axis_name)


def _over_examples(
    x: Array, w: Array, b: Array | None, y: Array | None, a: Array | None, form: _Form
) -> _Statistics:
    """The statistics; of many examples with few classes in blocks of examples.

    A block is of about 2^19 logits: 2 MiB, a cache's size, and a product large enough for full
    speed. Blocks of classes have one size if a divisor allows it: a rest costs a copy of the
    weights.
    """
    examples, classes = x.shape[0], w.shape[0]
    if form.block_size is not None:
        return _statistics(x, w, b, y, a, form._replace(block_size=min(form.block_size, classes)))
    if classes > 1024 or examples * classes <= _LOGITS:
        most = max(_LOGITS // max(examples, 1), 128)
        divisors = (size for size in range(most, most // 2, -1) if classes % size == 0)
        size = classes if classes <= most else next(divisors, most)
        return _statistics(x, w, b, y, a, form._replace(block_size=size))
    count = examples // (_LOGITS // classes) + 1
    size = examples // count
    form = form._replace(block_size=classes)
    # Added up over the blocks, in the backward pass: not in a low precision.
    wide_w = w.astype(_dtype(x, w, b))

    def block(xy: tuple[Array, Array | None]) -> _Statistics:
        return _statistics(xy[0], wide_w.astype(w.dtype), b, xy[1], a, form)

    # A block takes every count-th example: a device's share of them stays its own.
    blocks = jax.tree.map(
        lambda v: v[: size * count].reshape(size, count, *v.shape[1:]).swapaxes(0, 1), (x, y)
    )
    first = jax.tree.map(lambda v: v.swapaxes(0, 1).reshape(-1), lax.map(block, blocks))
    rest = block(jax.tree.map(lambda v: v[size * count :], (x, y)))
    joined: _Statistics = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, rest)
    return joined


_LOGITS = 2**19


class _Classes(NamedTuple):
    """A block of classes: weights, bias, class weights, or the tangents of these, each if there is
    one; and their numbers among the classes of all shards."""

    w: Array | None
    b: Array | None
    a: Array | None
    numbers: Array


class _Block(NamedTuple):
    """Sums over a set of classes, one number per example, of which the statistics are made.

    m is the largest logit, `others` the sum of exp(z_k - m) over all but the label, `own` the
    label's logit if it is in the set, else 0, `below` the sum of a_k (m - z_k), `area` that of a_k.
    """

    m: Array
    others: Array
    own: Array | None
    below: Array | None
    area: Array | None


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def _statistics(
    x: Array, w: Array, b: Array | None, y: Array | None, a: Array | None, form: _Form
) -> _Statistics:
    """The statistics of examples x with labels y, block after block of classes."""

    def sums(classes: _Classes) -> _Block:
        return _sums(x, y, classes, form)

    def add(total: _Block, classes: _Classes) -> _Block:
        return _union(total, sums(classes))

    block = _over_blocks(sums, add, _Classes(w, b, a, _numbers(w, form)), form)
    m, others, own, below, area = block if form.axis_name is None else _over_shards(block, form)
    if own is None:
        log_sum, loss = jnp.log(others), None
    else:
        # The label's own term is kept apart: so the tiny loss of a confident label keeps its
        # digits, and z_y - m is exact for large logits that are equal.
        d = jnp.minimum(own, m) - m
        log_sum = jnp.where(d == 0, jnp.log1p(others), jnp.log(others + jnp.exp(d)))
        loss = log_sum - d
    spread = None if below is None or area is None else below + area * log_sum
    return _Statistics(m + log_sum if form.log_z else None, loss, spread)


@partial(_statistics.defjvp, symbolic_zeros=True)
def _statistics_jvp(form: _Form, primals: Any, tangents: Any) -> Any:
    """d L = sum_k p_k dz_k, d (L - z_y) = sum_k (p - e_y)_k dz_k, and
    d sum_k a_k (L - z_k) = sum_k (A p - a)_k dz_k + (L - z_k) da_k with the sum A of a."""
    x, w, b, y, a = primals
    dx, dw, db, _, da = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    values = _statistics(x, w, b, y, a, form._replace(log_z=True))
    log_z = jnp.where(values.log_z == -jnp.inf, 0, values.log_z)[:, None]
    if dx is not None:
        dx = dx.astype(log_z.dtype)  # its transpose is added up over the blocks
    numbers = _numbers(w, form)
    area = _area(_Classes(w, b, a, numbers), log_z.dtype) if form.spread else None
    if area is not None and form.axis_name is not None:
        area = lax.psum(area, form.axis_name)

    def change(block: tuple[_Classes, _Classes]) -> _Statistics:
        classes, tangents = _within_block(block[0]), block[1]
        z, dz = _logits_jvp(x, dx, classes, tangents, form)
        p = jnp.exp(z - log_z)
        d_log_z = jnp.sum(p * dz, -1) if form.log_z else None
        d_loss = d_spread = None
        if y is not None:
            # p_y - 1 from the loss: as a difference it has no digits left where p_y is near 1.
            residual = jnp.where(_is_label(classes, y), jnp.expm1(-values.loss)[:, None], p)
            d_loss = jnp.sum(residual * dz, -1)
        if area is not None:
            d_spread = jnp.sum((area * p - (1 if classes.a is None else classes.a)) * dz, -1)
            if tangents.a is not None:
                gap = jnp.where(z == -jnp.inf, 0, log_z - z)
                d_spread += jnp.sum(gap * tangents.a.astype(gap.dtype), -1)
        return _Statistics(d_log_z, d_loss, d_spread)

    # As a checkpoint a block keeps what goes into it for the backward pass, not its logits.
    @partial(jax.checkpoint, prevent_cse=False)
    def add(total: _Statistics, block: tuple[_Classes, _Classes]) -> _Statistics:
        added: _Statistics = jax.tree.map(jnp.add, total, change(block))
        return added

    blocks = _Classes(w, b, a, numbers), _Classes(dw, db, da, numbers)
    total = _over_blocks(change, add, blocks, form)
    if form.axis_name is not None:
        total = lax.psum(total, form.axis_name)
    return (values if form.log_z else values._replace(log_z=None)), total


def _over_blocks(first: Any, add: Any, arrays: Any, form: _Form) -> Any:
    """`first` of a block without classes, to which `add` adds one block after the other.

    The leaves of `arrays` have the classes on axis 0. What comes of an empty block has the types of
    the sum under every sharding.
    """
    count, size = jax.tree.leaves(arrays)[0].shape[0], form.block_size
    assert size is not None
    total = first(jax.tree.map(lambda v: v[:0], arrays))
    whole = count // size
    if whole == 1:
        total = add(total, jax.tree.map(lambda v: v[:size], arrays))
    elif whole:
        blocks = jax.tree.map(
            lambda v: v[: whole * size].reshape(whole, size, *v.shape[1:]), arrays
        )
        total, _ = lax.scan(lambda total, block: (add(total, block), None), total, blocks)
    if whole * size < count:
        total = add(total, jax.tree.map(lambda v: v[whole * size :], arrays))
    return total


def _sums(x: Array, y: Array | None, classes: _Classes, form: _Form) -> _Block:
    """The sums over one block of classes."""
    classes = _within_block(classes)
    z = _logits(x, classes, form)
    m = jnp.max(z, -1, initial=jnp.finfo(z.dtype).min)
    e = jnp.exp(jnp.minimum(z, m[:, None]) - m[:, None])
    own = below = area = None
    if y is not None:
        e = jnp.where(_is_label(classes, y), 0, e)
        own = _at_label(z, classes, y)
    if form.spread:
        gap = m[:, None] - z
        if classes.a is not None:
            gap = jnp.where(classes.a == 0, 0, classes.a.astype(z.dtype) * gap)
        below, area = jnp.sum(gap, -1), _area(classes, z.dtype)
    return _Block(m, jnp.sum(e, -1), own, below, area)


def _union(u: _Block, v: _Block) -> _Block:
    """The sums over two sets of classes."""
    m = jnp.maximum(u.m, v.m)
    u, v = _shifted(u, m), _shifted(v, m)
    return jax.tree.map(jnp.add, u, v)._replace(m=m)


def _over_shards(block: _Block, form: _Form) -> _Block:
    """The sums over the classes of all shards: some numbers per example travel."""
    m = lax.pmax(block.m, form.axis_name)
    total: _Block = lax.psum(_shifted(block, m), form.axis_name)
    return total._replace(m=m)


def _shifted(block: _Block, m: Array) -> _Block:
    """The same sums by another, larger m."""
    below = block.below
    if below is not None and block.area is not None:
        below = below + block.area * (m - block.m)
    return block._replace(others=block.others * jnp.exp(block.m - m), below=below)


def _dtype(x: Array, w: Array, b: Array | None) -> Any:
    return compute_dtype(x.dtype, w.dtype, *([] if b is None else [b.dtype]))


def _product(x: Array, w: Array, dtype: Any) -> Array:
    """x w^T, accumulated in `dtype`."""
    common = x.dtype if x.dtype == w.dtype else dtype
    return lax.dot_general(
        x.astype(common), w.astype(common), (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )


def _capped(z: Array, softcap: float | None) -> Array:
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def _logits(x: Array, classes: _Classes, form: _Form) -> Array:
    w, b = classes.w, classes.b
    assert w is not None
    z = _product(x, w, _dtype(x, w, b))
    return _capped(z if b is None else z + b.astype(z.dtype), form.softcap)


def _logits_jvp(
    x: Array, dx: Array | None, classes: _Classes, tangents: _Classes, form: _Form
) -> tuple[Array, Array]:
    """Logits of a block and their change.

    Its products are of wide factors: in the transpose one of them is the residual p - e_y, of which
    a low precision would lose what is small.
    """
    z = _logits(x, classes, form._replace(softcap=None))
    dz = jnp.zeros_like(z)
    if dx is not None and classes.w is not None:
        dz += _product(dx, classes.w, z.dtype)
    if tangents.w is not None:
        dz += _product(x.astype(z.dtype), tangents.w, z.dtype)
    if tangents.b is not None:
        dz += tangents.b.astype(z.dtype)
    capped: tuple[Array, Array] = jax.jvp(lambda z: _capped(z, form.softcap), (z,), (dz,))
    return capped


def _within_block(classes: _Classes) -> _Classes:
    """A barrier: without it XLA converts all the weights to a wider dtype before the loop."""
    return classes._replace(w=lax.optimization_barrier(classes.w))


def _first_class(w: Array, form: _Form) -> Any:
    return 0 if form.axis_name is None else w.shape[0] * lax.axis_index(form.axis_name)


def _numbers(w: Array, form: _Form) -> Array:
    """Numbers of the classes of this shard."""
    return jnp.arange(w.shape[0], dtype=jnp.int32) + _first_class(w, form)


def _is_label(classes: _Classes, y: Array) -> Array:
    return classes.numbers == y[:, None]


def _at_label(z: Array, classes: _Classes, y: Array) -> Array:
    """The logit of the label where it is in the block, else 0."""
    if z.shape[1] == 0:
        return jnp.sum(z, -1)
    position = y[:, None] - classes.numbers[0]
    here = (position >= 0) & (position < z.shape[1])
    own = jnp.take_along_axis(z, jnp.where(here, position, 0), -1)
    return jnp.where(here, own, 0)[:, 0]


def _area(classes: _Classes, dtype: Any) -> Array:
    """The sum of the class weights."""
    weights = (classes.numbers >= 0) if classes.a is None else classes.a
    return jnp.sum(weights.astype(dtype))
