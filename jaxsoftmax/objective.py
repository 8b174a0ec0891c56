"""The objective of softmax regression, and how far from its optimum a point can be.

.. math:: f(W, b) = \\sum_i c_i\\, \\ell(W x_i + b + o_i,\\, y_i) + \\tfrac{\\lambda}{2} \\|W\\|^2, \\qquad \\sum_i c_i = 1

with cross-entropy loss l, examples x_i (rows of `features`), labels y_i, shares c_i (normalised
`sample_weight`), offsets o_i and the penalty lambda (`l2`). The bias b is not penalised.

Shapes: `features` (examples, features), `weights` (classes, features), `bias` (classes,), `labels` (examples,)
integers or (examples, classes) probabilities, `sample_weight` (examples,), `offset` (examples, classes).

Solvers and trainers know a problem only through this module.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _checks
from jaxsoftmax.functional import compute_dtype, softmax
from jaxsoftmax.losses import cross_entropy


class Params(NamedTuple):
    """Parameters of a linear softmax model, a pytree."""

    weights: Float[Array, "*problems classes features"]
    bias: Float[Array, "*problems classes"]


class Problem(NamedTuple):
    """The data of one objective, a pytree; made by `make_problem`."""

    features: Float[Array, "examples features"]
    labels: Shaped[Array, "examples *classes"]
    share: Float[Array, " examples"]
    offset: Float[Array, "examples classes"] | None
    classes: Bool[Array, " classes"] | None
    l2: Float[Array, ""]


def linear_logits(
    params: Params, features: Shaped[Array, "*batch features"]
) -> Float[Array, "*batch classes"]:
    r"""Logits of a linear model, :math:`z = W x + b`.

    Args:
      params: weights (classes, features) and bias (classes,).
      features: (..., features), real; cast to the dtype of the weights.

    Returns:
      Logits (..., classes) in the dtype of the weights; `softmax` of them gives the class probabilities.

    Raises:
      TypeError: `features` is not real.
      ValueError: the last axis of `features` is not that of the weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import Params, linear_logits
      >>> params = Params(weights=jnp.array([[1.0, 0.0], [0.0, 2.0]]), bias=jnp.array([0.5, 0.0]))
      >>> linear_logits(params, jnp.array([[3.0, 1.0]]))
      Array([[3.5, 2. ]], dtype=float32)
    """
    features = _checks.real_array("features", features)
    width = params.weights.shape[-1]
    if features.ndim == 0 or features.shape[-1] != width:
        raise ValueError(
            f"features must have shape (..., {width}) to fit weights of shape {params.weights.shape}, "
            f"got shape {features.shape}"
        )
    return features.astype(params.weights.dtype) @ params.weights.T + params.bias


def make_problem(
    features: Array,
    labels: Array,
    *,
    l2: Array,
    sample_weight: Array | None = None,
    offset: Array | None = None,
    num_classes: int | None = None,
) -> Problem:
    """A problem from checked arrays.

    Values that no one can check under jit make the objective NaN here: a negative `l2` or weight, a probability
    label that is negative or does not sum to 1. With `num_classes`, classes that no example of positive weight
    has are marked absent, and the model gives them probability 0.
    """
    dtype = compute_dtype(features.dtype)
    share = (
        jnp.ones(features.shape[0], dtype) if sample_weight is None else sample_weight.astype(dtype)
    )
    share = jnp.where(share < 0, jnp.nan, share)
    if labels.ndim == 2:
        share = jnp.where(_checks.are_probabilities(labels), share, jnp.nan)
        labels = labels.astype(dtype)
    share = share / share.sum()
    classes = None
    if num_classes is not None:
        mass = (
            labels > 0
            if labels.ndim == 2
            else labels[:, None] == jnp.arange(num_classes, dtype=labels.dtype)
        )
        classes = jnp.any(mass & (share > 0)[:, None], 0)
    return Problem(
        features=features.astype(dtype),
        labels=labels,
        share=share,
        offset=None if offset is None else offset.astype(dtype),
        classes=classes,
        l2=jnp.where(l2 < 0, jnp.nan, l2).astype(dtype),
    )


def objective(params: Params, problem: Problem) -> Float[Array, ""]:
    """The objective f(W, b) of the module's formula, in nats per example."""
    return _mean_loss(_logits(params, problem), problem) + problem.l2 / 2 * jnp.sum(
        params.weights**2
    )


def _logits(params: Params, problem: Problem) -> Array:
    logits = linear_logits(params, problem.features)
    return logits if problem.offset is None else logits + problem.offset


def _mean_loss(logits: Array, problem: Problem) -> Array:
    losses = cross_entropy(logits, problem.labels, where=problem.classes)
    # An example of share 0 is dropped, be its loss finite or not.
    return jnp.sum(jnp.where(problem.share == 0, 0, problem.share * losses))


def centred(params: Params, classes: Bool[Array, " classes"]) -> Params:
    """The representative with sum 0 over the present classes, and 0 for the absent ones.

    It has the same probabilities, and of all such it has the least norm.
    """
    count = jnp.sum(classes).astype(params.bias.dtype)

    def centre(value: Array) -> Array:
        mask = classes.reshape(-1, *[1] * (value.ndim - 1))
        return jnp.where(mask, value - jnp.sum(jnp.where(mask, value, 0), 0) / count, 0)

    return Params(*map(centre, params))


