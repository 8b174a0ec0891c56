"""Fits of one problem along a path of penalties, and of several problems side by side."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._execution import ALONE, Lanes
from jaxsoftmax._newton import Frame, Newton, State
from jaxsoftmax._problem import Problem
from jaxsoftmax.objective import Params
from jaxsoftmax.solvers import Fit

_T = TypeVar("_T")


def path(
    problem: Problem,
    shared: Frame,
    init: Params,
    l2s: Array,
    *,
    fit_bias: bool,
    tol: Array,
    max_iter: Array,
    report: Callable[[Params], _T],
    lanes: Lanes = ALONE,
) -> tuple[Fit, _T, Array]:
    """Fits for each of the penalties, and what `report` says of their parameters.

    Each starts from the one before, or where the last two point to: parameters are nearly linear in
    log(l2).
    """

    def newton(l2: Array) -> Newton:
        of = problem._replace(l2=l2)
        return Newton.of(of, shared, init.bias.size, fit_bias=fit_bias, lanes=lanes)

    def step(
        carry: tuple[State, Array, Array, Array], l2: Array
    ) -> tuple[tuple[State, Array, Array, Array], tuple[Fit, _T]]:
        state, before, size, at = carry
        table, log = state.at.table, jnp.log(l2)
        ratio = (log - at) / size
        ratio = jnp.where((ratio > 0) & (ratio <= 2), ratio, 0)
        here = newton(l2)
        end = here.minimised(here.again(state, table + ratio * (table - before), max_iter), tol, max_iter)
        result = here.fit(end)
        return (end, table, log - at, log), (result, report(result.params))

    start = newton(l2s[0]).start(init, max_iter)
    unknown = jnp.full_like(l2s[0], jnp.nan)
    (end, *_), (fits, reports) = lax.scan(step, (start, start.at.table, unknown, unknown), l2s)
    return fits, reports, end.products
