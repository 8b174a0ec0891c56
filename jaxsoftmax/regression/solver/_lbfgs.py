"""Solvers of softmax regression and the result that they share."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Float, Int

from jaxsoftmax.regression._objective import Params


class Status(enum.IntEnum):
    """How a fit ended: `Status(int(fit.status)).name`."""

    CONVERGED = 0  # the gap is at most tol
    STALLED = 1  # the precision of the dtype allows no more progress; the gap says how far it came
    MAX_ITER = 2  # max_iter iterations did not bring the gap to tol
    DIVERGED = 3  # the objective is not finite; the parameters are NaN
    SEPARABLE = 4  # l2 is 0 and the classes are separated: no finite parameters are optimal


class Fit(NamedTuple):
    """Result of a fit, a pytree; under vmap every field has the leading axes of the problems.

    Attributes:
      params: weights (classes, features) and bias (classes,).
      objective: mean loss plus penalty, in nats per example.
      gap: bound on (objective - minimum) / objective: the duality gap where l2 > 0, half the
        squared Newton decrement where l2 = 0; inf where neither is known, as far from any optimum.
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
RUNNING = -1  # what the status is before one of `Status`


class _Progress(NamedTuple):
    params: Params
    objective: Array
    gradient: Params
    opt_state: Any
    least_objective: Array
    least_gradient_norm: Array
    idle: Array
    iterations: Array


def lbfgs(
    value_fn: Callable[[Params], Array],
    certify: Callable[[Params], Fit],
    init: Params,
    *,
    tol: Array,
    max_iter: Array,
) -> Fit:
    """L-BFGS with a zoom line search (`optax.lbfgs`), until the relative gap is at most `tol`.

    `certify` gives a certificate near its argument, and MAX_ITER if that does not suffice. As it
    costs more than a gradient, one is asked for at `init` and then only when the gradient norm has
    fallen to where the last certificate suggests that the gap is small enough. The iteration goes
    on from the certified point, whose bias is better.
    """
    optimizer = optax.lbfgs()

    def step(at: _Progress) -> _Progress:
        # optax mixes integer dtypes, which strict promotion, if a user has set it, refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                at.gradient,
                at.opt_state,
                at.params,
                value=at.objective,
                grad=at.gradient,
                value_fn=value_fn,
            )
        objective, gradient = (optax.tree.get(opt_state, name) for name in ("value", "grad"))
        gradient_norm = optax.tree.norm(gradient)
        progress = (objective < at.least_objective) | (gradient_norm < at.least_gradient_norm)
        return _Progress(
            params=optax.apply_updates(at.params, updates),
            objective=objective,
            gradient=gradient,
            opt_state=opt_state,
            least_objective=jnp.minimum(objective, at.least_objective),
            least_gradient_norm=jnp.minimum(gradient_norm, at.least_gradient_norm),
            idle=jnp.where(progress, 0, at.idle + 1),
            iterations=at.iterations + 1,
        )

    def advance(carry: tuple[_Progress, Array, Fit]) -> tuple[_Progress, Array, Fit]:
        before, threshold, _ = carry

        def proceed(at: _Progress) -> Array:
            gradient_norm = optax.tree.norm(at.gradient)
            allowed = (at.iterations < max_iter) & (at.idle < _PATIENCE)
            return allowed & (gradient_norm > threshold) & jnp.isfinite(at.objective)

        at = lax.while_loop(proceed, step, before)
        # After the first round, one without a step can never be followed by one with a step.
        stuck = (at.iterations == before.iterations) & ~jnp.isposinf(threshold)
        found = certify(at.params)
        status = jnp.select(
            [
                found.status != Status.MAX_ITER,
                at.iterations >= max_iter,
                (at.idle >= _PATIENCE) | stuck,
            ],
            [found.status, Status.MAX_ITER, Status.STALLED],
            RUNNING,
        )
        at = at._replace(
            params=found.params,
            objective=found.objective,
            gradient=jax.grad(value_fn)(found.params),
        )
        # Near the optimum the gap falls with the square of the gradient norm.
        factor = jnp.clip(jnp.sqrt(tol / found.gap), 1e-3, 0.5)
        threshold = factor * jnp.minimum(found.gradient_norm, threshold)
        return at, threshold, found._replace(iterations=at.iterations, status=status)

    # The first round takes no step, for its threshold is infinite, and certifies `init`.
    infinite = jnp.full_like(init.bias, jnp.inf, shape=())
    zero = jnp.zeros((), jnp.int32)
    start = _Progress(
        params=init,
        objective=infinite,
        gradient=init,
        opt_state=optimizer.init(init),
        least_objective=infinite,
        least_gradient_norm=infinite,
        idle=zero,
        iterations=zero,
    )
    nothing = Fit(init, infinite, infinite, infinite, zero, zero + RUNNING)
    running = (start, infinite, nothing)
    return lax.while_loop(lambda carry: carry[2].status == RUNNING, advance, running)[2]
