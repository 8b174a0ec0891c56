r"""A preconditioner for the Hessian of the objective: its diagonal blocks, factorised.

The block of class k is :math:`\sum_i c_i p_{ik} (1 - p_{ik})\, x_i x_i^T + \lambda I`, with a 1
appended to x for the bias. It has the scale of every column in it, so what it preconditions does
not depend on the scales. Few examples carry most of its sum: those that the model is not sure of.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax.regression._data import Problem, sum_over_rows

_BYTES = 2**26  # the most that the factors may take, if it is more than an eighth of the features
_LARGE = 2**20  # entries of features
_ROWS = 512  # of features that are multiplied at a time
_PANEL = 256  # columns
_TINY = 1e-30  # of a diagonal that is 0 throughout
_JITTER = 1e-5  # relative to the diagonal; float32 products of columns are no better than that


class Plan(NamedTuple):
    """What suits the shapes.

    Attributes:
      groups: the number of classes if each has its own factor, 1 if they share one, 0 for none.
      rows: how many examples, those of largest weight, make a factor.
      price: what making the factors costs, in products with the Hessian.
      memory: how many directions of conjugate gradients correct it.
      large: whether the problem takes so long that it pays to compile more than one way to it.
      stride: a sample of one example in so many has the Hessian of the first steps.
    """

    groups: int
    rows: int
    price: int
    memory: int
    large: bool
    stride: int


def plan(examples: int, width: int, classes: int, *, kept: bool, sharing: int = 1) -> Plan:
    """Measured on two CPU cores; `kept` says that there is a weight for each example and class.

    One factor per class cuts the products of a fit to a half (digits, DNA) to a seventh
    (Fashion-MNIST, 10000 rows: 667 to 104) of those with a shared one. 2 N / K examples for each,
    which is twice what a class has, serve almost as well as all N: all of Fashion-MNIST takes 314
    products with a quarter of that, 167 with half of it, 116, and 103 with twice as much. Of two
    classes the blocks are equal, and one block is the whole Hessian.

    Making the factors took as long as 66 products on 10000 rows of Fashion-MNIST, 24 on all 60000,
    36 on DNA, 27 on the digits, 23 on letter, 14 on satellite.

    8 directions of conjugate gradients save as many products as 64: a sixth on Fashion-MNIST, half
    with standardised columns, none where a fit takes few.

    `sharing` problems side by side make them once, and take about half the time of as many single
    ones for a product.

    With 8 examples for each parameter, a sample's Hessian leaves a tenth of the decrement or less
    at every step: 100000 examples of 100 features in 20 classes take the time of 15 products
    instead of 26. Real data with fewer examples gained nothing by it.
    """
    budget = max(_BYTES, examples * width * 4 // 8)
    size = 4 * (width + 1) ** 2
    groups = classes if kept and classes > 2 else 1
    if groups * size > budget:
        groups = 1 if size <= budget else 0
    rows = min(examples, max(2 * examples // max(groups, 4), width, 1))
    side = max(sharing // 2, 1)
    price = 20 + groups * width * (rows + 8 * width) // (20 * classes * examples * side)
    memory = max(min(8, budget // (8 * classes * (width + 1))), 1)
    large = examples * width >= _LARGE
    stride = 4 if large and examples >= 32 * classes * width else 1
    return Plan(groups, rows, price, memory, large, stride)


def covariance(problem: Problem) -> Array:
    """The mean of [x, 1] [x, 1]^T over the examples."""
    return sum_over_rows(lambda rows: _product(rows.features, rows.share), problem, _ROWS)


def inverse(
    problem: Problem,
    spread: Array,
    mean: Array | None,
    ridge: Array,
    plan: Plan,
    *,
    alike: Array | bool = False,
    old: Array | None = None,
) -> Array:
    """What `plan` wants: of `factorise` with its arguments, or of `diagonal` without a `mean`."""
    if plan.groups != len(spread):
        spread = jnp.mean(spread, 0, keepdims=True)
    if mean is None:
        return diagonal(spread, ridge)
    return factorise(problem, spread, mean, ridge, plan.rows, alike=alike, old=old)


def factorise(
    problem: Problem,
    spread: Array,
    mean: Array,
    ridge: Array,
    rows: int,
    *,
    alike: Array | bool = False,
    old: Array | None = None,
) -> Array:
    """Inverses (groups, features + 1, features + 1) of the blocks, by Cholesky's factorisation.

    The examples that are left out count as if they were like the mean of all.

    Args:
      problem: with standard columns.
      spread: (groups, examples), the weights of x_i x_i^T.
      mean: what `covariance` gives.
      ridge: (features + 1,), what is added to the diagonals.
      rows: how many examples to use for each.
      alike: whether one is made for all groups, of the mean alone.
      old: inverses whose memory is reused.
    """
    groups = spread.shape[0]
    total = jnp.sum(spread, 1)

    def block(group: Array) -> Array:
        weight, index = lax.top_k(_at(spread, group), rows)
        left = jnp.where(alike, jnp.mean(total), _at(total, group) - jnp.sum(weight))
        chosen = _gathered(problem.features, index, weight, wanted=~jnp.asarray(alike))
        return chosen + jnp.maximum(left, 0) * mean

    def put(made: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
        return lambda group, blocks: lax.dynamic_update_index_in_dim(
            blocks, made(group, blocks), group, 0
        )

    blocks = jnp.zeros((groups, *mean.shape), mean.dtype) if old is None else old
    # One loop after the other: the threads of LAPACK and those of XLA:CPU wait busily and hinder
    # each other, so that in one loop they took half as long again.
    count = jnp.where(alike, 1, groups)
    blocks = lax.fori_loop(0, count, put(lambda group, _: block(group)), blocks)
    # What underflowed to 0 has little, but not nothing, lest conjugate gradients be blind there.
    size = total + jnp.min(ridge[:-1], initial=1)
    floor = jnp.finfo(size.dtype).eps * size + _TINY
    blocks = lax.fori_loop(
        0,
        count,
        put(lambda group, blocks: _inverse(_at(blocks, group), ridge + _at(floor, group))),
        blocks,
    )
    return lax.fori_loop(1, jnp.where(alike, groups, 1), put(lambda _, blocks: blocks[0]), blocks)


def diagonal(spread: Array, ridge: Array) -> Array:
    """Reciprocals (groups, features + 1) of the blocks' diagonals, if the columns' size is 1."""
    return 1 / (jnp.sum(spread, 1)[:, None] + ridge + _TINY)


def apply(inverse: Array, table: Array) -> Array:
    """The preconditioner times a table (classes, features + 1)."""
    if inverse.ndim == 2:
        return inverse * table
    if inverse.shape[0] == 1:
        return table @ inverse[0]
    return jnp.einsum("kij,kj->ki", inverse, table)


def _at(values: Array, index: Array) -> Array:
    return lax.dynamic_index_in_dim(values, index, keepdims=False)


def _gathered(features: Array, index: Array, weight: Array, wanted: Array) -> Array:
    """`_product` of some rows, a block of them at a time; 0 if it is not `wanted`."""
    count = -(-index.size // _ROWS)
    padding = (0, -index.size % count)
    indices, weights = (jnp.pad(v, padding).reshape(count, -1) for v in (index, weight))
    width = features.shape[1] + 1

    def add(i: Array, total: Array) -> Array:
        own = features.at[_at(indices, i)].get(mode="promise_in_bounds")
        return total + _product(own, _at(weights, i))

    zero = jnp.zeros((width, width), features.dtype)
    return lax.fori_loop(0, jnp.where(wanted, count, 0), add, zero)


def _product(features: Array, weight: Array) -> Array:
    """The sum of weight_i [x_i, 1] [x_i, 1]^T, of which only the lower triangle is right.

    Panels of columns end at the diagonal, which spares up to half of the products.
    """
    ones = jnp.ones_like(weight)
    x = jnp.concatenate([features, ones[:, None]], 1) * jnp.sqrt(weight)[:, None]
    width = x.shape[1]
    count = -(-width // _PANEL)
    ends = [width * i // count for i in range(count + 1)]
    return jnp.concatenate(
        [
            jnp.pad(x[:, start:end].T @ x[:, :end], ((0, 0), (0, width - end)))
            for start, end in pairwise(ends)
        ]
    )


def _inverse(block: Array, ridge: Array) -> Array:
    """The inverse of block + diag(ridge), whose lower triangle is used: multiplied with, not solved
    for, since a triangular solve of few columns is ten times slower."""
    size = jnp.ravel(block)[:: ridge.size + 1] + ridge  # the diagonal
    scale = lax.rsqrt(size)
    diagonal = jnp.eye(ridge.size, dtype=bool)
    scaled = jnp.where(diagonal, 1 + _JITTER, block * scale * scale[:, None])
    lower = lax.linalg.cholesky(scaled, symmetrize_input=False)
    identity = diagonal.astype(block.dtype)
    half = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    inverse = lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)
    # Where float32 can't factorise it, every entry is NaN, and the diagonal is left.
    known = jnp.isfinite(inverse[0, 0])
    return jnp.where(known, inverse, identity) * scale * scale[:, None]
