"""Log-sum-exp and losses of the logits of a linear layer, block after block of classes, with their
derivative rules, on checked arrays.

Labels count the classes of this shard; -1 is none of them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax._checks import AxisName
from jaxsoftmax.functional._stable import compute_dtype
from jaxsoftmax.losses import _labels

_LOGITS = 2**19  # of a block


class Form(NamedTuple):
    """What is static: how many classes a block has (None for what suits the shapes), the bound of
    the logits, the mesh axes of the classes, and which statistics are wanted beside the loss."""

    block_size: int | None
    softcap: float | None
    axis_name: AxisName
    log_z: bool = False
    spread: bool = False


class Statistics(NamedTuple):
    """One number per example: the log-sum-exp L; if there are labels y, L - z_y; and for label
    smoothing the sum of a_k (L - z_k) with the class weights a. None for what is not wanted."""

    log_z: Any
    loss: Any
    spread: Any


def statistics(
    x: Array, w: Array, b: Array | None, y: Array | None, a: Array | None, form: Form
) -> Statistics:
    """The statistics; of many examples with few classes in blocks of examples.

    A block is of about 2^19 logits: 2 MiB, a cache's size, and a product large enough for full
    speed. Blocks of classes have one size if a divisor allows it: a rest costs a copy of the
    weights.
    """
    examples, classes = x.shape[0], w.shape[0]
    if form.block_size is not None:
        return _over_classes(x, w, b, y, a, form._replace(block_size=min(form.block_size, classes)))
    if classes > 1024 or examples * classes <= _LOGITS:
        most = max(_LOGITS // max(examples, 1), 128)
        divisors = (size for size in range(most, most // 2, -1) if classes % size == 0)
        size = classes if classes <= most else next(divisors, most)
        return _over_classes(x, w, b, y, a, form._replace(block_size=size))
    count = examples // (_LOGITS // classes) + 1
    size = examples // count
    form = form._replace(block_size=classes)
    # Added up over the blocks, in the backward pass: not in a low precision.
    wide_w = w.astype(_dtype(x, w, b))

    def block(xy: tuple[Array, Array | None]) -> Statistics:
        return _over_classes(xy[0], wide_w.astype(w.dtype), b, xy[1], a, form)

    # A block takes every count-th example: a device's share of them stays its own.
    blocks = jax.tree.map(
        lambda v: v[: size * count].reshape(size, count, *v.shape[1:]).swapaxes(0, 1), (x, y)
    )
    first = jax.tree.map(lambda v: v.swapaxes(0, 1).reshape(-1), lax.map(block, blocks))
    rest = block(jax.tree.map(lambda v: v[size * count :], (x, y)))
    joined: Statistics = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, rest)
    return joined


class _Classes(NamedTuple):
    """A block of classes: weights, bias, class weights, or the tangents of these, each if there is
    one; and their numbers, as the labels count them."""

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
def _over_classes(
    x: Array, w: Array, b: Array | None, y: Array | None, a: Array | None, form: Form
) -> Statistics:
    """The statistics of examples x with labels y, block after block of classes."""

    def sums(classes: _Classes) -> _Block:
        return _sums(x, y, classes, form)

    def add(total: _Block, classes: _Classes) -> _Block:
        return _union(total, sums(classes))

    block = _over_blocks(
        sums, add, _Classes(w, b, a, jnp.arange(w.shape[0], dtype=jnp.int32)), form
    )
    m, others, own, below, area = block if form.axis_name is None else _over_shards(block, form)
    if own is None:
        log_sum, loss = jnp.log(others), None
    else:
        # The label's own term is kept apart: so the tiny loss of a confident label keeps its
        # digits, and z_y - m is exact for large logits that are equal.
        d = jnp.minimum(own, m) - m
        log_sum = _labels.log_total(others, d)
        loss = log_sum - d
    spread = None if below is None or area is None else below + area * log_sum
    return Statistics(m + log_sum if form.log_z else None, loss, spread)


@partial(_over_classes.defjvp, symbolic_zeros=True)
def _over_classes_jvp(form: Form, primals: Any, tangents: Any) -> Any:
    """d L = sum_k p_k dz_k, d (L - z_y) = sum_k (p - e_y)_k dz_k, and
    d sum_k a_k (L - z_k) = sum_k (A p - a)_k dz_k + (L - z_k) da_k with the sum A of a."""
    x, w, b, y, a = primals
    dx, dw, db, _, da = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    values = _over_classes(x, w, b, y, a, form._replace(log_z=True))
    log_z = jnp.where(values.log_z == -jnp.inf, 0, values.log_z)[:, None]
    if dx is not None:
        dx = dx.astype(log_z.dtype)  # its transpose is added up over the blocks
    numbers = jnp.arange(w.shape[0], dtype=jnp.int32)
    area = _area(_Classes(w, b, a, numbers), log_z.dtype) if form.spread else None
    if area is not None and form.axis_name is not None:
        area = lax.psum(area, form.axis_name)

    def change(block: tuple[_Classes, _Classes]) -> Statistics:
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
        return Statistics(d_log_z, d_loss, d_spread)

    # As a checkpoint a block keeps what goes into it for the backward pass, not its logits.
    @partial(jax.checkpoint, prevent_cse=False)
    def add(total: Statistics, block: tuple[_Classes, _Classes]) -> Statistics:
        added: Statistics = jax.tree.map(jnp.add, total, change(block))
        return added

    blocks = _Classes(w, b, a, numbers), _Classes(dw, db, da, numbers)
    total = _over_blocks(change, add, blocks, form)
    if form.axis_name is not None:
        total = lax.psum(total, form.axis_name)
    return (values if form.log_z else values._replace(log_z=None)), total


def _over_blocks(first: Any, add: Any, arrays: Any, form: Form) -> Any:
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


def _sums(x: Array, y: Array | None, classes: _Classes, form: Form) -> _Block:
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


def _over_shards(block: _Block, form: Form) -> _Block:
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


def _logits(x: Array, classes: _Classes, form: Form) -> Array:
    w, b = classes.w, classes.b
    assert w is not None
    z = _product(x, w, _dtype(x, w, b))
    return _capped(z if b is None else z + b.astype(z.dtype), form.softcap)


def _logits_jvp(
    x: Array, dx: Array | None, classes: _Classes, tangents: _Classes, form: Form
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
