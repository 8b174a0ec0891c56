r"""The objective of softmax regression, and a bound on how far a point is from its minimum.

.. math:: f(W, b) = \sum_i c_i\, \ell(W x_i + b + o_i,\; y_i) + \tfrac{\lambda}{2} \|W\|^2,
          \qquad \sum_i c_i = 1

with the cross-entropy :math:`\ell`, examples x (rows of `features`), labels y, shares c (normalised
`sample_weight`), offsets o and the penalty :math:`\lambda` (`l2`). The bias is not penalised.

Shapes: `features` (examples, features), `weights` (classes, features), `bias` (classes,), `labels`
(examples,) integers or (examples, classes) probabilities, `sample_weight` (examples,), `offset`
(examples, classes).

Solvers and trainers know a problem only through this module.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _checks
from jaxsoftmax._rows import compute_dtype
from jaxsoftmax.functional import softmax
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
    params: Params, features: Shaped[ArrayLike, "*batch features"]
) -> Float[Array, "*batch classes"]:
    r"""Logits of a linear model, :math:`z = W x + b`.

    Args:
      params: weights (classes, features) and bias (classes,), real.
      features: (..., features), real; cast to the dtype of the weights.

    Returns:
      Logits (..., classes) in the dtype of the weights; `softmax` of them gives the class
      probabilities.

    Raises:
      TypeError: `features`, the weights or the bias are not real.
      ValueError: the weights have not rank 2, or the bias or `features` do not fit them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import Params, linear_logits
      >>> params = Params(weights=jnp.array([[1.0, 0.0], [0.0, 2.0]]), bias=jnp.array([0.5, 0.0]))
      >>> linear_logits(params, jnp.array([[3.0, 1.0]]))
      Array([[3.5, 2. ]], dtype=float32)
    """
    weights, bias = (_checks.real_array(*part) for part in params._asdict().items())
    if weights.ndim != 2:
        raise ValueError(f"weights must have shape (classes, features), got shape {weights.shape}")
    classes, width = weights.shape
    _checks.has_shape("bias", bias, (classes,), "(classes,)")
    x = _checks.real_array("features", features)
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"features must have shape (..., {width}) to fit weights of shape {weights.shape}, "
            f"got shape {x.shape}"
        )
    return x.astype(weights.dtype) @ weights.T + bias


def make_problem(
    features: Array,
    labels: Array,
    *,
    l2: Array,
    sample_weight: Array | None = None,
    offset: Array | None = None,
    classes: Array | None = None,
) -> Problem:
    """A problem from checked arrays; `classes` masks those that take part, None is all.

    Values that no one can check under jit make the objective NaN here: a negative `l2` or weight, a
    probability label that is negative or does not sum to 1.
    """
    dtype = compute_dtype(features.dtype)
    if sample_weight is None:
        sample_weight = jnp.ones(features.shape[0])
    share = jnp.where(sample_weight < 0, jnp.nan, sample_weight).astype(dtype)
    share = share / share.max()  # so that the sum neither overflows nor underflows
    if labels.ndim == 2:
        share = jnp.where(_checks.are_probabilities(labels), share, jnp.nan)
        labels = labels.astype(dtype)
    return Problem(
        features=features.astype(dtype),
        labels=labels,
        share=share / share.sum(),
        offset=None if offset is None else offset.astype(dtype),
        classes=classes,
        l2=jnp.where(l2 < 0, jnp.nan, l2).astype(dtype),
    )


def present_classes(
    labels: Array, sample_weight: Array | None, num_classes: int
) -> Bool[Array, " classes"]:
    """The classes that some example of positive weight has."""
    if labels.ndim == 2:
        members = labels > 0
    else:
        members = labels.astype(jnp.int32)[:, None] == jnp.arange(num_classes, dtype=jnp.int32)
    if sample_weight is not None:
        members &= (sample_weight > 0)[:, None]
    return jnp.any(members, 0)


def objective(params: Params, problem: Problem, *, fit_bias: bool = True) -> Float[Array, ""]:
    """The objective f(W, b) of the module's formula, in nats; constant in b without `fit_bias`."""
    if not fit_bias:
        params = params._replace(bias=lax.stop_gradient(params.bias))
    penalty = problem.l2 / 2 * jnp.sum(params.weights**2)
    return _mean_loss(_logits(params, problem), problem) + penalty


def _logits(params: Params, problem: Problem) -> Array:
    logits = linear_logits(params, problem.features)
    return logits if problem.offset is None else logits + problem.offset


def _mean_loss(logits: Array, problem: Problem) -> Array:
    losses = cross_entropy(logits, problem.labels, where=problem.classes)
    # An example of share 0 is dropped, be its loss finite or not.
    return jnp.sum(problem.share * jnp.where(problem.share == 0, 0, losses))


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
    """A point, its objective and gradient, and a bound on objective - minimum there."""

    params: Params
    objective: Float[Array, ""]
    gradient: Params
    gap: Float[Array, ""]


