"""How far a point is from the minimum of the objective: a bound that is proved, or an estimate."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float

from jaxsoftmax._conjugate_gradient import Progress, conjugate_gradient
from jaxsoftmax.objective import Params, Problem, curvature, value_and_gradient


class Certificate(NamedTuple):
    """A point, its objective and gradient, and a bound on objective - minimum there."""

    params: Params
    objective: Float[Array, ""]
    gradient: Params
    gap: Float[Array, ""]


def weights_gap(gradient: Float[Array, "classes features"], scale: Array) -> Float[Array, ""]:
    r"""The duality gap :math:`\sum_{kj} (\partial f / \partial W_{kj})^2 / (2 \lambda_j)`, with
    `scale` from `gap_scale`.

    It bounds f - min f at the optimal bias for the weights: there the residuals p - y, weighted by
    the shares, sum to 0 over the examples, and so are a feasible point of the dual problem. Where
    :math:`\lambda = 0` there is no such bound.

    Reference:
      Boyd, Vandenberghe (2004), Convex Optimization, section 5.1.6.
    """
    return jnp.sum((gradient * scale) ** 2)


def gap_scale(root: Array) -> Array:
    r""":math:`1 / \sqrt{2 \lambda_j}` from :math:`\sqrt{\lambda_j}`, 0 without a penalty."""
    penalised = root > 0
    return jnp.where(penalised, math.sqrt(0.5) / jnp.where(penalised, root, 1), 0)


def separates(value: Float[Array, ""], problem: Problem) -> Bool[Array, ""]:
    """Whether an unpenalised objective of this value proves that the classes are separable.

    Below log 2 times the least share every example has a probability above 1/2: a multiple of the
    parameters brings the objective as near to 0 as one likes, and no finite ones attain it.
    """
    least = jnp.min(jnp.where(problem.share > 0, problem.share, jnp.inf))
    # Of a single present class the probability is 1 whatever the parameters.
    several = True if problem.classes is None else jnp.sum(problem.classes) > 1
    return several & ~jnp.any(problem.l2 > 0) & (value < jnp.log(2) * least)


def certify(
    params: Params, problem: Problem, *, fit_bias: bool, tol: Float[Array, ""]
) -> Certificate:
    r"""Move the bias to its optimum for these weights, and bound f - min f there.

    What rounding leaves of the bias' own half squared Newton decrement is added.

    Where :math:`\lambda = 0` there is no such bound. Half the squared Newton decrement,
    :math:`\tfrac12 \nabla f^T H^+ \nabla f`, takes its place, which is f - min f of the quadratic
    model. It is estimated by conjugate gradients that stop once it exceeds `tol` times f.

    Reference:
      Boyd, Vandenberghe (2004), Convex Optimization, section 9.5.1, eq. 9.9.
    """
    if fit_bias:
        found = _with_optimal_bias(params, problem)
    else:
        value, slope = value_and_gradient(params, problem)
        slope = slope._replace(bias=jnp.zeros_like(slope.bias))
        found = Certificate(params, value, slope, jnp.zeros_like(value))
    penalised = jnp.any(problem.l2 > 0)
    # Without a penalty a column may have any scale: in these coordinates each has size 1.
    size = jnp.max(jnp.abs(problem.features), 0).astype(found.objective.dtype)
    size = jnp.broadcast_to(jnp.where(size > 0, size, 1), params.weights.shape)
    scale, unravel = ravel_pytree(Params(size, jnp.ones_like(params.bias)))
    gradient = ravel_pytree(found.gradient)[0] / scale
    at = curvature(found.params, problem)

    def product(v: Array) -> Array:
        change = unravel(v / scale)
        if not fit_bias:
            change = change._replace(bias=jnp.zeros_like(change.bias))
        image = at.product(change)
        if not fit_bias:
            image = image._replace(bias=jnp.zeros_like(image.bias))
        return ravel_pytree(image)[0] / scale

    largest = jnp.max(jnp.abs(gradient))
    largest = jnp.where(largest > 0, largest, 1)  # the square of the gradient must not underflow

    def proceed(at: Progress) -> Array:
        enough = at.decrement / 2 > tol * found.objective / largest / largest
        return ~penalised & ~enough & (at.squared > 1e-6 * at.first) & (at.steps < scale.size)

    end = conjugate_gradient(product, lambda residual: residual, gradient / largest, proceed)
    decrement = jnp.where(end.broken, jnp.inf, end.decrement / 2) * largest * largest
    # A loss of 0 is not attained by finite parameters: there is no optimum to be near to.
    decrement = jnp.where(found.objective == 0, jnp.inf, decrement)
    gap = found.gap + weights_gap(found.gradient.weights, gap_scale(jnp.sqrt(problem.l2)))
    return found._replace(gap=jnp.where(penalised, gap, decrement))


def bias_step(
    hessian: Float[Array, "classes classes"],
    gradient: Float[Array, " classes"],
    classes: Bool[Array, " classes"] | None,
) -> tuple[Float[Array, " classes"], Float[Array, ""]]:
    """Newton's step of the bias at fixed weights, and half its squared decrement."""
    if classes is None:
        classes = jnp.ones_like(gradient, bool)
    # The Hessian and the gradient are 0 along the constant vector and on absent classes.
    scale = jnp.maximum(jnp.trace(hessian), jnp.finfo(hessian.dtype).tiny)
    regular = hessian + scale + jnp.diag(jnp.where(classes, 0, scale))
    step = -jax.scipy.linalg.solve(regular, gradient.astype(hessian.dtype), assume_a="pos")
    step = step.astype(gradient.dtype)
    decrement = -jnp.sum(gradient * step) / 2
    # Where rounding left no positive definite matrix, nothing is known.
    known = jnp.isfinite(decrement)
    return jnp.where(known, step, 0), jnp.where(known, decrement, jnp.inf)


class _BiasSearch(NamedTuple):
    at: Certificate
    step: Array
    improved: Array
    steps: Array


def _with_optimal_bias(params: Params, problem: Problem) -> Certificate:
    """The bias by Newton's method at fixed weights; the gap is half the decrement that is left."""
    eps = jnp.finfo(params.bias.dtype).eps

    def evaluate(params: Params, steps: Array) -> _BiasSearch:
        value, gradient = value_and_gradient(params, problem)
        hessian = curvature(params, problem).bias()
        step, decrement = bias_step(hessian, gradient.bias, problem.classes)
        found = Certificate(params, value, gradient, decrement)
        return _BiasSearch(found, step, jnp.array(True), steps)

    def advance(old: _BiasSearch) -> _BiasSearch:
        bias = old.at.params.bias + old.step
        new = evaluate(old.at.params._replace(bias=bias), old.steps + 1)
        improved = (new.at.gap < old.at.gap) & (
            new.at.objective <= old.at.objective * (1 + 8 * eps)
        )
        first = old.steps == 0  # without a step yet
        kept = jax.tree.map(lambda new, old: jnp.where(improved | first, new, old), new, old)
        return kept._replace(improved=improved, steps=new.steps)

    # The decrement falls quadratically until rounding ends it; so does, far away, a failed step.
    # Separable data have no optimum: there the steps would go on until the loss underflows.
    infinite = jnp.full_like(params.bias, jnp.inf, shape=())
    start = _BiasSearch(
        Certificate(params, infinite, params, infinite),
        jnp.zeros_like(params.bias),
        jnp.array(True),
        jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(lambda s: s.improved & (s.steps < 20), advance, start).at
