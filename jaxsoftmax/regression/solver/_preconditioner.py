r"""A preconditioner for the Hessian of the objective: its diagonal blocks, inverted.

The block of class k is :math:`\sum_i c_i p_{ik} (1 - p_{ik})\, x_i x_i^T + \Lambda`. It has the
scale of every column in it, so what it preconditions does not depend on the scales. Few examples
carry most of its sum: those that the model is not sure of.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from jaxsoftmax._runtime import Array
from jaxsoftmax.regression._plan import Plan
from jaxsoftmax.regression._rows import Dense, Examples

_TINY = 1e-30  # of a diagonal that is 0 throughout
_JITTER = 1e-5  # relative to the diagonal; float32 products of columns are no better than that


def covariance(rows: Examples, share: Array, plan: Plan) -> Float[Array, "columns columns"]:
    """The mean of x x^T over the examples, of which the lower triangle is right."""
    assert isinstance(rows.design, Dense)
    return _sum_of_squares(rows.design.columns, None, share, plan)


def inverse_blocks(
    rows: Examples,
    weight: Float[Array, "groups problems examples"],
    mean: Array,
    ridge: Float[Array, "1 problems columns"],
    least: Float[Array, "1 problems"],
    first: Bool[Array, ""],
    count: int,
    plan: Plan,
) -> Float[Array, "groups problems columns columns"]:
    """Inverses of the blocks, by Cholesky's factorisation.

    The examples that are left out count as if they were like the mean of all.

    Args:
      rows: examples with standard columns.
      weight: the weights of x_i x_i^T.
      mean: what `covariance` gives.
      ridge: what is added to the diagonals.
      least: the smallest ridge of a feature.
      first: whether all probabilities are equal, so that the classes share a factor. Making one
        for each is what a fit of few steps spends most of its time on.
      count: how many examples, those of largest weight, are used for each block.
      plan: how many are multiplied at a time.
    """
    assert isinstance(rows.design, Dense)
    columns = rows.design.columns
    groups, problems, examples = weight.shape
    ridges = ridge + (jnp.finfo(ridge.dtype).eps * least + _TINY)[:, :, None]
    classes = len(rows.target)
    weights, uniform = weight.reshape(-1, examples), (1 - 1 / classes) / classes

    def of_examples(i: Array) -> Array:
        own = lax.dynamic_index_in_dim(weights, i, 0, keepdims=False)
        if count == examples:
            return _sum_of_squares(columns, None, own, plan)
        chosen, index = lax.top_k(own, count)
        ones = jnp.ones_like(own)
        left = jnp.maximum(own @ ones - chosen @ ones[:count], 0)
        return _sum_of_squares(columns, index, chosen, plan) + left * mean

    def block(i: Array, _: Array) -> Array:
        return lax.cond(first, lambda i: uniform * mean, of_examples, i)

    def inverse(i: Array, block: Array) -> Array:
        own = lax.dynamic_index_in_dim(ridges[0], i % problems, 0, keepdims=False)
        # What underflowed to 0 has little, but not nothing, or conjugate gradients are blind there.
        return _invert(block, own + jnp.finfo(block.dtype).eps * block[-1, -1])

    def replace(step: Callable[[Array, Array], Array], i: Array, blocks: Array) -> Array:
        one = lax.dynamic_index_in_dim(blocks, i, 0, keepdims=False)
        return lax.dynamic_update_index_in_dim(blocks, step(i, one), i, 0)

    # One loop after the other: the threads of LAPACK and those of XLA:CPU wait busily and hinder
    # each other, so that in one loop they took half as long again.
    number = jnp.where(first, problems, groups * problems)
    blocks = jnp.zeros((groups * problems, *mean.shape), mean.dtype)
    for step in (block, inverse):
        blocks = lax.fori_loop(0, number, partial(replace, step), blocks)
    inverses = blocks.reshape(groups, problems, *mean.shape)
    return jnp.where(first, inverses[:1], inverses)


def inverse_diagonals(
    curvature: Float[Array, "groups problems 1"], ridge: Float[Array, "1 problems columns"]
) -> Float[Array, "groups problems columns"]:
    """Reciprocals of the blocks' diagonals, if the columns' size is 1."""
    return 1 / (curvature + ridge + _TINY)


def apply(inverse: Array, table: Array) -> Array:
    """The preconditioner times a table (classes, problems, columns)."""
    if inverse.ndim == 3:
        return inverse * table
    if inverse.shape[:2] == (1, 1):
        return table @ inverse[0, 0]
    if inverse.shape[1] == 1:
        return jnp.einsum("kij,klj->kli", inverse[:, 0], table)
    return jnp.sum(inverse * table[:, :, None], 3)


def _sum_of_squares(columns: Array, index: Array | None, weight: Array, plan: Plan) -> Array:
    """The sum of weight_i x_i x_i^T over all examples or those of an index, a few at a time."""
    width = columns.shape[1]
    size = max(plan.factor_entries // width, 1)
    count = -(-len(weight) // size)
    if count == 1:
        chosen = columns if index is None else _take(columns, index)
        return _squares(chosen, weight, plan.factor_panel)
    padding = (0, count * size - len(weight))
    weights = jnp.pad(weight, padding).reshape(count, size)
    indices = jnp.arange(len(weight), dtype=jnp.int32) if index is None else index
    indices = jnp.pad(indices, padding).reshape(count, size)

    def add(i: Array, total: Array) -> Array:
        return total + _squares(_take(columns, indices[i]), weights[i], plan.factor_panel)

    return lax.fori_loop(0, count, add, jnp.zeros((width, width), columns.dtype))


def _take(columns: Array, index: Array) -> Array:
    return columns.at[index].get(mode="promise_in_bounds")


def _squares(x: Array, weight: Array, panel: int) -> Array:
    """The sum of weight_i x_i x_i^T, of which only the lower triangle is right.

    Panels of columns end at the diagonal, which spares up to half of the products.
    """
    width = x.shape[1]
    count = -(-width // panel)
    weighted = x * weight[:, None]
    if count == 1:
        return weighted.T @ x
    ends = [width * i // count for i in range(count + 1)]
    return jnp.concatenate(
        [
            jnp.pad(weighted[:, start:end].T @ x[:, :end], ((0, 0), (0, width - end)))
            for start, end in pairwise(ends)
        ]
    )


def _invert(block: Array, ridge: Array) -> Array:
    """The inverse of block + diag(ridge), whose lower triangle is used: multiplied with, not solved
    for, since a triangular solve of few columns is ten times slower."""
    size = block.reshape(-1)[:: ridge.size + 1] + ridge  # the diagonal
    scale = lax.rsqrt(size)
    diagonal = jnp.eye(ridge.size, dtype=bool)
    scaled = jnp.where(diagonal, 1 + _JITTER, block * scale[None] * scale[:, None])
    lower = lax.linalg.cholesky(scaled, symmetrize_input=False)
    identity = diagonal.astype(block.dtype)
    half = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    inverse = lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)
    # Where float32 can't factorise it, every entry is NaN, and the diagonal is left.
    known = jnp.isfinite(inverse[0, 0])
    return jnp.where(known, inverse, identity) * scale[None] * scale[:, None]