def certify(
    params: Params, problem: Problem, *, fit_bias: bool, tol: Float[Array, ""]
) -> Certificate:
    r"""Move the bias to its optimum for these weights, and bound f - min f there.

    With that bias the residuals p - y, weighted by the shares, sum to 0 over the examples, so they
    are a feasible point of the dual problem, and the duality gap at it is

    .. math:: f - f^* \le \frac{1}{2 \lambda} \|\nabla_W f\|^2.

    What rounding leaves of the bias' own half squared Newton decrement is added.

    Where :math:`\lambda = 0` there is no such bound. Half the squared Newton decrement,
    :math:`\tfrac12 \nabla f^T H^+ \nabla f`, takes its place, which is f - min f of the quadratic
    model. It is estimated by conjugate gradients that stop once it exceeds `tol` times f.

    Reference:
      Boyd, Vandenberghe (2004), Convex Optimization, sections 5.1.6 and 9.5.1, eq. 9.9.
    """
    bias_gap = jnp.zeros_like(problem.l2)
    if fit_bias:
        params, bias_gap = _with_optimal_bias(params, problem)
    flat, unravel = ravel_pytree(params)

    def value_fn(flat: Array) -> Array:
        return objective(unravel(flat), problem, fit_bias=fit_bias)

    def hvp(v: Array) -> Array:
        return jax.jvp(jax.grad(value_fn), (flat,), (v,))[1]

    value, gradient = jax.value_and_grad(value_fn)(flat)
    penalised = problem.l2 != 0
    l2 = jnp.where(penalised, problem.l2, 1)
    bound = jnp.sum((unravel(gradient).weights / jnp.sqrt(2 * l2)) ** 2) + bias_gap
    # Without a penalty a column may have any scale: in these coordinates each has size 1.
    size = jnp.max(jnp.abs(problem.features), 0)
    size = jnp.broadcast_to(jnp.where(size > 0, size, 1), params.weights.shape)
    scale, _ = ravel_pytree(Params(size, jnp.ones_like(params.bias)))
    decrement = _half_squared_decrement(
        lambda v: hvp(v / scale) / scale, gradient / scale, skip=penalised, enough=tol * value
    )
    # A loss of 0 is not attained by finite parameters: there is no optimum to be near to.
    decrement = jnp.where(value == 0, jnp.inf, decrement)
    gap = jnp.where(penalised, bound, decrement)
    return Certificate(params, value, unravel(gradient), gap)


class _BiasStep(NamedTuple):
    shift: Array
    loss: Array
    step: Array
    decrement: Array
    improved: Array
    steps: Array


def _with_optimal_bias(params: Params, problem: Problem) -> tuple[Params, Array]:
    """The bias by Newton's method at fixed weights, and half the squared decrement that is left."""
    logits = _logits(params, problem)
    classes = jnp.ones_like(params.bias, bool) if problem.classes is None else problem.classes
    eps, tiny = jnp.finfo(logits.dtype).eps, jnp.finfo(logits.dtype).tiny

    zero_steps = jnp.zeros((), jnp.int32)

    def mean_loss(shift: Array) -> Array:
        return _mean_loss(logits + shift, problem)

    def evaluate(shift: Array) -> _BiasStep:
        loss, gradient = jax.value_and_grad(mean_loss)(shift)
        p = softmax(logits + shift, where=classes)
        weighted = problem.share[:, None] * p
        hessian = jnp.diag(weighted.sum(0)) - weighted.T @ p
        # The Hessian and the gradient are 0 along the constant vector and on absent classes.
        scale = jnp.maximum(jnp.trace(hessian), tiny)
        regular = hessian + scale + jnp.diag(jnp.where(classes, 0, scale))
        step = -jax.scipy.linalg.solve(regular, gradient, assume_a="pos")
        return _BiasStep(
            shift, loss, step, -jnp.sum(gradient * step) / 2, jnp.array(True), zero_steps
        )

    def advance(old: _BiasStep) -> _BiasStep:
        new = evaluate(old.shift + old.step)
        improved = (new.decrement < old.decrement) & (new.loss <= old.loss * (1 + 8 * eps))
        kept = jax.tree.map(lambda new, old: jnp.where(improved, new, old), new, old)
        return kept._replace(improved=improved, steps=old.steps + 1)

    # The decrement falls quadratically until rounding ends it; so does, far away, a failed step.
    # Separable data have no optimum: there the steps would go on until the loss underflows.
    zero, infinite = jnp.zeros_like(params.bias), jnp.full_like(params.bias, jnp.inf, shape=())
    start = _BiasStep(zero, infinite, zero, infinite, jnp.array(True), zero_steps)
    last = lax.while_loop(lambda at: at.improved & (at.steps < 20), advance, start)
    return params._replace(bias=params.bias + last.shift), last.decrement


class _ConjugateGradient(NamedTuple):
    residual: Array
    direction: Array
    squared: Array
    decrement: Array
    steps: Array


def _half_squared_decrement(
    hvp: Callable[[Array], Array], gradient: Array, *, skip: Array, enough: Array
) -> Array:
    """An estimate of g^T H^+ g / 2, which stops early once it exceeds `enough`; 0 if `skip`.

    It is inf, that is unknown, where rounding leaves no positive curvature along a direction.
    """
    largest = jnp.max(jnp.abs(gradient))
    largest = jnp.where(largest > 0, largest, 1)
    gradient = gradient / largest  # its square must not underflow
    enough = enough / largest / largest
    start = jnp.sum(gradient**2)

    def proceed(at: _ConjugateGradient) -> Array:
        return (
            ~skip
            & (at.squared > 1e-6 * start)
            & (at.decrement <= enough)
            & (at.steps < gradient.size)
        )

    def advance(at: _ConjugateGradient) -> _ConjugateGradient:
        product = hvp(at.direction)
        curvature = jnp.sum(at.direction * product)
        alpha = jnp.where(curvature > 0, at.squared / curvature, jnp.inf)
        residual = at.residual - alpha * product
        squared = jnp.sum(residual**2)
        return _ConjugateGradient(
            residual=residual,
            direction=residual + squared / at.squared * at.direction,
            squared=squared,
            decrement=at.decrement + alpha * at.squared / 2,
            steps=at.steps + 1,
        )

    init = _ConjugateGradient(
        gradient, gradient, start, jnp.zeros_like(start), jnp.zeros((), jnp.int32)
    )
    return lax.while_loop(proceed, advance, init).decrement * largest * largest
