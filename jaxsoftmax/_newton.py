"""Truncated Newton's method for the objective, with one preconditioner for many steps."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax import _preconditioner
from jaxsoftmax._conjugate_gradient import Progress, conjugate_gradient
from jaxsoftmax._coordinates import View
from jaxsoftmax.certificate import duality_gap, weights_gap
from jaxsoftmax.objective import Curvature, Params, curvature, value_and_gradient
from jaxsoftmax.solvers import RUNNING, Fit, Status

_FORCING = 0.3  # the accuracy of a Newton step, far from the optimum
_HALVINGS = 30
_IDLE = 2  # steps without progress after which it has stalled


class Point(NamedTuple):
    """A table, the objective, its gradient, and a bound on objective - minimum if it is known."""

    table: Array
    value: Array
    gradient: Array
    gap: Array


class State(NamedTuple):
    """A point, and what the iteration knows besides.

    Attributes:
      at: the point.
      factor: the preconditioner.
      owed: products since it was made.
      exact: whether products are computed in the dtype of the problem.
      drop: half the squared decrement of the last step, relative to the objective.
      idle: steps in a row without progress.
      iterations: Newton steps.
      products: gradients and products with the Hessian so far: each reads the features twice.
      status: a `Status`, or RUNNING.
    """

    at: Point
    factor: Array
    owed: Array
    exact: Array
    drop: Array
    idle: Array
    iterations: Array
    products: Array
    status: Array


def newton_cg(
    exact: View, fast: View, init: Params, *, fit_bias: bool, tol: Array, max_iter: Array
) -> tuple[Fit, Array]:
    r"""Newton's method, whose steps are found by preconditioned conjugate gradients.

    A step d solves :math:`H d = -\nabla f` up to a part of the gradient that falls with the
    decrement, or until the gradient that is left would certify `tol`. Objective and gradient are
    those of `exact`, products with H those of `fast`, the same problem with standard columns in
    float32, until that allows no more progress.

    The preconditioner is made anew when the products since cost as much as it does: so it never
    costs more than they do.

    Args:
      exact: the problem in its own dtype.
      fast: the same problem as `_coordinates.standard` makes it.
      init: parameters of the problem of `exact`.
      fit_bias: whether the bias is fitted; else it stays.
      tol: bound on (objective - minimum) / objective.
      max_iter: the most Newton steps.

    Returns:
      The fit, and the number of gradients and products with the Hessian that it took.

    Reference:
      Nocedal, Wright (2006), Numerical Optimization, algorithm 7.1.
    """
    problem = exact.problem
    examples, width = problem.features.shape
    classes = init.bias.size
    wide, narrow = problem.share.dtype, fast.problem.share.dtype
    penalised = problem.l2.max() > 0
    separated = jnp.log(2) * jnp.min(jnp.where(problem.share > 0, problem.share, jnp.inf))
    slack = 4 * jnp.finfo(wide).eps
    ridge = jnp.append(jnp.broadcast_to(fast.problem.l2, width), 0 if fit_bias else 1)
    ridge = ridge.astype(narrow)

    def free(table: Array) -> Array:
        return table if fit_bias else table.at[:, -1].set(0)

    def evaluate(table: Array) -> Point:
        value, gradient = value_and_gradient(exact.params(table), problem)
        return Point(table, value, free(exact.table(gradient)), jnp.full_like(value, jnp.inf))

    def certified(point: Point) -> Point:
        found = duality_gap(exact.params(point.table), problem, fit_bias=fit_bias)
        bias = exact.table_of(found.params)[:, -1:]
        table = jnp.concatenate([point.table[:, :-1], bias], 1)
        return Point(table, found.objective, free(exact.table(found.gradient)), found.gap)

    def bound(gradient: Array, view: View = exact) -> Array:
        return weights_gap(view.gradient(gradient), view.problem)

    def narrowly(at: Curvature) -> Callable[[Array], Array]:
        def product(table: Array) -> Array:
            image = at.product(fast.params(table.astype(narrow)))
            return free(fast.table(image)).astype(wide)

        return product

    def exactly(at: Array) -> Callable[[Array], Array]:
        params = exact.params(at)

        def product(table: Array) -> Array:
            return free(exact.table(curvature(params, problem).product(exact.params(table))))

        return product

    start = evaluate(exact.table_of(init))
    at_start = curvature(fast.params(start.table.astype(narrow)), fast.problem)
    plan = _preconditioner.plan(
        examples, width, classes, kept=at_start.spread.shape[0] == classes
    )

    def shared(at: Curvature) -> Array:
        spread = jnp.mean(at.spread, 0, keepdims=True)
        if plan.groups == 0:
            return _preconditioner.diagonal(spread, ridge)
        return _preconditioner.factorise(fast.problem, spread, ridge, examples)

    def separate(at: Curvature) -> Array:
        if plan.groups <= 1:
            return shared(at)
        return _preconditioner.factorise(fast.problem, at.spread, ridge, plan.rows)

    def direction(state: State, at: Curvature, wanted: Array) -> Progress:
        point = state.at

        def precondition(residual: Array) -> Array:
            return _preconditioner.apply(state.factor, residual.astype(narrow)).astype(wide)

        fast_product = narrowly(at)
        if wide == narrow:
            product = fast_product
        else:
            slow_product = exactly(point.table)

            def product(table: Array) -> Array:
                return lax.cond(state.exact, slow_product, fast_product, table)

        forcing = jnp.clip(jnp.sqrt(state.drop), 1e-3, _FORCING)

        def proceed(cg: Progress, first: Array) -> Array:
            # Without a penalty the decrement is the certificate, and so is found well.
            small = ~penalised & (cg.decrement / 2 <= tol * point.value)
            enough = cg.squared <= jnp.where(small, 1e-3, forcing) ** 2 * first
            left = bound(cg.residual, fast) <= 0.1 * tol * point.value
            return wanted & ~enough & ~left & (cg.steps < point.table.size)

        return conjugate_gradient(product, precondition, -point.gradient, proceed)

    def line_search(point: Point, step: Array, decrement: Array) -> tuple[Point, Array]:
        """The first of the lengths 1, 1/2, 1/4, ... that makes the objective fall enough."""

        def proceed(carry: tuple[Point, Array, Array]) -> Array:
            new, length, tries = carry
            fallen = new.value <= point.value * (1 + slack) - 1e-4 * length * decrement
            return ~fallen & (tries < _HALVINGS)

        def shorten(carry: tuple[Point, Array, Array]) -> tuple[Point, Array, Array]:
            _, length, tries = carry
            return evaluate(point.table + length / 2 * step), length / 2, tries + 1

        nowhere = point._replace(value=jnp.full_like(point.value, jnp.inf))
        begin = (nowhere, jnp.full_like(point.value, 2), jnp.zeros((), jnp.int32))
        new, _, tries = lax.while_loop(proceed, shorten, begin)
        return new, tries

    def advance(state: State) -> State:
        ending = (state.iterations >= max_iter) | (state.idle >= _IDLE)
        hopeful = bound(state.at.gradient) <= tol * state.at.value
        point = _once(penalised & (hopeful | ending), certified, state.at)
        at = curvature(fast.params(point.table.astype(narrow)), fast.problem)
        state = state._replace(at=point)

        def judged(point: Point) -> Array:
            finite = jnp.isfinite(point.value) & jnp.all(jnp.isfinite(point.gradient))
            return jnp.select(
                [
                    ~finite,
                    point.gap <= tol * point.value,
                    ~penalised & (point.value < separated),
                    state.iterations >= max_iter,
                    state.idle >= _IDLE,
                ],
                [
                    Status.DIVERGED,
                    Status.CONVERGED,
                    Status.SEPARABLE,
                    Status.MAX_ITER,
                    Status.STALLED,
                ],
                RUNNING,
            ).astype(jnp.int32)

        status = judged(point)
        wanted = (status == RUNNING) | ~penalised & (status != Status.DIVERGED)
        due = (state.owed >= plan.price) & wanted
        factor = _once(due, lambda _: separate(at), state.factor)
        state = state._replace(factor=factor, owed=jnp.where(due, 0, state.owed))

        cg = direction(state, at, wanted)
        decrement = jnp.where(cg.broken, jnp.inf, cg.decrement / 2)
        point = point._replace(gap=jnp.where(penalised, point.gap, decrement))
        status = judged(point)

        step = cg.x - jnp.mean(cg.x, 0)
        running = status == RUNNING
        new, tries = _once(
            running,
            lambda _: line_search(point, step, cg.decrement),
            (point, jnp.zeros((), jnp.int32)),
        )
        fallen = new.value < point.value * (1 - slack)
        certain = bound(new.gradient) < bound(point.gradient) / 2
        idle = jnp.where(fallen | certain, 0, state.idle + 1)
        switch = (idle >= _IDLE) & ~state.exact & (wide != narrow)
        return State(
            at=new,
            factor=factor,
            owed=state.owed + cg.steps,
            exact=state.exact | switch,
            drop=cg.decrement / point.value,
            idle=jnp.where(switch, 0, idle),
            iterations=state.iterations + running,
            products=state.products + cg.steps + tries,
            status=status,
        )

    zero = jnp.zeros((), jnp.int32)
    first = shared(at_start)
    begin = State(
        at=start,
        factor=jnp.broadcast_to(first, (max(plan.groups, 1), *first.shape[1:])),
        owed=zero,
        exact=jnp.zeros((), bool),
        drop=jnp.ones_like(start.value),
        idle=zero,
        iterations=zero,
        products=zero + 1,
        status=zero + RUNNING,
    )
    end: State = lax.while_loop(lambda state: state.status == RUNNING, advance, begin)
    value, gradient = end.at.value, exact.gradient(end.at.gradient)
    norm = jnp.sqrt(jnp.sum(gradient.weights**2) + jnp.sum(gradient.bias**2))
    fit = Fit(
        params=exact.params(end.at.table),
        objective=value,
        gap=end.at.gap / jnp.where(value == 0, 1, value),
        gradient_norm=norm,
        iterations=end.iterations,
        status=end.status,
    )
    return fit, end.products


_Value = TypeVar("_Value")


def _once(wanted: Array, f: Callable[[_Value], _Value], value: _Value) -> _Value:
    """f(value) if `wanted`, else `value`: a `cond` that under vmap is run only if one wants it."""
    return lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros_like(carry[0]), f(carry[1])), (wanted, value)
    )[1]
