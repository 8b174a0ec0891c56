"""The data of one objective, and its examples in blocks or as a sample."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _checks
from jaxsoftmax.functional._stable import compute_dtype

_Sum = TypeVar("_Sum")


class Problem(NamedTuple):
    """The data of one objective, a pytree; made by `make_problem`.

    Arrays of examples and classes have the classes first: sums over a few classes are then sums of
    long rows. `l2` may have one entry per feature.
    """

    features: Float[Array, "examples features"]
    labels: Shaped[Array, "*classes examples"]
    share: Float[Array, " examples"]
    offset: Float[Array, "classes examples"] | None
    classes: Bool[Array, " classes"] | None
    l2: Float[Array, "*features"]


def make_problem(
    features: Array,
    labels: Array,
    *,
    l2: Array,
    sample_weight: Array | None = None,
    offset: Array | None = None,
    num_classes: int | None = None,
) -> Problem:
    """A problem from checked arrays. With `num_classes` the classes without weight are masked.

    Values that no one can check under jit make the objective NaN here: a negative `l2` or weight, a
    label that is no class of `num_classes`, or as probabilities negative or not of sum 1.
    """
    dtype = compute_dtype(features.dtype)
    if sample_weight is None:
        share = jnp.ones(features.shape[0], dtype)
    else:
        share = jnp.where(sample_weight < 0, jnp.nan, sample_weight)
        wider = max(share.dtype, dtype, key=lambda one: jnp.finfo(one).bits)
        share = share.astype(wider)
        share = (share / share.max()).astype(dtype)  # lest the sum overflow or underflow
    # A dropped example may have any label. What stands for it does not depend on the weights, so
    # that problems which differ in weights share their labels.
    if labels.ndim == 2:
        valid = _checks.are_probabilities(labels)
    elif num_classes is not None:
        most = min(num_classes - 1, jnp.iinfo(labels.dtype).max)  # which the dtype can hold
        valid = (labels >= 0) & (labels <= most)
    else:
        valid = share != 0
    share = jnp.where(valid | (share == 0), share, jnp.nan)
    share = share / share.sum()
    labels = jnp.where(valid.reshape(-1, *[1] * (labels.ndim - 1)), labels, 0)
    classes = None if num_classes is None else _present_classes(labels, share, num_classes)
    return Problem(
        features=features,
        labels=labels.astype(dtype).T if labels.ndim == 2 else labels,
        share=share,
        offset=None if offset is None else offset.astype(dtype).T,
        classes=classes,
        l2=jnp.where(l2 < 0, jnp.nan, l2).astype(dtype),
    )


def _present_classes(labels: Array, share: Array, num_classes: int) -> Bool[Array, " classes"]:
    """The classes that some example of positive share has."""
    if labels.ndim == 2:
        members = labels > 0
    else:
        members = labels.astype(jnp.int32)[:, None] == jnp.arange(num_classes, dtype=jnp.int32)
    return jnp.any(members & (share > 0)[:, None], 0)


def probabilities(problem: Problem, num_classes: int) -> Float[Array, "classes examples"]:
    """The labels as probabilities."""
    if problem.labels.ndim == 2:
        return problem.labels
    classes = jnp.arange(num_classes, dtype=jnp.int32)[:, None]
    return (problem.labels.astype(jnp.int32) == classes).astype(problem.share.dtype)


def sum_over_rows(f: Callable[[Problem], _Sum], problem: Problem, size: int) -> _Sum:
    """f(problem) for an f that is a sum over the examples, in blocks of `size` of them."""
    examples = problem.features.shape[0]
    if size >= examples:
        return f(problem)
    count = -(-examples // size)
    size = -(-examples // count)

    def add(i: Array, total: _Sum) -> _Sum:
        rows, start = _rows(problem, i * size, size)
        # The last block begins within the one before it, whose examples count no more.
        fresh = start + jnp.arange(size) >= i * size
        rows = rows._replace(share=jnp.where(fresh, rows.share, 0))
        added: _Sum = jax.tree.map(jnp.add, total, f(rows))
        return added

    shapes = jax.eval_shape(lambda: f(_rows(problem, 0, size)[0]))
    zero: _Sum = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
    total: _Sum = lax.fori_loop(0, count, add, zero)
    return total


def map_rows(f: Callable[[Problem], Array], problem: Problem, size: int) -> Array:
    """f(problem) for an f that gives each example one value, in blocks of `size` of them."""
    examples = problem.features.shape[0]

    def put(i: Array, values: Array) -> Array:
        rows, start = _rows(problem, i * size, size)
        return lax.dynamic_update_slice_in_dim(values, f(rows), start, 0)

    return lax.fori_loop(0, -(-examples // size), put, jnp.zeros_like(problem.share))


def thinned(problem: Problem, stride: int) -> Problem:
    """One example of each `stride` successive ones, which counts for all of them.

    It is another one each time, lest order in the data be met by order in the choice: the number of
    the group times the golden ratio of 2^32, whose upper bits look like chance.
    """
    group = jnp.arange(problem.features.shape[0] // stride, dtype=jnp.uint32)
    chosen = (group * jnp.uint32(2654435769)) >> jnp.uint32(16)
    index = group * jnp.uint32(stride) + chosen % jnp.uint32(stride)

    def take(value: Array, axis: int = -1) -> Array:
        return jnp.take(value, index, axis, mode="clip")

    return problem._replace(
        features=take(problem.features, 0),
        labels=take(problem.labels),
        share=take(problem.share) * stride,
        offset=None if problem.offset is None else take(problem.offset),
    )


def _rows(problem: Problem, start: Array | int, size: int) -> tuple[Problem, Array]:
    """`size` examples from `start` on, or the last ones; and the number of the first."""
    start = jnp.minimum(start, problem.features.shape[0] - size)

    def cut(value: Array, axis: int = -1) -> Array:
        return lax.dynamic_slice_in_dim(value, start, size, axis)

    rows = problem._replace(
        features=cut(problem.features, 0),
        labels=cut(problem.labels),
        share=cut(problem.share),
        offset=None if problem.offset is None else cut(problem.offset),
    )
    return rows, start
