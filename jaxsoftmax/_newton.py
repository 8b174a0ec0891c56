"""Truncated Newton's method for the objective, with one preconditioner for many steps."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxsoftmax import _coordinates, _preconditioner, certificate
from jaxsoftmax._conjugate_gradient import (
    Memory,
    Progress,
    conjugate_gradient,
    empty_memory,
    informed,
    once,
)
from jaxsoftmax._coordinates import Standard, View
from jaxsoftmax._problem import Problem, thinned
from jaxsoftmax.objective import Curvature, Params, curvature, in_blocks, value_and_gradient
from jaxsoftmax.solvers import RUNNING, Fit, Status

_FAST = jnp.float32  # the dtype of products with the Hessian and of the preconditioner
_FORCING = 0.3  # the accuracy of a Newton step, far from the optimum
_LEAST_FORCING = 1e-3
_SAMPLED_FORCING = 0.1  # the Hessian of a sample deserves no more
_LEAST = 10  # steps of conjugate gradients that a preconditioner is kept for, though it is paid for
_MOST = 500
_ROUGH = 1e-4  # relative decrement down to which a float32 objective will do
_LENGTH = 1000.0  # of a step along the gradient, before it is halved
_POLISHES = 3  # steps of the bias alone before the end
_IDLE = 2  # steps without progress after which it has stalled


class Point(NamedTuple):
    """A table, the objective and its gradient there, and the duality gap of the weights."""

    table: Array
    value: Array
    gradient: Array
    weights_gap: Array


class State(NamedTuple):
    """A point, and what the iteration knows besides.

    Attributes:
      at: the point.
      gap: bound on objective - minimum there, if it is known.
      inverse: the preconditioner.
      memory: directions of the last step's conjugate gradients, which correct it.
      owed: products since it was made, those with a sample's Hessian in proportion; -1 before.
      rough: whether the point was evaluated in float32, though the problem has float64.
      sampled: whether steps are taken with the Hessian of a sample of the examples.
      exact: whether products are computed in the dtype of the problem.
      drop: the squared decrement of the last step, relative to the objective.
      idle: steps in a row without progress.
      polished: steps of the bias alone, in a row.
      iterations: Newton steps, -1 before the first point is evaluated.
      products: gradients and products with the Hessian so far, which read the features twice each;
        those with a sample's Hessian in proportion.
      status: a `Status`, or RUNNING.
    """

    at: Point
    gap: Array
    inverse: Array
    memory: Memory
    owed: Array
    rough: Array
    sampled: Array
    exact: Array
    drop: Array
    idle: Array
    polished: Array
    iterations: Array
    products: Array
    status: Array


def newton_cg(
    problem: Problem, init: Params, *, fit_bias: bool, tol: Array, max_iter: Array
) -> tuple[Fit, Array]:
    r"""Newton's method, whose steps are found by preconditioned conjugate gradients.

    A step d solves :math:`H d = -\nabla f` up to a part of the gradient that falls with the
    decrement, or until the gradient that is left would certify `tol`. Products with H are computed
    with standard columns in float32, as long as that allows progress; the objective and its
    gradient in the dtype of the problem, but of a large problem far from the optimum in float32.

    Where there are many more examples than parameters, the Hessian of a sample gives the steps, as
    long as each of them leaves a quarter of the decrement at most.

    The preconditioner is made anew when the products since cost as much as it does: so it never
    costs more than they do. Directions of the step before correct it, whose Hessian is much the
    same.

    Where l2 > 0 the duality gap certifies the result. It holds at the optimal bias, so before the
    end the bias alone takes Newton steps. Where l2 = 0 it is half the squared Newton decrement.

    Args:
      problem: the problem.
      init: parameters to start from, with sum 0 over the present classes.
      fit_bias: whether the bias is fitted; else it is 0.
      tol: bound on (objective - minimum) / objective.
      max_iter: the most Newton steps.

    Returns:
      The fit, and the number of gradients and products with the Hessian that it took.

    Reference:
      Nocedal, Wright (2006), Numerical Optimization, algorithm 7.1. Byrd, Chin, Neveitt, Nocedal
      (2011), On the use of stochastic Hessian information in optimization methods for machine
      learning, SIAM Journal on Optimization 21.
    """
    how = fit_bias, tol, max_iter
    if problem.features.shape[1] > problem.features.shape[0]:
        rows, inner = _coordinates.row_space(problem, centre=fit_bias)
        params, gradient, end = _minimised(inner, rows.inward(init), *how)
        params, gradient = rows.outward(params), rows.gradient(gradient)
    else:
        params, gradient, end = _minimised(problem, init, *how)
    value = end.at.value
    fit = Fit(
        params=params,
        objective=value,
        gap=end.gap / jnp.where(value == 0, 1, value),
        gradient_norm=jnp.sqrt(jnp.sum(gradient.weights**2) + jnp.sum(gradient.bias**2)),
        iterations=end.iterations,
        status=end.status,
    )
    return fit, end.products


def _minimised(
    problem: Problem, init: Params, fit_bias: bool, tol: Array, max_iter: Array
) -> tuple[Params, Params, State]:
    """Parameters, the gradient there, and what the iteration knows at its end."""
    view = _coordinates.view(problem, centre=fit_bias)
    fast = _coordinates.standard(view, _FAST)
    wide = problem.share.dtype
    exact = fast if wide == _FAST else view
    examples, width = problem.features.shape
    classes = init.bias.size
    zero, infinite = jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, wide)

    penalised = problem.l2 > 0
    ridge = jnp.append(fast.problem.l2, 0 if fit_bias else 1)
    gap_scale = certificate.gap_scale(jnp.append(jnp.sqrt(problem.l2) * view.inverse, 0))

    free = _coordinates.projection(problem, classes, fit_bias=fit_bias)

    def evaluate(table: Array, rough: Array) -> Point:
        def evaluated(of: View | Standard, dtype: DTypeLike) -> tuple[Array, Array]:
            value, slope = value_and_gradient(of.params(table.astype(dtype)), of.problem)
            return value.astype(wide), of.table(slope).astype(wide)

        exactly = partial(evaluated, exact, wide)
        roughly = partial(evaluated, fast, _FAST)
        value, slope = lax.cond(rough, roughly, exactly) if may_be_rough else exactly()
        gradient = free(slope)
        return Point(table, value, gradient, certificate.weights_gap(gradient, gap_scale))

    def hessian(state: State, at: Curvature, thin: Array) -> Callable[[Array], Array]:
        def product_of(here: Curvature) -> Callable[[Array], Array]:
            def product(table: Array) -> Array:
                image = here.product(fast.params(table.astype(_FAST)))
                return fast.table(image).astype(wide)

            return product

        def exact_product(table: Array) -> Array:
            here = curvature(exact.params(state.at.table), exact.problem)
            return exact.table(here.product(exact.params(table)))

        fast_product = product_of(at)
        if sample is not None:
            here = curvature(fast.params(state.at.table.astype(_FAST)), sample)
            fast_product = partial(lax.cond, thin, product_of(here), fast_product)
        if exact is fast:
            return fast_product
        return partial(lax.cond, state.exact, exact_product, fast_product)

    plan = _preconditioner.plan(examples, width, classes, kept=not in_blocks(classes, fast.problem))
    may_be_rough = plan.large and exact is not fast
    sample = thinned(fast.problem, plan.stride) if plan.stride > 1 else None
    mean = (
        _preconditioner.covariance(fast.problem if sample is None else sample)
        if plan.groups
        else None
    )

    def preconditioner(state: State, at: Curvature, first: Array, due: Array) -> State:
        """The classes are alike at first, so their first one is shared."""

        def make(old: Array) -> Array:
            return _preconditioner.inverse(
                fast.problem, at.spread, mean, ridge, plan, alike=first, old=old
            )

        inverse = once(first | due, make, state.inverse)
        return state._replace(inverse=inverse, owed=jnp.where(first | due, 0, state.owed))

    def direction(
        state: State, at: Curvature, wanted: Array, polish: Array, thin: Array, ending: Array
    ) -> tuple[Progress, Array, Array, Array]:
        """Conjugate gradients for minus the Newton step, or for that of the bias alone; minus the
        step itself, its size, and how fast the objective falls along it."""
        value = state.at.value
        product = hessian(state, at, thin)
        varied = ~polish | (jnp.arange(width + 1) == width)

        corrected = informed(partial(_preconditioner.apply, state.inverse), state.memory)

        def precondition(residual: Array) -> Array:
            residual = jnp.where(varied, free(residual), 0)
            preconditioned = corrected(residual.astype(_FAST)).astype(wide)
            return jnp.where(varied, free(preconditioned), 0)

        least = jnp.where(thin, _SAMPLED_FORCING, _LEAST_FORCING)
        forcing = jnp.clip(jnp.sqrt(state.drop) / 2, least, _FORCING)
        # With a new preconditioner it goes on; an old one is replaced once that is paid for.
        most = jnp.maximum((plan.price - state.owed) / cost(thin), _LEAST)
        most = jnp.where(state.owed > 0, most, _MOST)

        def proceed(cg: Progress) -> Array:
            # Without a penalty the decrement is the certificate, and so is found well.
            precise = ~penalised & (ending | (cg.decrement / 2 <= tol * value))
            accuracy = jnp.where(polish, 0.1, jnp.where(precise, _LEAST_FORCING, forcing))
            enough = cg.squared <= accuracy**2 * cg.first
            gap = certificate.weights_gap(cg.residual, gap_scale)
            certified = penalised & ~polish & (gap <= tol / 2 * value)
            allowed = cg.steps.astype(_FAST) < jnp.where(precise, _MOST, most)
            return wanted & ~enough & ~certified & allowed

        memory = jax.tree.map(jnp.zeros_like, state.memory)
        gradient = jnp.where(varied, state.at.gradient, 0)
        cg = conjugate_gradient(product, precondition, state.at.gradient, proceed, memory)
        # A saturated model has no curvature: there is nothing but the gradient to go along.
        size = jnp.max(jnp.abs(cg.x))
        overflows = ~jnp.isfinite(size)
        cg = cg._replace(broken=cg.broken | overflows)
        flat = overflows | (cg.broken & (cg.steps <= 1))
        step = jnp.where(flat, _LENGTH * gradient, cg.x)
        slope = jnp.where(flat, _LENGTH * jnp.sum(gradient**2), cg.decrement)
        return cg, step, jnp.where(flat, _LENGTH, size), slope

    def cost(thin: Array) -> Array:
        return jnp.where(thin, jnp.asarray(1 / plan.stride, _FAST), 1)

    def line_search(
        point: Point, step: Array, size: Array, decrement: Array, slack: Array, rough: Array
    ) -> tuple[Point, Array]:
        """The first of the lengths 1, 1/2, 1/4, ... that makes the objective fall enough, or else
        the last that still moves a logit of standard columns. `size` is the largest entry of the
        step. At a point without a finite value the search ends at once."""

        def proceed(carry: tuple[Point, Array, Array]) -> Array:
            new, length, tries = carry
            fallen = new.value <= point.value * (1 + slack) - 1e-4 * length * decrement
            moves = jnp.isfinite(point.value) & (length * size > jnp.finfo(wide).eps)
            return (tries == 0) | (~fallen & moves)

        def shorten(carry: tuple[Point, Array, Array]) -> tuple[Point, Array, Array]:
            _, length, tries = carry
            return evaluate(point.table - length / 2 * step, rough), length / 2, tries + 1

        nowhere = point._replace(value=jnp.full_like(point.value, jnp.nan))
        new, _, tries = lax.while_loop(proceed, shorten, (nowhere, jnp.full((), 2, wide), zero))
        return new, tries

    def advance(state: State) -> State:
        point = state.at
        started = state.iterations >= 0
        ending = (state.iterations >= max_iter) | (state.idle >= _IDLE)
        near = (
            ~state.rough & (point.weights_gap <= tol * point.value) & (state.polished < _POLISHES)
        )
        polish = started & penalised & (near | ending)

        finite = jnp.isfinite(point.value + jnp.sum(point.gradient))
        separable = certificate.separates(point.value, problem)
        separated = separable & ~state.rough & ((point.value <= tol) | ending)
        wanted = started & finite & ~separated & (~ending | polish | ~penalised)
        thin = state.sampled & ~polish & ~ending
        first = wanted & (state.owed < 0)
        due = wanted & (state.owed >= plan.price)
        needed = None if sample is None else first | due | (wanted & ~thin)
        at = curvature(fast.params(point.table.astype(_FAST)), fast.problem, needed)
        state = preconditioner(state, at, first, due)
        cg, step, size, slope = direction(state, at, wanted, polish, thin, ending)
        decrement = jnp.where(cg.broken, jnp.inf, cg.decrement / 2)
        settled = (decrement <= 1e-3 * tol * point.value) | (state.polished + 1 >= _POLISHES)
        # The duality gap at the optimal bias, where the gradient is what this step leaves of it.
        at_bias = certificate.weights_gap(cg.residual, gap_scale)
        to_bias = certificate.newton_gap(decrement, 2 * size)
        # Conjugate gradients approach the decrement from below.
        accurate = cg.squared <= _LEAST_FORCING**2 * cg.first
        gap = jnp.where(penalised, at_bias + to_bias, jnp.where(accurate, decrement, jnp.inf))
        known = ~thin & ~state.rough & (~penalised | polish & settled)
        gap = jnp.where(known, gap, jnp.inf)
        gap = jnp.where(separable & ~state.rough, point.value, gap)
        status = zero + RUNNING
        for holds, verdict in (  # the last that holds counts
            (known & ending, Status.STALLED),
            (known & (state.iterations >= max_iter), Status.MAX_ITER),
            (gap <= tol * point.value, Status.CONVERGED),
            (separated, Status.SEPARABLE),
            (~finite & ~state.rough, Status.DIVERGED),
        ):
            status = jnp.where(started & holds, verdict, status)
        running = status == RUNNING
        passes = cg.steps.astype(_FAST) * cost(thin)
        remembered = (cg.steps > 0) & ~polish
        far = slope > jnp.maximum(tol, _ROUGH) * point.value
        far &= ~separable & (state.idle == 0) & (state.iterations + 1 < max_iter)
        rough = state.rough & (far | ~started)
        slack = jnp.asarray(4 * jnp.finfo(wide).eps, wide)
        slack = jnp.where(state.rough, jnp.asarray(16 * jnp.finfo(_FAST).eps, wide), slack)
        new, tries = once(
            running,
            lambda _: line_search(point, step, size, slope, slack, rough),
            (point, zero),
        )
        progress = (new.value < point.value * (1 - slack)) | (
            penalised & (new.weights_gap < point.weights_gap / 2)
        )
        # A sample has done what it can, or must not decide that an unpenalised fit is at its end.
        spent = ~progress | (slope > state.drop * point.value / 4)
        spent |= ~penalised & (decrement <= tol * point.value)
        idle = jnp.where(progress | ~started, 0, jnp.where(polish, state.idle, state.idle + 1))
        switch = (idle >= _IDLE) & ~state.exact & (exact is not fast)
        return State(
            at=new,
            gap=gap,
            inverse=state.inverse,
            memory=jax.tree.map(
                lambda new, old: jnp.where(cg.broken, 0, jnp.where(remembered, new, old)),
                cg.memory,
                state.memory,
            ),
            owed=state.owed + passes,
            rough=rough,
            sampled=state.sampled & ~(started & spent & ~polish) & ~switch,
            exact=state.exact | switch,
            drop=jnp.where(started & ~polish, slope / point.value, state.drop),
            idle=jnp.where(switch, 0, idle),
            polished=jnp.where(polish, state.polished + 1, 0),
            iterations=jnp.where(running & ~polish, state.iterations + 1, state.iterations),
            products=state.products + passes + tries.astype(_FAST),
            status=status,
        )

    table = view.table_of(init)
    shape = (plan.groups or 1, width + 1, width + 1)
    start = State(
        at=Point(table, infinite, jnp.zeros_like(table), infinite),
        gap=infinite,
        inverse=jnp.zeros(shape if plan.groups else shape[:2], _FAST),
        memory=empty_memory(plan.memory, table, _FAST),
        owed=jnp.full((), -1, _FAST),
        rough=jnp.asarray(may_be_rough) & (max_iter > 0),
        sampled=jnp.full((), plan.stride > 1),
        exact=jnp.zeros((), bool),
        drop=infinite,
        idle=zero,
        polished=zero,
        iterations=zero - 1,
        products=jnp.zeros((), _FAST),
        status=zero + RUNNING,
    )
    end: State = lax.while_loop(lambda state: state.status == RUNNING, advance, start)
    table = free(end.at.table)  # as its steps are, but for their rounding
    return view.params(table), view.gradient(end.at.gradient), end
