r"""A bound on the distance from the minimum of the objective: a duality gap.

Any distributions q_i over the classes with residuals :math:`q_i - y_i` whose sums
:math:`G = \sum_i c_i (q_i - y_i) x_i^T` are 0 for every column without a penalty are feasible in
the dual problem. By Fenchel's and Young's inequality for loss and penalty

.. math:: f(T) - \min f \le \sum_i c_i\, \mathrm{KL}(q_i \,\|\, p_i)
          + \sum_{kj} \frac{(G + \lambda T)_{kj}^2}{2 \lambda_j}.

Reference:
  Boyd, Vandenberghe (2004), Convex Optimization, section 5.1.6.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._runtime import Array, namespace
from jaxsoftmax.regression._objective import (
    Point,
    losses_and_residuals,
    mean,
    point_at,
    sum_over_classes,
)
from jaxsoftmax.regression._penalty import Ridge
from jaxsoftmax.regression._rows import Examples, Rows

DISTANCE = 100.0  # to an optimum without a penalty, in standard coordinates; see `duality_gap`


def duality_gap(
    rows: Rows,
    penalty: Ridge,
    unpenalised: tuple[Array, Array, Array] | None,
    point: Point,
    value: Array,
    direction: Array,
    surplus: tuple[Array, Array],
) -> Array:
    r"""A bound (problems,) on f(T) - min f.

    q is p along a step of the table, in first order,
    :math:`q_i = p_i + (\mathrm{diag}(p_i) - p_i p_i^T) \, dz_i`, after which as much mass is moved
    between the classes as a surplus says.

    Where the weights are penalised, the step is one of the bias alone, and the surplus what it
    leaves: so the classes' shares are those of the data, which the bias demands.

    Where they are not, it is a Newton step. G is 0 except for what it left of the gradient, which
    counts times `DISTANCE`, the range of the offsets and twice the largest entry of the table: the
    bound holds if an optimum is no further off.

    Args:
      rows: the examples in the dtype of the problem.
      penalty: that of each problem.
      unpenalised: (problems,), whether the penalty is above 0, the largest difference between
        offsets of one example, and 1 for the entries of a table that can vary; None if every
        problem is penalised.
      point: where the objective was evaluated.
      value: (problems,), the objective there.
      direction: (classes, problems, columns), the step, to be subtracted from the table.
      surplus: what `surplus_of` gives.
    """
    divergence, slope = rows.total(_divergence_and_slope, point.table, direction, *surplus)
    gap = divergence + penalty.dual_gap(slope + penalty.gradient(point.table))
    if unpenalised is None:
        return gap
    penalised, offset_range, free = unpenalised
    rounding = 4 * jnp.finfo(slope.dtype).eps * value[None, :, None]
    left = jnp.sum(free * jnp.maximum(jnp.abs(slope) - rounding, 0), (0, 2))
    distance = DISTANCE + offset_range + 2 * jnp.max(jnp.abs(point.table), (0, 2))
    return gap + jnp.where(penalised, 0, distance * left)


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


def bias_step(products: Array, residual: Array, present: Array) -> tuple[Array, Array]:
    r"""A Newton step of the bias (classes, problems, 1), and what it leaves of the residual.

    There is no step where it would be so long that the first order of a probability is negative.

    The Hessian is :math:`\sum_i c_i\, (\mathrm{diag}(p_i) - p_i p_i^T)`, and every p_i has sum 1.
    """
    xp = namespace(products, residual)
    identity = xp.eye(len(residual), dtype=products.dtype)[None]
    hessian = identity * products.sum(2, keepdims=True) - products
    size = (hessian * identity).max((1, 2), keepdims=True)
    absent = xp.where(present[:, :, 0].T[:, None], 0, identity)
    # The sum over the classes, along which the Hessian is 0, is held at 0.
    regular = hessian + size * (1 / len(residual) + absent) + 1e-30 * identity
    right = xp.moveaxis(residual, 1, 0)
    step = np.linalg.solve(regular, right) if xp is np else _cholesky_solve(regular, right)
    short = xp.ptp(step, 1, keepdims=True) < 0.5
    step = xp.where(short & present.swapaxes(0, 1), step, 0).astype(residual.dtype)
    return xp.moveaxis(step, 0, 1), residual - xp.moveaxis(hessian @ step, 0, 1)


def _cholesky_solve(matrix: Array, right: Array) -> Array:
    lower = lax.linalg.cholesky(matrix)
    for transpose in (False, True):
        right = lax.linalg.triangular_solve(
            lower, right, left_side=True, lower=True, transpose_a=transpose
        )
    return right


def surplus_of(target: Array, residual: Array) -> tuple[Array, Array]:
    """The fraction of its mass that each class gives up, and its part of what all receive.

    They bring the classes' shares (classes, problems, 1) down by the residual, to the target.
    """
    xp = namespace(target, residual)
    given, taken = xp.maximum(residual, 0), xp.maximum(-residual, 0)
    total = taken.sum(0, keepdims=True)
    fraction = given / xp.where(given > 0, target + given, 1)
    return fraction, taken / xp.where(total > 0, total, 1)


def _divergence_and_slope(
    rows: Examples, table: Array, direction: Array, fraction: Array, receive: Array
) -> tuple[Array, Array]:
    """The sums of c_i KL(q_i || p_i) and of c_i (q_i - y_i) x_i^T."""
    z = rows.logits(table)
    _, residuals, p = losses_and_residuals(z, rows.labels)
    dz = -rows.design.logits(direction)
    along = jnp.maximum(dz - sum_over_classes(p, dz)[None], -1)
    excess = sum_over_classes(p, along)[None]  # what was cut off, else rounding
    change = p * (along - excess) / (1 + excess)
    q = p + change
    moved = sum_over_classes(jnp.broadcast_to(fraction, q.shape), q)[None]
    change = change - fraction * q + receive * moved
    divergence = mean(rows, jnp.sum(_divergence(p, change, z), 0, keepdims=True))
    return divergence, rows.transpose(rows.share * (residuals + change))


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
