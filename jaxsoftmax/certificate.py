"""How far a point is from the minimum of the objective: a bound that is proved, or an estimate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from jaxsoftmax._conjugate_gradient import Progress, conjugate_gradient
from jaxsoftmax.objective import (
    Params,
    Problem,
    bias_curvature,
    curvature,
    objective,
    value_and_gradient,
)


class Certificate(NamedTuple):
    """A point, its objective and gradient, and a bound on objective - minimum there."""

    params: Params
    objective: Float[Array, ""]
    gradient: Params
    gap: Float[Array, ""]


def weights_gap(gradient: Params, problem: Problem) -> Float[Array, ""]:
    r"""The duality gap :math:`\sum_{kj} (\partial f / \partial W_{kj})^2 / (2 \lambda_j)`.

    It bounds f - min f at the optimal bias for the weights: there the residuals p - y, weighted by
    the shares, sum to 0 over the examples, and so are a feasible point of the dual problem. It is
    inf where :math:`\lambda = 0`.

    Reference:
      Boyd, Vandenberghe (2004), Convex Optimization, section 5.1.6.
    """
    penalised = problem.l2 > 0
    root = jnp.sqrt(2 * jnp.where(penalised, problem.l2, 1))
    gap = jnp.sum((gradient.weights / root) ** 2)
    return jnp.where(jnp.any(penalised), gap, jnp.inf)


def duality_gap(params: Params, problem: Problem, *, fit_bias: bool) -> Certificate:
    """Move the bias to its optimum for these weights, and bound f - min f there for l2 > 0.

    What rounding leaves of the bias' own half squared Newton decrement is added.
    """
    bias_gap = jnp.zeros_like(problem.share, shape=())
    if fit_bias:
        params, bias_gap = _with_optimal_bias(params, problem)
    value, gradient = value_and_gradient(params, problem)
    if not fit_bias:
        gradient = gradient._replace(bias=jnp.zeros_like(gradient.bias))
    return Certificate(params, value, gradient, weights_gap(gradient, problem) + bias_gap)


def certify(
    params: Params, problem: Problem, *, fit_bias: bool, tol: Float[Array, ""]
) -> Certificate:
    r"""Move the bias to its optimum for these weights, and bound f - min f there.

    Where :math:`\lambda = 0` there is no such bound. Half the squared Newton decrement,
    :math:`\tfrac12 \nabla f^T H^+ \nabla f`, takes its place, which is f - min f of the quadratic
    model. It is estimated by conjugate gradients that stop once it exceeds `tol` times f.

    Reference:
      Boyd, Vandenberghe (2004), Convex Optimization, section 9.5.1, eq. 9.9.
    """
    found = duality_gap(params, problem, fit_bias=fit_bias)
    penalised = jnp.any(problem.l2 > 0)
    # Without a penalty a column may have any scale: in these coordinates each has size 1.
    size = jnp.max(jnp.abs(problem.features), 0).astype(found.objective.dtype)
    size = jnp.broadcast_to(jnp.where(size > 0, size, 1), params.weights.shape)
    scale, unravel = ravel_pytree(Params(size, jnp.ones_like(params.bias)))
    at = curvature(found.params, problem)

    def product(v: Array) -> Array:
        change = unravel(v / scale)
        if not fit_bias:
            change = change._replace(bias=jnp.zeros_like(change.bias))
        image = at.product(change)
        if not fit_bias:
            image = image._replace(bias=jnp.zeros_like(image.bias))
        return ravel_pytree(image)[0] / scale

    def proceed(at: Progress, start: Array) -> Array:
        enough = at.decrement / 2 > tol * found.objective
        return ~penalised & ~enough & (at.squared > 1e-6 * start) & (at.steps < scale.size)

    gradient = ravel_pytree(found.gradient)[0] / scale
    end = conjugate_gradient(product, lambda residual: residual, gradient, proceed)
    decrement = jnp.where(end.broken, jnp.inf, end.decrement / 2)
    # A loss of 0 is not attained by finite parameters: there is no optimum to be near to.
    decrement = jnp.where(found.objective == 0, jnp.inf, decrement)
    return found._replace(gap=jnp.where(penalised, found.gap, decrement))


class _BiasStep(NamedTuple):
    bias: Array
    loss: Array
    step: Array
    decrement: Array
    improved: Array
    steps: Array


def _with_optimal_bias(params: Params, problem: Problem) -> tuple[Params, Array]:
    """The bias by Newton's method at fixed weights, and half the squared decrement that is left."""
    dtype = params.bias.dtype
    eps, tiny = jnp.finfo(dtype).eps, jnp.finfo(dtype).tiny
    classes = jnp.ones_like(params.bias, bool) if problem.classes is None else problem.classes
    zero_steps = jnp.zeros((), jnp.int32)

    def evaluate(bias: Array) -> _BiasStep:
        loss, gradient, hessian = bias_curvature(params._replace(bias=bias), problem)
        # The Hessian and the gradient are 0 along the constant vector and on absent classes.
        scale = jnp.maximum(jnp.trace(hessian), tiny)
        regular = hessian + scale + jnp.diag(jnp.where(classes, 0, scale))
        step = -jax.scipy.linalg.solve(regular, gradient, assume_a="pos")
        decrement = -jnp.sum(gradient * step) / 2
        return _BiasStep(bias, loss, step, decrement, decrement > eps * loss, zero_steps)

    def advance(old: _BiasStep) -> _BiasStep:
        new = evaluate(old.bias + old.step)
        improved = (new.decrement < old.decrement) & (new.loss <= old.loss * (1 + 8 * eps))
        kept = jax.tree.map(lambda new, old: jnp.where(improved, new, old), new, old)
        return kept._replace(improved=improved & new.improved, steps=old.steps + 1)

    # The decrement falls quadratically until rounding ends it; so does, far away, a failed step.
    # Separable data have no optimum: there the steps would go on until the loss underflows.
    zero, infinite = jnp.zeros_like(params.bias), jnp.full_like(params.bias, jnp.inf, shape=())
    start = _BiasStep(params.bias, infinite, zero, infinite, jnp.array(True), zero_steps)
    last = lax.while_loop(lambda at: at.improved & (at.steps < 20), advance, start)
    return params._replace(bias=last.bias), last.decrement
