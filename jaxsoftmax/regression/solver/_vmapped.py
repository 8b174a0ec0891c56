"""Many fits in one program: what `jax.vmap` makes of a fit.

Problems that differ in l2 alone are a path: one after the other, from strong to weak penalties,
each started where the ones before point to. Problems of the same features that differ in weights,
labels, offsets or starts are solved side by side: their products with the features are one product,
and one preconditioner serves those with the same labels. Both together are paths side by side. All
others are solved one by one, so that none waits for the slowest.

The rules hold for what a `vmap` of a `vmap` gives, too: inside, the one over l2.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from jaxsoftmax._runtime import ALONE, Lanes
from jaxsoftmax.regression._data import Problem
from jaxsoftmax.regression._objective import Params
from jaxsoftmax.regression.solver._coordinates import varied
from jaxsoftmax.regression.solver._frame import Frame, frame
from jaxsoftmax.regression.solver._lbfgs import Fit, Status
from jaxsoftmax.regression.solver._newton import Newton, newton_cg
from jaxsoftmax.regression.solver._state import State

_AXIS = "jaxsoftmax.problems"
_MOST = 16  # problems side by side
_LOGITS = 2**23  # of all of them
_BYTES = 2**28  # of their preconditioners

_Flags = Any  # which arrays of the arguments have an axis of problems: their tree, of booleans


@cache
def solver(flags: _Flags | None = None, *, fit_bias: bool) -> Callable[..., Fit]:
    """Newton's method as a function of a problem, a start, a tolerance and an iteration limit.

    l2 may have an axis of penalties, and arguments with a flag have an axis of problems before all
    others; so has the result.
    """

    @custom_vmap
    def solve(problem: Problem, init: Params, tol: Array, max_iter: Array) -> Fit:
        if flags is not None:
            return _side_by_side(flags, problem, init, tol, max_iter, fit_bias=fit_bias)
        if problem.l2.ndim > 0:
            shared = frame(problem, init.bias.size, fit_bias=fit_bias)
            return _path(problem, shared, init, tol, max_iter, fit_bias=fit_bias)
        return newton_cg(problem, init, fit_bias=fit_bias, tol=tol, max_iter=max_iter)[0]

    @solve.def_vmap
    def batched(size: int, batched: _Flags, problem: Problem, *others: Any) -> tuple[Fit, Any]:
        of, *rest = batched
        alone = not any(jax.tree.leaves((of._replace(l2=False), rest)))
        if of.l2 and alone and not (flags is not None and flags[0].l2):
            fits = solve(problem._replace(l2=problem.l2.ravel()), *others)
            axis = 0 if flags is None else 1

            def unravel(values: Array) -> Array:
                shape = *values.shape[:axis], *problem.l2.shape, *values.shape[axis + 1 :]
                return jnp.moveaxis(values.reshape(shape), axis, 0)

            fits = jax.tree.map(unravel, fits)
        elif flags is None and not of.features and (problem.l2.ndim > 1 or not of.l2):
            fits = solver(tuple(batched), fit_bias=fit_bias)(problem, *others)
        else:
            fits = _one_by_one(solve, batched, (problem, *others))
        return fits, jax.tree.map(lambda _: True, fits)

    return solve


def _one_by_one(solve: Callable[..., Fit], flags: _Flags, arguments: Any) -> Fit:
    """`solve` for one problem after the other."""
    leaves, tree = jax.tree.flatten(arguments)
    own = jax.tree.leaves(flags)

    def one(values: list[Array]) -> Fit:
        rest = iter(values)
        pairs = zip(leaves, own, strict=True)
        return solve(
            *jax.tree.unflatten(tree, [next(rest) if is_own else v for v, is_own in pairs])
        )

    fits: Fit = lax.map(one, [v for v, is_own in zip(leaves, own, strict=True) if is_own])
    return fits


def _path(
    problem: Problem,
    shared: Frame,
    init: Params,
    tol: Array,
    max_iter: Array,
    *,
    fit_bias: bool,
    lanes: Lanes = ALONE,
    columns: Array | None = None,
) -> Fit:
    """Fits for each of the penalties. Parameters are nearly linear in log(l2)."""
    shape, l2s = problem.l2.shape, problem.l2.ravel()

    def newton(l2: Array) -> Newton:
        of = problem._replace(l2=l2)
        return Newton.of(
            of, shared, init.bias.size, fit_bias=fit_bias, lanes=lanes, columns=columns
        )

    def step(
        carry: tuple[State, Array, Array, Array], l2: Array
    ) -> tuple[tuple[State, Array, Array, Array], Fit]:
        last, before, change, log_before = carry
        table, log = last.at.table, jnp.log(l2)
        ratio = (log - log_before) / change
        ratio = jnp.where((ratio > 0) & (ratio < 2), ratio, 0)
        guess = table + ratio * (table - before)
        guess = jnp.where(last.status == Status.DIVERGED, start.at.table, guess)
        here = newton(l2)
        end = here.minimised(here.again(last, guess, max_iter), tol, max_iter)
        return (end, table, log - log_before, log), here.fit(end)

    first = newton(l2s[0])
    start = first.start(first.free(first.table_of(init)), max_iter)
    unknown = jnp.full_like(l2s[0], jnp.nan)
    order = jnp.argsort(-l2s)
    fits: Fit
    _, fits = lax.scan(step, (start, start.at.table, unknown, unknown), l2s[order])
    back = jnp.argsort(order)
    return jax.tree.map(lambda values: values[back].reshape(*shape, *values.shape[1:]), fits)


def _side_by_side(
    flags: _Flags, problem: Problem, init: Params, tol: Array, max_iter: Array, *, fit_bias: bool
) -> Fit:
    """Fits in groups as large as memory and cache allow; the last group is filled up."""
    of = flags[0]
    examples, width = problem.features.shape
    # A column may vary, and yet not in each of the problems.
    columns = None
    if of.share and width <= examples:
        columns = lax.map(
            lambda share: varied(problem._replace(share=share), centre=fit_bias), problem.share
        )
    arguments = problem, init, tol, max_iter, columns
    flags = *flags, None if columns is None else True
    leaves, tree = jax.tree.flatten(arguments)
    own = jax.tree.leaves(flags)
    count = next(len(value) for value, is_own in zip(leaves, own, strict=True) if is_own)
    alike = not (of.labels or of.offset)
    classes = init.bias.shape[-1]
    least = max(classes * examples / _LOGITS, 0 if alike else 4 * classes * width**2 / _BYTES)
    chunks = max(math.ceil(count / _MOST), math.ceil(count * least))
    size = -(-count // chunks)
    if size == 1:
        return _one_by_one(solver(fit_bias=fit_bias), flags[:4], arguments[:4])

    share = problem.share
    if of.share:  # a problem that has no weights is no reason for the others to have none
        share = jnp.mean(jnp.where(jnp.isfinite(share), share, 0), 0)
    lanes = Lanes(size, _AXIS, alike)
    reference = problem._replace(share=share)
    shared = frame(reference, classes, fit_bias=fit_bias, sharing=lanes.sharing)

    def lane(
        problem: Problem, init: Params, tol: Array, max_iter: Array, columns: Array | None
    ) -> Fit:
        how = tol, max_iter
        return _path(problem, shared, init, *how, fit_bias=fit_bias, lanes=lanes, columns=columns)

    axes = jax.tree.map(lambda is_own: 0 if is_own else None, flags)
    solve = jax.vmap(lane, axes, axis_name=_AXIS)
    if chunks == 1:
        return solve(*arguments)
    some = jnp.arange(chunks * size).reshape(chunks, size) % count
    cut = [value[some] if is_own else value for value, is_own in zip(leaves, own, strict=True)]
    fits = _one_by_one(solve, flags, jax.tree.unflatten(tree, cut))
    return jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:])[:count], fits)
