"""Log-sum-exp and losses of a linear layer, block after block of classes, with a derivative rule.

All functions take checked arrays: features x (examples, features), weights w (classes, features),
bias b (classes,), class weights a (classes,) and labels y (examples,), each None if there is none.
Labels count the classes of this shard; -1 is none of them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax._checks import AxisName
from jaxsoftmax.functional._stable import compute_dtype, subtract_max
from jaxsoftmax.losses import _labels

_LOGITS = 2**19  # in a block


class Form(NamedTuple):
    """The static arguments.

    They are the classes of a block (None for a number that suits the shapes), the bound of the
    logits, the mesh axes of the classes, and which statistics are wanted beside the loss.
    """

    block_size: int | None
    softcap: float | None
    axis_name: AxisName
    log_z: bool = False
    smoothing: bool = False


class Statistics(NamedTuple):
    """One number per example, or None where it is not wanted."""

    log_z: Any  # the log-sum-exp L
    label_loss: Any  # L - z_y
    smoothing_loss: Any  # the sum of a_k (L - z_k)


def statistics(
    x: Array, w: Array, b: Array | None, y: Array | None, a: Array | None, form: Form
) -> Statistics:
    """Compute the statistics, of many examples with few classes in blocks of examples.

    A block is of about 2^19 logits: 2 MiB, a cache's size, and a product large enough for full
    speed. Blocks of classes have one size if a divisor allows it: a remainder costs a copy of the
    weights.
    """
    examples, classes = x.shape[0], w.shape[0]
    if form.block_size is not None:
        return _blockwise_statistics(
            x, w, b, y, a, form._replace(block_size=min(form.block_size, classes))
        )
    if not isinstance(examples, int):  # while a program for any number of them is exported
        examples = _LOGITS // max(classes, 1024)
    if classes > 1024 or examples * classes <= _LOGITS:
        largest = max(_LOGITS // max(examples, 1), 128)
        divisors = (size for size in range(largest, largest // 2, -1) if classes % size == 0)
        size = classes if classes <= largest else next(divisors, largest)
        return _blockwise_statistics(x, w, b, y, a, form._replace(block_size=size))
    count = examples // (_LOGITS // classes) + 1
    size = examples // count
    form = form._replace(block_size=classes)
    # Added up over the blocks, in the backward pass: not in a low precision.
    upcast_w = w.astype(logits_dtype(x, w, b))

    def block(xy: tuple[Array, Array | None]) -> Statistics:
        return _blockwise_statistics(xy[0], upcast_w.astype(w.dtype), b, xy[1], a, form)

    # A block takes every count-th example: a device's share of them stays its own.
    blocks = jax.tree.map(
        lambda v: v[: size * count].reshape(size, count, *v.shape[1:]).swapaxes(0, 1), (x, y)
    )
    first = jax.tree.map(lambda v: v.swapaxes(0, 1).reshape(-1), lax.map(block, blocks))
    rest = block(jax.tree.map(lambda v: v[size * count :], (x, y)))
    joined: Statistics = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, rest)
    return joined


class _Classes(NamedTuple):
    """A block of classes: weights, bias and class weights, or their tangents; and class numbers."""

    w: Array | None
    b: Array | None
    a: Array | None
    numbers: Array


class _Sums(NamedTuple):
    """Sums over a set of classes, one number per example, that give the statistics."""

    m: Array  # the largest logit
    others: Array  # the sum of exp(z_k - m) over all classes but the label
    label_logit: Array | None  # of a label in the set, else 0
    gaps: Array | None  # the sum of a_k (m - z_k)
    weight: Array | None  # the sum of a_k


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def _blockwise_statistics(
    x: Array, w: Array, b: Array | None, y: Array | None, a: Array | None, form: Form
) -> Statistics:
    """Compute the statistics of examples x with labels y, block after block of classes."""

    def sum_block(classes: _Classes) -> _Sums:
        return _sum_block(x, y, classes, form)

    def add(total: _Sums, classes: _Classes) -> _Sums:
        return _merge(total, sum_block(classes))

    classes = _Classes(w, b, a, jnp.arange(w.shape[0], dtype=jnp.int32))
    sums = _fold_blocks(sum_block, add, classes, form)
    m, others, label_logit, gaps, weight = sums if form.axis_name is None else _psum(sums, form)
    if label_logit is None:
        log_sum, label_loss = jnp.log(others), None
    else:
        # The label's term is not in the sum: so the tiny loss of a confident label keeps its
        # digits, and z_y - m is exact for large logits that are equal.
        d = subtract_max(label_logit, m)
        log_sum = _labels.log_total(others, d)
        label_loss = log_sum - d
    smoothing_loss = None if gaps is None or weight is None else gaps + weight * log_sum
    return Statistics(m + log_sum if form.log_z else None, label_loss, smoothing_loss)


@partial(_blockwise_statistics.defjvp, symbolic_zeros=True)
def _blockwise_statistics_jvp(form: Form, primals: Any, tangents: Any) -> Any:
    """d L = sum_k p_k dz_k, d (L - z_y) = sum_k (p - e_y)_k dz_k, and
    d sum_k a_k (L - z_k) = sum_k (A p - a)_k dz_k + (L - z_k) da_k with the sum A of a."""
    x, w, b, y, a = primals
    dx, dw, db, _, da = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    values = _blockwise_statistics(x, w, b, y, a, form._replace(log_z=True))
    log_z = jnp.where(values.log_z == -jnp.inf, 0, values.log_z)[:, None]
    if dx is not None:
        dx = dx.astype(log_z.dtype)  # its transpose is added up over the blocks
    numbers = jnp.arange(w.shape[0], dtype=jnp.int32)
    weight = _sum_weights(_Classes(w, b, a, numbers), log_z.dtype) if form.smoothing else None
    if weight is not None and form.axis_name is not None:
        weight = lax.psum(weight, form.axis_name)

    def change(block: tuple[_Classes, _Classes]) -> Statistics:
        classes, tangents = _hold_in_block(block[0]), block[1]
        z, dz = _logits_jvp(x, dx, classes, tangents, form)
        p = jnp.exp(z - log_z)
        d_log_z = jnp.sum(p * dz, -1) if form.log_z else None
        d_label = d_smoothing = None
        if y is not None:
            # p_y - 1 from the loss: as a difference it has no digits left where p_y is near 1.
            residual = jnp.where(_is_label(classes, y), jnp.expm1(-values.label_loss)[:, None], p)
            d_label = jnp.sum(residual * dz, -1)
        if weight is not None:
            a_k = 1 if classes.a is None else classes.a[None]
            d_smoothing = jnp.sum((weight * p - a_k) * dz, -1)
            if tangents.a is not None:
                gap = jnp.where(z == -jnp.inf, 0, log_z - z)
                d_smoothing += jnp.sum(gap * tangents.a.astype(gap.dtype)[None], -1)
        return Statistics(d_log_z, d_label, d_smoothing)

    # As a checkpoint a block keeps its inputs for the backward pass, not its logits.
    @partial(jax.checkpoint, prevent_cse=False)
    def add(total: Statistics, block: tuple[_Classes, _Classes]) -> Statistics:
        added: Statistics = jax.tree.map(jnp.add, total, change(block))
        return added

    blocks = _Classes(w, b, a, numbers), _Classes(dw, db, da, numbers)
    total = _fold_blocks(change, add, blocks, form)
    if form.axis_name is not None:
        total = lax.psum(total, form.axis_name)
    return (values if form.log_z else values._replace(log_z=None)), total


def _fold_blocks(first: Any, add: Any, arrays: Any, form: Form) -> Any:
    """Start with `first` of a block without classes and `add` one block after the other.

    The leaves of `arrays` have the classes on axis 0. The result of an empty block has the types of
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


