r"""A bound on the distance from the minimum of the objective: a duality gap.

Any distributions q_i over the classes with residuals :math:`q_i - y_i` whose sums
:math:`G = \sum_i c_i (q_i - y_i) x_i^T` are 0 for every column without a penalty are feasible in
the dual problem. By Fenchel's and Young's inequality for loss and penalty

.. math:: f(T) - \min f \le \sum_i c_i\, \mathrm{KL}(q_i \,\|\, p_i)
          + \sum_{kj} \frac{(G + \lambda T)_{kj}^2}{2 \lambda_j}.

Reference:
  Boyd, Vandenberghe (2004), Convex Optimization, section 5.1.6.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._runtime import Array, namespace
from jaxsoftmax.regression._objective import (
    Point,
    mean,
    mean_loss_and_residuals,
    point_at,
    sum_over_classes,
)
from jaxsoftmax.regression._penalty import Ridge
from jaxsoftmax.regression._rows import Examples, Rows

DISTANCE = 100.0  # to an optimum without a penalty, in standard coordinates; see `distant`
_FAR = 1e4


def evaluate(
    rows: Rows,
    penalty: Ridge,
    table: Array,
    direction: Array,
    moves: Array,
    certifying: Array,
) -> tuple[Array, Point, Array]:
    r"""The objective at a table and its gradient, and for a certificate the mean divergence.

    For the problems that are certifying, :math:`G + \lambda T` is in the place of the gradient.

    q is p along a step of the table, in first order,
    :math:`q_i = p_i + (\mathrm{diag}(p_i) - p_i p_i^T) \, dz_i`, after which as much mass is moved
    between the classes as a surplus says.

    Where the weights are penalised, the step is one of the bias alone, and the surplus what it
    leaves: so the classes' shares are those of the data, which the bias demands. Where they are
    not, it is a Newton step; see `distant`.

    Args:
      rows: the examples in the dtype of the problem.
      penalty: that of each problem.
      table: where the objective is evaluated.
      direction: (classes, problems, columns), the step, to be subtracted from the table.
      moves: (classes, problems, 1), what `moves_of` gives.
      certifying: (problems,).
    """
    parts = rows.total(partial(_parts, kept=rows.kept), table, direction, moves, certifying)
    loss, slope, divergence, p = parts
    point = Point(table, slope + penalty.gradient(table), p)
    return loss + penalty.value(table), point, divergence


def distant(offset_range: Array, table: Array, gradient: Array, value: Array) -> Array:
    """The part of the gap that a problem without a penalty has, of which G = 0 is demanded.

    G is what a Newton step left of the gradient. It counts times `DISTANCE`, the range of the
    offsets and twice the largest entry of the table: the bound holds if an optimum is no further
    off.
    """
    size = offset_range + 2 * jnp.max(jnp.abs(table), (0, 2))
    rounding = 4 * jnp.finfo(gradient.dtype).eps * value
    # Far out the logits have lost their digits: what rounding hides of the gradient counts.
    hidden = jnp.where(size > _FAR, rounding, 0)
    left = jnp.maximum(jnp.abs(gradient) - rounding[None, :, None], hidden[None, :, None])
    return (DISTANCE + size) * jnp.sum(left, (0, 2))


def bias_products(rows: Rows, point: Point) -> Array:
    r""":math:`\sum_i c_i\, p_i p_i^T` of each problem."""
    if point.probabilities is None:
        return rows.total(_bias_products_anew, point.table)
    return rows.total(_bias_products, point.probabilities)


def _bias_products_anew(rows: Examples, table: Array) -> Array:
    p: Array = point_at(rows, table).probabilities
    return _bias_products(rows, p)


def _bias_products(rows: Examples, p: Array) -> Array:
    return jnp.einsum("kln,jln->lkj", rows.share * p, p)


def bias_step(products: Array, residual: Array, target: Array) -> tuple[Array, Array]:
    r"""A Newton step of the bias (classes, problems, 1), and what it leaves of the residual.

    There is no step where it would be so long that the first order of a probability is negative.

    The Hessian is :math:`\sum_i c_i\, (\mathrm{diag}(p_i) - p_i p_i^T)`, and every p_i has sum 1.
    """
    xp = namespace(products, residual)
    identity = xp.eye(len(residual), dtype=products.dtype)[None]
    hessian = identity * products.sum(2, keepdims=True) - products
    size = (hessian * identity).max((1, 2), keepdims=True)
    absent = xp.where(target[:, :, 0].T[:, None] > 0, 0, identity)
    # The sum over the classes, along which the Hessian is 0, is held at 0.
    regular = hessian + size * (1 / len(residual) + absent) + 1e-30 * identity
    right = xp.moveaxis(residual, 1, 0)
    step = np.linalg.solve(regular, right) if xp is np else _cholesky_solve(regular, right)
    short = xp.ptp(step, 1, keepdims=True) < 0.5
    step = xp.where(short & (target.swapaxes(0, 1) > 0), step, 0).astype(residual.dtype)
    return xp.moveaxis(step, 0, 1), residual - xp.moveaxis(hessian @ step, 0, 1)


def _cholesky_solve(matrix: Array, right: Array) -> Array:
    lower = lax.linalg.cholesky(matrix)
    for transpose in (False, True):
        right = lax.linalg.triangular_solve(
            lower, right, left_side=True, lower=True, transpose_a=transpose
        )
    return right


def moves_of(target: Array, residual: Array) -> Array:
    """The part of what all receive for each class, or below 0 the fraction of its mass that it
    gives up.

    They bring the classes' shares (classes, problems, 1) down by the residual, to the target.
    """
    xp = namespace(target, residual)
    total = xp.maximum(-residual, 0).sum(0, keepdims=True)
    over = xp.where(residual > 0, target + residual, xp.where(total > 0, total, 1))
    return -residual / over


def _parts(
    rows: Examples,
    table: Array,
    direction: Array,
    moves: Array,
    certifying: Array,
    *,
    kept: bool,
) -> tuple[Array, Array, Array, Array | None]:
    """The sums of losses, of c_i (q_i - y_i) x_i^T and of c_i KL(q_i || p_i), and probabilities."""
    z = rows.logits(table)
    loss, residuals, p = mean_loss_and_residuals(rows, z)

    def certificate() -> tuple[Array, Array]:
        dz = -rows.design.logits(direction)
        along = jnp.maximum(dz - sum_over_classes(p, dz)[None], -1)
        excess = sum_over_classes(p, along)[None]  # what was cut off, else rounding
        change = p * (along - excess) / (1 + excess)
        q = p + change
        fraction = jnp.broadcast_to(jnp.maximum(-moves, 0), q.shape)
        moved = sum_over_classes(fraction, q)[None]
        change = change - fraction * q + jnp.maximum(moves, 0) * moved
        change = jnp.where(certifying[None, :, None], change, 0)
        divergence = mean(rows, jnp.sum(_divergence(p, change, z), 0, keepdims=True))
        return residuals + change, divergence

    residuals, divergence = lax.cond(
        jnp.any(certifying), certificate, lambda: (residuals, jnp.zeros_like(loss))
    )
    return loss, rows.transpose(rows.share * residuals), divergence, p if kept else None


def _divergence(p: Array, change: Array, z: Array) -> Array:
    """q_k log(q_k / p_k) - (q_k - p_k) for q = p + change, from above and without cancellation.

    Near p it is t^2 / (2 + min(t, 0)) >= (1 + t) log(1 + t) - t, times p, for t = change / p.
    """
    ratio = change / jnp.where(p > 0, p, 1)
    near = change * ratio / (2 + jnp.minimum(ratio, 0))
    q = jnp.maximum(p + change, 0)
    most = jnp.max(z, 0, keepdims=True)
    log_p = jnp.where(jnp.isneginf(z), 0, z - most) + jnp.log(jnp.max(p, 0, keepdims=True))
    far = q * (jnp.log(jnp.where(q > 0, q, 1)) - log_p) - change
    return jnp.where((jnp.abs(ratio) < 0.1) & (p > 0), near, jnp.maximum(far, 0))
