"""Solvers of softmax regression and the result that they share."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Float, Int

from jaxsoftmax.objective import Certificate, Params


class Status(enum.IntEnum):
    """How a fit ended: `Status(int(fit.status)).name`."""

    CONVERGED = 0  # the gap is at most tol
    STALLED = 1  # the precision of the dtype allows no more progress; the gap says how far it came
    MAX_ITER = 2  # max_iter iterations did not bring the gap to tol
    DIVERGED = 3  # the objective is not finite; the parameters are NaN


class Fit(NamedTuple):
    """Result of a fit, a pytree; under vmap every field has the leading axes of the problems.

    Attributes:
      params: weights (classes, features) and bias (classes,).
      objective: mean loss plus penalty, in nats per example.
      gap: bound on (objective - minimum) / objective: the duality gap where l2 > 0, half the
        squared Newton decrement where l2 = 0.
      gradient_norm: 2-norm of the objective's gradient.
      iterations: iterations of the solver.
      status: a `Status`.
    """

    params: Params
    objective: Float[Array, "*problems"]
    gap: Float[Array, "*problems"]
    gradient_norm: Float[Array, "*problems"]
    iterations: Int[Array, "*problems"]
    status: Int[Array, "*problems"]


# Iterations without a new least objective or gradient norm after which a solver has stalled.
_PATIENCE = 10
_RUNNING = -1


class _Progress(NamedTuple):
    params: Params
    opt_state: Any
    gradient_norm: Array
    least_objective: Array
    least_gradient_norm: Array
    finite: Array
    idle: Array
    iterations: Array


def lbfgs(
    value_fn: Callable[[Params], Array],
    certify: Callable[[Params], Certificate],
    init: Params,
    *,
    tol: Array,
    max_iter: Array,
) -> Fit:
    """L-BFGS with a zoom line search (`optax.lbfgs`) until the certified relative gap is at most
    `tol`.

    A certificate costs about two gradients, so one is asked for at `init` and then only when the
    gradient norm has fallen to where the last certificate suggests that the gap is small enough.
    """
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(value_fn)

    def step(at: _Progress) -> _Progress:
        value, grad = value_and_grad(at.params, state=at.opt_state)
        # optax mixes integer dtypes, which strict promotion, if a user has set it, refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                grad, at.opt_state, at.params, value=value, grad=grad, value_fn=value_fn
            )
        objective = optax.tree.get(opt_state, "value")
        gradient_norm = optax.tree.norm(optax.tree.get(opt_state, "grad"))
        progress = (objective < at.least_objective) | (gradient_norm < at.least_gradient_norm)
        return _Progress(
            params=optax.apply_updates(at.params, updates),
            opt_state=opt_state,
            gradient_norm=gradient_norm,
            least_objective=jnp.minimum(objective, at.least_objective),
            least_gradient_norm=jnp.minimum(gradient_norm, at.least_gradient_norm),
            finite=jnp.isfinite(objective) & jnp.isfinite(gradient_norm),
            idle=jnp.where(progress, 0, at.idle + 1),
            iterations=at.iterations + 1,
        )

    def may_step(at: _Progress) -> Array:
        return (at.iterations < max_iter) & (at.idle < _PATIENCE) & at.finite

    def advance(carry: tuple[_Progress, Array, Fit]) -> tuple[_Progress, Array, Fit]:
        at, threshold, _ = carry
        at = lax.while_loop(lambda at: (at.gradient_norm > threshold) & may_step(at), step, at)
        found = certify(at.params)
        allowed = tol * found.objective
        status = jnp.select(
            [
                ~(at.finite & jnp.isfinite(found.objective) & jnp.isfinite(found.gradient_norm)),
                found.gap <= allowed,
                at.idle >= _PATIENCE,
                at.iterations >= max_iter,
            ],
            [Status.DIVERGED, Status.CONVERGED, Status.STALLED, Status.MAX_ITER],
            _RUNNING,
        ).astype(jnp.int32)
        # Near the optimum the gap falls with the square of the gradient norm.
        factor = jnp.clip(jnp.sqrt(allowed / found.gap), 1e-3, 0.5)
        threshold = factor * jnp.minimum(found.gradient_norm, threshold)
        return at, threshold, _fit(found, at.iterations, status)

    infinite = jnp.full_like(init.bias, jnp.inf, shape=())
    start = _Progress(
        params=init,
        opt_state=optimizer.init(init),
        gradient_norm=infinite,
        least_objective=infinite,
        least_gradient_norm=infinite,
        finite=jnp.array(True),
        idle=jnp.zeros((), jnp.int32),
        iterations=jnp.zeros((), jnp.int32),
    )
    nothing = _fit(
        Certificate(init, infinite, infinite, infinite),
        start.iterations,
        jnp.full((), _RUNNING, jnp.int32),
    )
    return lax.while_loop(
        lambda carry: carry[2].status == _RUNNING, advance, (start, infinite, nothing)
    )[2]


def _fit(found: Certificate, iterations: Array, status: Array) -> Fit:
    relative = found.gap / jnp.where(found.objective == 0, 1, found.objective)
    return Fit(found.params, found.objective, relative, found.gradient_norm, iterations, status)