def _sum_block(x: Array, y: Array | None, classes: _Classes, form: Form) -> _Sums:
    """Sum over one block of classes."""
    classes = _hold_in_block(classes)
    z = _logits(x, classes, form)
    m = jnp.max(z, -1, initial=jnp.finfo(z.dtype).min)
    e = jnp.exp(subtract_max(z, m[:, None]))
    label_logit = gaps = weight = None
    if y is not None:
        e = jnp.where(_is_label(classes, y), 0, e)
        label_logit = _label_logit(z, classes, y)
    if form.smoothing:
        gap = m[:, None] - z
        if classes.a is not None:
            a = classes.a.astype(z.dtype)[None]
            gap = jnp.where(a == 0, 0, a * gap)
        gaps, weight = jnp.sum(gap, -1), _sum_weights(classes, z.dtype)
    return _Sums(m, jnp.sum(e, -1), label_logit, gaps, weight)


def _merge(u: _Sums, v: _Sums) -> _Sums:
    """Sum over two sets of classes."""
    m = jnp.maximum(u.m, v.m)
    u, v = _raise_max(u, m), _raise_max(v, m)
    return jax.tree.map(jnp.add, u, v)._replace(m=m)


def _psum(sums: _Sums, form: Form) -> _Sums:
    """Sum over the classes of all shards: a few numbers per example travel."""
    m = lax.pmax(sums.m, form.axis_name)
    total: _Sums = lax.psum(_raise_max(sums, m), form.axis_name)
    return total._replace(m=m)


