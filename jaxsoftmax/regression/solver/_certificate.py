r"""How far a point is from the minimum of the objective: a duality gap.

Any distributions q_i over the classes with residuals :math:`q_i - y_i` whose sums
:math:`G = \sum_i c_i (q_i - y_i) x_i^T` are 0 for every column without a penalty are feasible in
the dual problem. By Fenchel's and Young's inequality for loss and penalty

.. math:: f(T) - \min f \le \sum_i c_i\, \mathrm{KL}(q_i \,\|\, p_i)
          + \sum_{kj} \frac{(G + \lambda T)_{kj}^2}{2 \lambda_j}.

Reference:
  Boyd, Vandenberghe (2004), Convex Optimization, section 5.1.6.
"""

import jax.numpy as jnp
from jax import Array

from jaxsoftmax._runtime import namespace
from jaxsoftmax.regression._objective import (
    Point,
    losses_and_residuals,
    mean,
    sum_over_classes,
)
from jaxsoftmax.regression._penalty import Ridge
from jaxsoftmax.regression._rows import Examples, Rows

DISTANCE = 100.0  # to an optimum without a penalty, in standard coordinates; see `duality_gap`


def duality_gap(
    rows: Rows,
    penalty: Ridge,
    penalised: Array,
    point: Point,
    value: Array,
    surplus: tuple[Array, Array] | None,
    direction: Array | None,
) -> Array:
    r"""A bound (problems,) on f(T) - min f.

    Where the weights are penalised, q is p with as much mass moved between the classes as makes
    their shares those of the data, which the bias demands; at the optimal bias nothing is moved.

    Where they are not, q is p along a Newton step `direction`, in first order:
    :math:`q_i = p_i + (\mathrm{diag}(p_i) - p_i p_i^T) \, dz_i`. G is 0 but for what the step left
    of the gradient, which counts times `DISTANCE` and twice the largest entry of the table: the bound holds if an
    optimum is no further off.

    Args:
      rows: the examples in the dtype of the problem.
      penalty: that of each problem.
      penalised: (problems,), whether it is above 0.
      point: where the objective was evaluated.
      value: (problems,), the objective there.
      surplus: what `surplus_of` gives; None if no problem is penalised.
      direction: (classes, problems, columns), to be subtracted from the table; None if all are.
    """
    of = penalised[None, :, None]
    step = None
    if direction is not None:
        step = jnp.where(of, 0, -direction)
        if surplus is not None:
            surplus = jnp.where(of, surplus[0], 0), jnp.where(of, surplus[1], 0)
    divergence, slope = rows.total(_divergence_and_slope, point.table, step, surplus)
    gap = divergence + penalty.dual_gap(slope + penalty.gradient(point.table))
    if direction is None:
        return gap
    rounding = 4 * jnp.finfo(slope.dtype).eps * value[None, :, None]
    left = jnp.where(of, 0, jnp.maximum(jnp.abs(slope) - rounding, 0))
    distance = DISTANCE + 2 * jnp.max(jnp.abs(point.table), (0, 2))
    return gap + distance * jnp.sum(left, (0, 2))


def surplus_of(target: Array, bias_gradient: Array) -> tuple[Array, Array]:
    """Which fraction of its mass each class gives up, and which part of all that each receives,
    that the classes' shares (classes, problems, 1) become those of the data."""
    xp = namespace(target, bias_gradient)
    given, taken = xp.maximum(bias_gradient, 0), xp.maximum(-bias_gradient, 0)
    total = taken.sum(0, keepdims=True)
    fraction = given / xp.where(given > 0, target + given, 1)
    return fraction, taken / xp.where(total > 0, total, 1)


def _divergence_and_slope(
    rows: Examples, table: Array, step: Array | None, surplus: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    """The sums of c_i KL(q_i || p_i) and of c_i (q_i - y_i) x_i^T, for logits that change by a step
    and mass that moves between the classes."""
    z = rows.logits(table)
    _, residuals, p = losses_and_residuals(z, rows.labels)
    change = jnp.zeros_like(p)
    if step is not None:
        dz = rows.design.logits(step)
        along = jnp.maximum(dz - sum_over_classes(p, dz)[None], -1)
        excess = sum_over_classes(p, along)[None]  # what was cut off, else rounding
        change = p * (along - excess) / (1 + excess)
    if surplus is not None:
        fraction, receive = surplus
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
