"""L-BFGS, the plain reference.

A fit is rounds: steps down to a gradient norm, then a certificate of the point. As in Newton's
method, a Python loop drives where the arrays are concrete, else a compiled one.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxsoftmax._runtime import Array, namespace, precise, read
from jaxsoftmax.functional._stable import compute_dtype
from jaxsoftmax.regression._data import Arguments, problem_of
from jaxsoftmax.regression._objective import objective
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._result import Fit, Status
from jaxsoftmax.regression.solver._vmapped import minimise

# Iterations without a new least objective or gradient norm after which a solver has stalled.
_PATIENCE = 10
RUNNING = -1  # the status before one of `Status`


class _Progress(NamedTuple):
    params: Params
    opt_state: Any
    least_objective: Array
    least_gradient_norm: Array
    idle: Array
    iterations: Array


class _Round(NamedTuple):
    """Steps down to a gradient norm, with the certificate that followed them."""

    progress: _Progress
    threshold: Array
    fit: Fit


def lbfgs(arguments: Arguments, *, num_classes: int, fit_bias: bool) -> Fit:
    """L-BFGS with a zoom line search (`optax.lbfgs`), until the relative gap is at most `tol`.

    Newton's method without a step certifies a point. As that costs more than a gradient, it is
    asked for at the start and then only when the gradient norm has fallen to where the last
    certificate suggests that the gap is small enough.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
    solve = _solve_traced if traced else _solve_on_host
    return solve(arguments, num_classes=num_classes, fit_bias=fit_bias)


@np.errstate(all="ignore")  # as JAX
def _solve_on_host(arguments: Arguments, **static: Any) -> Fit:
    at = _start(arguments, **static)
    while _is_running(at):
        at = _advance(arguments, at, **static)
    return jax.device_put(at.fit)


@partial(jax.jit, static_argnames=("num_classes", "fit_bias"))
def _solve_traced(arguments: Arguments, **static: Any) -> Fit:
    advance = partial(_advance, arguments, **static)
    return lax.while_loop(_is_running, advance, _start(arguments, **static)).fit


def _is_running(at: _Round) -> Any:
    return read(at.fit.status) == RUNNING


@partial(jax.jit, static_argnames=("num_classes", "fit_bias"))
def _start(arguments: Arguments, *, num_classes: int, fit_bias: bool) -> _Round:
    """The round before the first. The first takes no step, for its threshold is infinite, and
    certifies the start."""
    dtype = compute_dtype(arguments.features.dtype)
    init = arguments.init
    if init is None:
        zeros = jnp.zeros((num_classes, arguments.features.shape[1]), dtype)
        init = Params(zeros, jnp.zeros(num_classes, dtype))
    # A class without examples has no finite bias.
    finite = jnp.isfinite(init.bias) & fit_bias
    bias = jnp.where(finite, init.bias, 0).astype(dtype)
    init = Params(init.weights.astype(dtype), bias)
    infinite = jnp.full((), jnp.inf, dtype)
    zero = jnp.zeros((), jnp.int32)
    # Strong types, as steps give them, or the steps would be compiled twice.
    opt_state = jax.tree.map(lambda v: v.astype(v.dtype), optax.lbfgs().init(init))
    progress = _Progress(init, opt_state, infinite, infinite, zero, zero)
    nothing = Fit(init, infinite, infinite, infinite, zero, zero + RUNNING)
    return _Round(progress, infinite, nothing)


def _advance(arguments: Arguments, before: _Round, **static: Any) -> _Round:
    """The next round."""
    at = _descend(arguments, before.progress, before.threshold, **static)
    point = arguments._replace(init=at.params, max_iter=np.int32(0))
    found = jax.tree.map(read, minimise(point, **static))
    iterations, idle, iterations_before, threshold = map(
        read, (at.iterations, at.idle, before.progress.iterations, before.threshold)
    )
    xp = namespace(iterations)
    # After the first round, one without a step can never be followed by one with a step.
    stuck = (iterations == iterations_before) & ~xp.isposinf(threshold)
    status = xp.select(
        [
            found.status != Status.MAX_ITER,
            iterations >= arguments.max_iter,
            (idle >= _PATIENCE) | stuck,
        ],
        [found.status, Status.MAX_ITER, Status.STALLED],
        RUNNING,
    )
    # Near the optimum the gap falls with the square of the gradient norm.
    tol = arguments.tol.astype(found.gap.dtype)
    factor = xp.clip(xp.sqrt(tol / found.gap), 1e-3, 0.5)
    return _Round(
        progress=at,
        threshold=factor * xp.minimum(found.gradient_norm, threshold),
        fit=found._replace(iterations=iterations, status=status.astype("int32")),
    )


@partial(jax.jit, static_argnames=("num_classes", "fit_bias"))
@precise
def _descend(
    arguments: Arguments, at: _Progress, threshold: Array, *, num_classes: int, fit_bias: bool
) -> _Progress:
    """Steps until the gradient norm is at most `threshold`, or no further step is allowed."""
    problem = problem_of(arguments, num_classes=num_classes)
    l2 = arguments.l2.astype(compute_dtype(arguments.features.dtype))
    optimizer = optax.lbfgs()

    def value_fn(params: Params) -> Array:
        return objective(params, problem, l2, fit_bias=fit_bias)

    def proceed(carry: tuple[_Progress, Array, Params]) -> Array:
        at, value, gradient = carry
        allowed = (at.iterations < arguments.max_iter) & (at.idle < _PATIENCE)
        return allowed & (optax.tree.norm(gradient) > threshold) & jnp.isfinite(value)

    def step(carry: tuple[_Progress, Array, Params]) -> tuple[_Progress, Array, Params]:
        at, value, gradient = carry
        # optax mixes integer dtypes, which strict promotion, if a user has set it, refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                gradient, at.opt_state, at.params, value=value, grad=gradient, value_fn=value_fn
            )
        value, gradient = (optax.tree.get(opt_state, name) for name in ("value", "grad"))
        norm = optax.tree.norm(gradient)
        progress = (value < at.least_objective) | (norm < at.least_gradient_norm)
        new = _Progress(
            params=optax.apply_updates(at.params, updates),
            opt_state=opt_state,
            least_objective=jnp.minimum(value, at.least_objective),
            least_gradient_norm=jnp.minimum(norm, at.least_gradient_norm),
            idle=jnp.where(progress, 0, at.idle + 1),
            iterations=at.iterations + 1,
        )
        return new, value, gradient

    value, gradient = jax.value_and_grad(value_fn)(at.params)
    return lax.while_loop(proceed, step, (at, value, gradient))[0]