def _raise_max(sums: _Sums, m: Array) -> _Sums:
    """Refer the sums to a larger m."""
    gaps = sums.gaps
    if gaps is not None and sums.weight is not None:
        gaps = gaps + sums.weight * (m - sums.m)
    return sums._replace(others=sums.others * jnp.exp(sums.m - m), gaps=gaps)


def logits_dtype(x: Array, w: Array, b: Array | None) -> Any:
    """The dtype in which the logits are accumulated."""
    return compute_dtype(x.dtype, w.dtype, *([] if b is None else [b.dtype]))


def _product(x: Array, w: Array, dtype: Any) -> Array:
    """x w^T, accumulated in `dtype`."""
    common = x.dtype if x.dtype == w.dtype else dtype
    return lax.dot_general(
        x.astype(common), w.astype(common), (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )


def _cap(z: Array, softcap: float | None) -> Array:
    """Bound the logits by `softcap`."""
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def _logits(x: Array, classes: _Classes, form: Form) -> Array:
    """Logits of a block."""
    w, b = classes.w, classes.b
    assert w is not None
    z = _product(x, w, logits_dtype(x, w, b))
    return _cap(z if b is None else z + b.astype(z.dtype)[None], form.softcap)


def _logits_jvp(
    x: Array, dx: Array | None, classes: _Classes, tangents: _Classes, form: Form
) -> tuple[Array, Array]:
    """Logits of a block and their tangent.

    The factors of its products are upcast: in the transpose one of them is the residual p - e_y,
    whose small entries a low precision would lose.
    """
    z = _logits(x, classes, form._replace(softcap=None))
    dz = jnp.zeros_like(z)
    if dx is not None and classes.w is not None:
        dz += _product(dx, classes.w, z.dtype)
    if tangents.w is not None:
        dz += _product(x.astype(z.dtype), tangents.w, z.dtype)
    if tangents.b is not None:
        dz += tangents.b.astype(z.dtype)[None]
    capped: tuple[Array, Array] = jax.jvp(lambda z: _cap(z, form.softcap), (z,), (dz,))
    return capped


def _hold_in_block(classes: _Classes) -> _Classes:
    """Keep XLA from converting all the weights to a wider dtype before the loop."""
    return classes._replace(w=lax.optimization_barrier(classes.w))


def _is_label(classes: _Classes, y: Array) -> Array:
    return classes.numbers[None] == y[:, None]


def _label_logit(z: Array, classes: _Classes, y: Array) -> Array:
    """The logit of a label in the block, else 0."""
    if z.shape[1] == 0:
        return jnp.sum(z, -1)
    position = y[:, None] - classes.numbers[0]
    here = (position >= 0) & (position < z.shape[1])
    logit = jnp.take_along_axis(z, jnp.where(here, position, 0), -1)
    return jnp.where(here, logit, 0)[:, 0]


def _sum_weights(classes: _Classes, dtype: Any) -> Array:
    """Sum the class weights of a block."""
    weights = (classes.numbers >= 0) if classes.a is None else classes.a
    return jnp.sum(weights.astype(dtype))
