"""L-BFGS, the plain reference."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxsoftmax._runtime import precise
from jaxsoftmax.functional._stable import compute_dtype
from jaxsoftmax.regression._data import Arguments, make_problem
from jaxsoftmax.regression._objective import objective
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._result import Fit, Status
from jaxsoftmax.regression.solver._vmapped import minimise

# Iterations without a new least objective or gradient norm after which a solver has stalled.
_PATIENCE = 10
RUNNING = -1  # the status before one of `Status`


class _Progress(NamedTuple):
    params: Params
    objective: Array
    gradient: Params
    opt_state: Any
    least_objective: Array
    least_gradient_norm: Array
    idle: Array
    iterations: Array

    def allowed(self, max_iter: Array) -> Array:
        """Whether a further step is."""
        return (self.iterations < max_iter) & (self.idle < _PATIENCE)


class _Round(NamedTuple):
    """Steps down to a gradient norm, with the certificate that followed them."""

    progress: _Progress
    threshold: Array
    fit: Fit


@partial(jax.jit, static_argnames=("num_classes", "fit_bias"))
@precise
def lbfgs(arguments: Arguments, *, num_classes: int, fit_bias: bool) -> Fit:
    """L-BFGS with a zoom line search (`optax.lbfgs`), until the relative gap is at most `tol`.

    Newton's method without a step certifies a point. As that costs more than a gradient, it is
    asked for at the start and then only when the gradient norm has fallen to where the last
    certificate suggests that the gap is small enough.
    """
    dtype = compute_dtype(arguments.features.dtype)
    tol, max_iter = arguments.tol.astype(dtype), arguments.max_iter
    l2 = arguments.l2.astype(dtype)
    problem = make_problem(
        arguments.features,
        arguments.labels,
        arguments.sample_weight,
        arguments.offset,
        num_classes=num_classes,
    )

    def value_fn(params: Params) -> Array:
        return objective(params, problem, l2, fit_bias=fit_bias)

    def certify(params: Params) -> Fit:
        at = arguments._replace(init=params, max_iter=jnp.zeros_like(max_iter))
        return minimise(at, num_classes=num_classes, fit_bias=fit_bias)

    optimizer = optax.lbfgs()

    def advance(before: _Round) -> _Round:
        def proceed(at: _Progress) -> Array:
            steep = optax.tree.norm(at.gradient) > before.threshold
            return at.allowed(max_iter) & steep & jnp.isfinite(at.objective)

        at = lax.while_loop(proceed, partial(_step, optimizer, value_fn), before.progress)
        found = certify(at.params)
        # After the first round, one without a step can never be followed by one with a step.
        stuck = (at.iterations == before.progress.iterations) & ~jnp.isposinf(before.threshold)
        status = jnp.select(
            [
                found.status != Status.MAX_ITER,
                at.iterations >= max_iter,
                (at.idle >= _PATIENCE) | stuck,
            ],
            [found.status, Status.MAX_ITER, Status.STALLED],
            RUNNING,
        )
        bias = jnp.where(jnp.isneginf(found.params.bias), 0, found.params.bias)
        params = found.params._replace(bias=bias)
        gradient = jax.grad(value_fn)(params)
        # Near the optimum the gap falls with the square of the gradient norm.
        factor = jnp.clip(jnp.sqrt(tol / found.gap), 1e-3, 0.5)
        return _Round(
            progress=at._replace(params=params, objective=found.objective, gradient=gradient),
            threshold=factor * jnp.minimum(found.gradient_norm, before.threshold),
            fit=found._replace(iterations=at.iterations, status=status),
        )

    # The first round takes no step, for its threshold is infinite, and certifies the start.
    start = _start(arguments, optimizer, dtype, num_classes=num_classes, fit_bias=fit_bias)
    return lax.while_loop(lambda at: at.fit.status == RUNNING, advance, start).fit


def _start(
    arguments: Arguments, optimizer: Any, dtype: Any, *, num_classes: int, fit_bias: bool
) -> _Round:
    """The round before the first."""
    init = arguments.init
    if init is None:
        zeros = jnp.zeros((num_classes, arguments.features.shape[1]), dtype)
        init = Params(zeros, jnp.zeros(num_classes, dtype))
    # A class without examples has no finite bias.
    finite = jnp.isfinite(init.bias) & fit_bias
    init = init._replace(bias=jnp.where(finite, init.bias, 0))
    infinite = jnp.full_like(init.bias, jnp.inf, shape=())
    zero = jnp.zeros((), jnp.int32)
    progress = _Progress(
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
    return _Round(progress, infinite, nothing)


def _step(optimizer: Any, value_fn: Callable[[Params], Array], at: _Progress) -> _Progress:
    """One step of the optimizer."""
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