class Certificate(NamedTuple):
    """A point, its objective, a bound on objective - minimum, and the norm of the gradient there."""

    params: Params
    objective: Float[Array, ""]
    gap: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def certify(
    params: Params, problem: Problem, *, fit_bias: bool, tol: Float[Array, ""]
) -> Certificate:
    r"""Move the bias to its optimum for these weights, and bound the distance from the minimum there.

    With that bias the residuals p_i - y_i, weighted by c_i, sum to 0, so they are a feasible point of the dual
    problem, and the duality gap is

    .. math:: f - f^* \le \frac{1}{2 \lambda} \|\nabla_W f\|^2.

    Where lambda is 0 there is no such bound. Half the squared Newton decrement,
    :math:`\tfrac12 \nabla f^T H^+ \nabla f`, takes its place: it is f - f* of the quadratic model, computed by
    conjugate gradients that stop early once it exceeds `tol` times the objective.

    Reference:
      Boyd, Vandenberghe (2004), Convex Optimization, eq. 9.9 and section 9.5.1.
    """
    bias_gap = jnp.zeros_like(problem.l2)
    if fit_bias:
        params, bias_gap = _with_optimal_bias(params, problem)
    flat, unravel = ravel_pytree(params)

    def value_fn(flat: Array) -> Array:
        weights, bias = unravel(flat)
        return objective(Params(weights, bias if fit_bias else lax.stop_gradient(bias)), problem)

    value, gradient = jax.value_and_grad(value_fn)(flat)
    penalised = problem.l2 != 0
    bound = (
        jnp.sum(unravel(gradient).weights ** 2) / (2 * jnp.where(penalised, problem.l2, 1))
        + bias_gap
    )
    decrement = _half_squared_decrement(
        lambda v: jax.jvp(jax.grad(value_fn), (flat,), (v,))[1],
        gradient,
        skip=penalised,
        enough=tol * value,
    )
    return Certificate(
        params, value, jnp.where(penalised, bound, decrement), jnp.linalg.norm(gradient)
    )


class _BiasStep(NamedTuple):
    shift: Array
    loss: Array
    step: Array
    decrement: Array
    improved: Array


def _with_optimal_bias(params: Params, problem: Problem) -> tuple[Params, Array]:
    """The bias by Newton's method at fixed weights, and half the squared decrement that is left."""
    logits = _logits(params, problem)
    classes = jnp.ones_like(params.bias, bool) if problem.classes is None else problem.classes
    tiny = jnp.finfo(params.bias.dtype).tiny

    def evaluate(shift: Array, improved: Array) -> _BiasStep:
        loss, gradient = jax.value_and_grad(lambda shift: _mean_loss(logits + shift, problem))(
            shift
        )
        p = softmax(logits + shift, where=classes)
        weighted = problem.share[:, None] * p
        hessian = jnp.diag(weighted.sum(0)) - weighted.T @ p
        # Along the constant vector and on absent classes the Hessian and the gradient are 0; make it regular.
        scale = jnp.maximum(jnp.trace(hessian), tiny)
        hessian = hessian + scale + jnp.diag(jnp.where(classes, 0, scale))
        step = -jax.scipy.linalg.solve(hessian, gradient, assume_a="pos")
        return _BiasStep(shift, loss, step, -jnp.sum(gradient * step) / 2, improved)

    def body(old: _BiasStep) -> _BiasStep:
        new = evaluate(old.shift + old.step, old.improved)
        rounding = 8 * jnp.finfo(old.loss.dtype).eps * old.loss
        improved = (new.decrement < old.decrement) & (new.loss <= old.loss + rounding)
        return jax.tree.map(lambda a, b: jnp.where(improved, a, b), new, old)._replace(
            improved=improved
        )

    # The decrement falls quadratically until rounding stops it; far from the optimum a step that fails ends it.
    last = lax.while_loop(
        lambda at: at.improved, body, evaluate(jnp.zeros_like(params.bias), jnp.array(True))
    )
    return params._replace(bias=params.bias + last.shift), last.decrement


def _half_squared_decrement(
    hvp: Callable[[Array], Array], gradient: Array, *, skip: Array, enough: Array
) -> Array:
    """g^T H^+ g / 2 to about 1% by conjugate gradients, or a lower bound of it that exceeds `enough`."""

    class Step(NamedTuple):
        residual: Array
        direction: Array
        squared: Array
        decrement: Array
        count: Array

    target = 1e-4 * jnp.sum(gradient**2)

    def proceed(at: Step) -> Array:
        return ~skip & (at.squared > target) & (at.decrement <= enough) & (at.count < gradient.size)

    def body(at: Step) -> Step:
        product = hvp(at.direction)
        alpha = at.squared / jnp.sum(at.direction * product)
        residual = at.residual - alpha * product
        squared = jnp.sum(residual**2)
        return Step(
            residual,
            residual + squared / at.squared * at.direction,
            squared,
            at.decrement + alpha * at.squared / 2,
            at.count + 1,
        )

    start = Step(gradient, gradient, jnp.sum(gradient**2), jnp.zeros_like(enough), jnp.array(0))
    return lax.while_loop(proceed, body, start).decrement
