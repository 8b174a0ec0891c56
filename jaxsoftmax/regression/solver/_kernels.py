"""The passes over the examples in Newton's method, each a program of its own."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

from jaxsoftmax._runtime import Array, precise
from jaxsoftmax.regression import _objective
from jaxsoftmax.regression._objective import Point, hessian_product, hessian_weight
from jaxsoftmax.regression._plan import Plan, Preconditioning
from jaxsoftmax.regression.solver import _certificate, _preconditioner
from jaxsoftmax.regression.solver._cg import Stop, conjugate_gradient, informed

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(f: _Function) -> _Function:
    """f as one program, if its rows can be traced. Arguments by keyword are static."""
    static_names = [
        name for name, of in signature(f).parameters.items() if of.kind is of.KEYWORD_ONLY
    ]
    program = jax.jit(precise(f), static_argnames=static_names)

    def run(model: Any, *arguments: Any, **static: Any) -> Any:
        return (program if model.exact.traceable else f)(model, *arguments, **static)

    return cast(_Function, run)


@_compiled
def evaluate(
    model: Any,
    old: Point,
    direction: Array,
    moves: Array,
    length: Array,
    bound: Array,
    certifying: Array,
    *,
    precise: bool,
) -> tuple[Point, Array]:
    """The objective at the end of a step, in place of the old point where it is within the bound;
    for the problems that are `certifying`, a certificate where they are.

    Returns:
      The point; and (5, problems) the objective, the parts of the duality gap that the weights,
      the examples and, unless all problems are penalised, a `distant` optimum have, and whether
      the point was accepted.
    """
    table = old.table - _over(length) * direction
    value, new, divergence = _certificate.evaluate(
        model.exact, model.penalty, table, direction, moves, certifying
    )
    gradient = model.project(new.gradient)
    accepted = (value <= bound) | (bound == jnp.inf)
    taken = _over(accepted)
    p = old.probabilities
    if p is not None and new.probabilities is not None:
        p = jnp.where(taken, new.probabilities.astype(p.dtype), p)
    point = Point(
        table=jnp.where(taken, table, old.table),
        gradient=jnp.where(taken, gradient, old.gradient),
        probabilities=p,
    )
    measured = [value, model.penalty.dual_gap(gradient), divergence, 0 * value]
    if precise:
        measured[3] = _certificate.distant(model.offset_range, table, gradient, value)
    return point, jnp.stack([*measured, accepted.astype(table.dtype)])


@_compiled
def bias_products(model: Any, point: Point) -> Array:
    """The mean (problems, classes, classes) of p p^T."""
    return _certificate.bias_products(model.fast, point).astype(point.table.dtype)


@_compiled
def inverse(
    model: Any,
    point: Point,
    ridge: Array,
    least: Array,
    part: Array,
    first: Array,
    *,
    sizes: Preconditioning,
    plan: Plan,
) -> Array:
    """The preconditioner, with `ridge` on the diagonals, of which the features have at `least`;
    problems that share one make it of a mean in which each has its `part`. `first` as in
    `inverse_blocks`."""
    if model.covariance is None:
        weight = _objective.curvature(model.fast, point)
    else:
        weight = hessian_weight(model.fast, point)
    if max(sizes.groups, 1) != len(weight):
        weight = jnp.mean(weight, 0, keepdims=True)
    if weight.shape[1] > ridge.shape[1]:
        parts = _over(part)
        weight = jnp.sum(jnp.where(parts > 0, weight * parts, 0), 1, keepdims=True)
    if model.covariance is None:
        return _preconditioner.inverse_diagonals(weight, ridge)
    return _preconditioner.inverse_blocks(
        model.fast, weight, model.covariance, ridge, least, first, sizes.rows, plan
    )


@_compiled
def direction(
    model: Any, point: Point, inverse: Array, memory: Array, stop: Array, *, precise: bool
) -> tuple[Array, Array, Array]:
    """The direction of the next step, to be subtracted, by conjugate gradients.

    Args:
      model: the problems.
      point: where they are.
      inverse: the preconditioner.
      memory: the last directions of conjugate gradients.
      stop: when to stop, a `Stop` in one array.
      precise: whether some problem may be unpenalised.

    Returns:
      The direction, the new memory, and the `numbers` of `conjugate_gradient`.
    """
    dtype = model.fast.dtype
    penalty = model.penalty.astype(dtype)
    scale = penalty.gap_scale
    if precise:
        scale = jnp.where(_over(model.penalised), scale, 1)
    narrow = model._replace(free=model.free.astype(dtype), centre=model.centre.astype(dtype))
    apply: Callable[[Array], Array] = partial(_preconditioner.apply, inverse)
    if memory.shape[1]:
        apply = informed(apply, memory)
    end = conjugate_gradient(
        lambda v: hessian_product(model.fast, penalty, point, v),
        lambda residual: narrow.project(apply(residual)),
        point.gradient.astype(dtype),
        Stop(*stop),
        scale,
        jnp.zeros_like(memory),
        model.fast.while_loop,
    )
    if memory.shape[1]:
        memory = jnp.where(_over(end.numbers[3] > 0)[None, None], end.memory, memory)
    return end.x, memory, end.numbers


def _over(scalar: Array) -> Array:
    """A number of each problem, to be combined with tables."""
    return scalar[None, :, None]
