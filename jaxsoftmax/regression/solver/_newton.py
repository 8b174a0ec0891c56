"""Truncated Newton's method for the objective, with one preconditioner for many steps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxsoftmax._runtime import ALONE, Lanes
from jaxsoftmax.regression._data import Problem, thinned
from jaxsoftmax.regression._objective import Curvature, Params, curvature, value_and_gradient
from jaxsoftmax.regression.solver import _certificate as certificate
from jaxsoftmax.regression.solver import _coordinates, _preconditioner
from jaxsoftmax.regression.solver._cg import (
    Product,
    Progress,
    conjugate_gradient,
    empty_memory,
    informed,
    once,
)
from jaxsoftmax.regression.solver._coordinates import RowSpace, Standard, View
from jaxsoftmax.regression.solver._frame import FAST, Frame, frame, plan_of
from jaxsoftmax.regression.solver._lbfgs import RUNNING, Fit, Status
from jaxsoftmax.regression.solver._preconditioner import Plan
from jaxsoftmax.regression.solver._state import Point, Shared, State

_FORCING = 0.3  # the accuracy of a Newton step, far from the optimum
_LEAST_FORCING = 1e-3
_SAMPLED_FORCING = 0.1  # the Hessian of a sample deserves no more
_LEAST = 10  # steps of conjugate gradients that a preconditioner is kept for, though it is paid for
_MOST = 500
_ROUGH = 1e-4  # relative decrement down to which a float32 objective will do
_LENGTH = 1000.0  # of a step along the gradient, before it is halved
_POLISHES = 3  # steps of the bias alone before the end
_IDLE = 2  # steps without progress after which it has stalled


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
    shared = frame(problem, init.bias.size, fit_bias=fit_bias)
    newton = Newton.of(problem, shared, init.bias.size, fit_bias=fit_bias)
    end = newton.minimised(newton.start(newton.table_of(init), max_iter), tol, max_iter)
    return newton.fit(end), end.products


@dataclass(frozen=True)
class Newton:
    """Newton's method for one problem, or for one of several side by side.

    Attributes:
      rows: the coordinates in which there are no more columns than rows, if they are needed.
      view: the problem with standard coordinates of its columns.
      fast: the problem in them, in float32.
      sample: a sample of the examples of `fast`, if its Hessian is to give steps.
      mean: the covariance of the columns, for the preconditioner.
      free: the part of a table that can vary.
      ridge: the penalties in standard coordinates, for the preconditioner.
      gap_scale: that of the duality gap.
      penalised: whether l2 is above 0.
      plan: what suits the shapes.
      lanes: the problems side by side.
    """

    rows: RowSpace | None
    view: View
    fast: Standard
    sample: Problem | None
    mean: Array | None
    free: Callable[[Array], Array]
    ridge: Array
    gap_scale: Array
    penalised: Array
    plan: Plan
    lanes: Lanes

    @staticmethod
    def of(
        problem: Problem,
        shared: Frame,
        classes: int,
        *,
        fit_bias: bool,
        lanes: Lanes = ALONE,
        columns: Array | None = None,
    ) -> "Newton":
        """That of a problem whose features are those of `shared`, and of the `columns` alone."""
        view = shared.view._replace(problem=problem._replace(features=shared.view.problem.features))
        fast = _coordinates.standard(view, shared.columns)
        plan = plan_of(fast.problem, classes, lanes.sharing)
        sample = None
        if shared.sample is not None:
            sample = thinned(fast.problem, plan.stride)._replace(features=shared.sample)
        return Newton(
            rows=shared.rows,
            view=view,
            fast=fast,
            sample=sample,
            mean=shared.mean,
            free=_coordinates.projection(problem, classes, fit_bias=fit_bias, columns=columns),
            ridge=jnp.append(fast.problem.l2, 0 if fit_bias else 1),
            gap_scale=certificate.gap_scale(jnp.append(jnp.sqrt(problem.l2) * view.inverse, 0)),
            penalised=problem.l2 > 0,
            plan=plan,
            lanes=lanes,
        )

    @property
    def wide(self) -> DTypeLike:
        """The dtype of the problem."""
        return self.view.problem.share.dtype

    @property
    def exact(self) -> View | Standard:
        """The problem in its own dtype."""
        return self.fast if self.wide == FAST else self.view

    @property
    def may_be_rough(self) -> bool:
        return self.plan.large and self.exact is not self.fast

    def table_of(self, init: Params) -> Array:
        """Parameters of the problem's features as a table."""
        return self.view.table_of(init if self.rows is None else self.rows.inward(init))

    def start(self, table: Array, max_iter: Array) -> State:
        """Before anything is known but where to start."""
        width = table.shape[1]
        shape = (self.plan.groups or 1, width, width)
        infinite, zero = jnp.full((), jnp.inf, self.wide), jnp.zeros((), jnp.int32)
        return State(
            shared=Shared(
                inverse=jnp.zeros(shape if self.plan.groups else shape[:2], FAST),
                owed=jnp.full((), -1, FAST),
                rough=jnp.asarray(self.may_be_rough) & self.lanes.all(max_iter > 0),
                sampled=jnp.full((), self.plan.stride > 1),
                exact=jnp.zeros((), bool),
            ),
            at=Point(table, infinite, jnp.zeros_like(table), infinite),
            gap=infinite,
            memory=empty_memory(self.plan.memory, table, FAST),
            drop=infinite,
            idle=zero,
            polished=zero,
            iterations=zero - 1,
            products=jnp.zeros((), FAST),
            status=zero + RUNNING,
        )

    def again(self, state: State, table: Array, max_iter: Array) -> State:
        """A start from `table` with what the iteration has learnt of a similar problem."""
        new = self.start(table, max_iter)
        return new._replace(
            shared=state.shared._replace(rough=new.shared.rough, exact=new.shared.exact),
            memory=state.memory,
            products=state.products,
        )

    def minimised(self, start: State, tol: Array, max_iter: Array) -> State:
        """Where Newton's method ends."""
        return lax.while_loop(
            lambda state: self.lanes.any(state.status == RUNNING),
            lambda state: self.advance(state, tol, max_iter),
            start,
        )

    def fit(self, end: State) -> Fit:
        """What is reported of it."""
        value = end.at.value
        params = self.view.params(self.free(end.at.table))  # its steps are, but for their rounding
        gradient = self.view.gradient(end.at.gradient)
        if self.rows is not None:
            params, gradient = self.rows.outward(params), self.rows.gradient(gradient)
        return Fit(
            params=params,
            objective=value,
            gap=end.gap / jnp.where(value == 0, 1, value),
            gradient_norm=jnp.sqrt(jnp.sum(gradient.weights**2) + jnp.sum(gradient.bias**2)),
            iterations=end.iterations,
            status=end.status,
        )

    def evaluated(self, table: Array, rough: Array) -> Point:
        """The objective at a table, in float32 if that is to do."""

        def evaluate(of: View | Standard, dtype: DTypeLike) -> tuple[Array, Array]:
            value, slope = value_and_gradient(of.params(table.astype(dtype)), of.problem)
            return value.astype(self.wide), of.table(slope).astype(self.wide)

        exactly = partial(evaluate, self.exact, self.wide)
        roughly = partial(evaluate, self.fast, FAST)
        value, slope = lax.cond(rough, roughly, exactly) if self.may_be_rough else exactly()
        gradient = self.free(slope)
        return Point(table, value, gradient, certificate.weights_gap(gradient, self.gap_scale))

    def hessian(self, state: State, at: Curvature, thin: Array) -> Product:
        """Products with the Hessian, that of the sample if `thin`."""

        def product_of(here: Curvature) -> Product:
            features = here.problem.features

            def image(own: tuple[Curvature, Array]) -> Array:
                point, table = own
                point = point._replace(problem=point.problem._replace(features=features))
                return self.fast.table(point.product(self.fast.params(table)))

            def product(table: Array, running: Array) -> Array:
                # All but the features, which the problems have in common.
                own = here._replace(problem=here.problem._replace(features=features[:0]))
                table = table.astype(FAST)
                return self.lanes.of_running(image, running, (own, table)).astype(self.wide)

            return product

        def exact_product(table: Array, _: Array) -> Array:
            of = self.exact
            here = curvature(of.params(state.at.table), of.problem)
            return of.table(here.product(of.params(table)))

        fast_product = product_of(at)
        if self.sample is not None:
            here = curvature(self.fast.params(state.at.table.astype(FAST)), self.sample)
            fast_product = partial(lax.cond, thin, product_of(here), fast_product)
        if self.exact is self.fast:
            return fast_product
        return partial(lax.cond, state.shared.exact, exact_product, fast_product)

    def preconditioned(
        self, shared: Shared, at: Curvature, counts: Array, first: Array, due: Array
    ) -> Shared:
        """With a new preconditioner, if one is `due` or it is the `first`: then the classes are
        alike, and one serves them all. Of problems side by side those that count make it."""

        def make(old: Array) -> Array:
            spread, ridge = (self.lanes.pooled(v, counts) for v in (at.spread(), self.ridge))
            return _preconditioner.inverse(
                self.fast.problem, spread, self.mean, ridge, self.plan, alike=first, old=old
            )

        inverse = once(first | due, make, shared.inverse)
        return shared._replace(inverse=inverse, owed=jnp.where(first | due, 0, shared.owed))

    def cost(self, thin: Array) -> Array:
        """That of a product, which is 1 with all examples."""
        return jnp.where(thin, jnp.asarray(1 / self.plan.stride, FAST), 1)

    def direction(
        self,
        state: State,
        at: Curvature,
        tol: Array,
        wanted: Array,
        polish: Array,
        thin: Array,
        ending: Array,
    ) -> tuple[Progress, Array, Array, Array]:
        """The step to be subtracted: Newton's, or that of the bias alone.

        Returns:
          How conjugate gradients ended, the step, its largest entry, and how fast the objective
          falls along it.
        """
        value, width = state.at.value, state.at.table.shape[1]
        shared = state.shared
        varied = ~polish | (jnp.arange(width) == width - 1)
        corrected = informed(partial(_preconditioner.apply, shared.inverse), state.memory)

        def precondition(residual: Array) -> Array:
            residual = jnp.where(varied, self.free(residual), 0)
            preconditioned = corrected(residual.astype(FAST)).astype(self.wide)
            return jnp.where(varied, self.free(preconditioned), 0)

        least = jnp.where(thin, _SAMPLED_FORCING, _LEAST_FORCING)
        forcing = jnp.clip(jnp.sqrt(state.drop) / 2, least, _FORCING)
        # With a new preconditioner it goes on; an old one is replaced once that is paid for.
        most = jnp.maximum((self.plan.price - shared.owed) / self.cost(thin), _LEAST)
        most = jnp.where(shared.owed > 0, most, _MOST)

        def proceed(cg: Progress) -> Array:
            # Without a penalty the decrement is the certificate, and so is found well.
            precise = ~self.penalised & (ending | (cg.decrement / 2 <= tol * value))
            accuracy = jnp.where(polish, 0.1, jnp.where(precise, _LEAST_FORCING, forcing))
            enough = cg.squared <= accuracy**2 * cg.first
            gap = certificate.weights_gap(cg.residual, self.gap_scale)
            certified = self.penalised & ~polish & (gap <= tol / 2 * value)
            allowed = cg.steps.astype(FAST) < jnp.where(precise, _MOST, most)
            return wanted & ~enough & ~certified & allowed

        product = self.hessian(state, at, thin)
        memory = jax.tree.map(jnp.zeros_like, state.memory)
        gradient = jnp.where(varied, state.at.gradient, 0)
        cg = conjugate_gradient(
            product, precondition, state.at.gradient, proceed, memory, self.lanes
        )
        # A saturated model has no curvature: there is nothing but the gradient to go along.
        size = jnp.max(jnp.abs(cg.x))
        overflows = ~jnp.isfinite(size)
        cg = cg._replace(broken=cg.broken | overflows)
        flat = overflows | (cg.broken & (cg.steps <= 1))
        step = jnp.where(flat, _LENGTH * gradient, cg.x)
        slope = jnp.where(flat, _LENGTH * jnp.sum(gradient**2), cg.decrement)
        return cg, step, jnp.where(flat, _LENGTH, size), slope

    def line_search(
        self, point: Point, step: Array, size: Array, slope: Array, slack: Array, rough: Array
    ) -> tuple[Point, Array]:
        """The first of the lengths 1, 1/2, 1/4, ... that makes the objective fall enough, or else
        the last that still moves a logit of standard columns. `size` is the largest entry of the
        step, `slope` how fast the objective falls along it. At a point without a finite value the
        search ends at once."""

        def proceed(carry: tuple[Point, Array, Array]) -> Array:
            new, length, tries = carry
            fallen = new.value <= point.value * (1 + slack) - 1e-4 * length * slope
            moves = jnp.isfinite(point.value) & (length * size > jnp.finfo(self.wide).eps)
            return (tries == 0) | (~fallen & moves)

        def shorten(carry: tuple[Point, Array, Array]) -> tuple[Point, Array, Array]:
            _, length, tries = carry
            new = self.evaluated(point.table - length / 2 * step, rough)
            return new, length / 2, tries + 1

        nowhere = point._replace(value=jnp.full_like(point.value, jnp.nan))
        twice, none = jnp.full((), 2, self.wide), jnp.zeros((), jnp.int32)
        new, _, tries = lax.while_loop(proceed, shorten, (nowhere, twice, none))
        return new, tries

    def advance(self, state: State, tol: Array, max_iter: Array) -> State:
        """A Newton step, or one of the bias alone, and the verdict on the point before it."""
        point, lanes, shared = state.at, self.lanes, state.shared
        running = state.status == RUNNING
        started = state.iterations >= 0
        ending = (state.iterations >= max_iter) | (state.idle >= _IDLE)
        near = (
            ~shared.rough & (point.weights_gap <= tol * point.value) & (state.polished < _POLISHES)
        )
        polish = started & self.penalised & (near | ending)

        finite = jnp.isfinite(point.value + jnp.sum(point.gradient))
        separable = certificate.separates(point.value, self.view.problem)
        separated = separable & ~shared.rough & ((point.value <= tol) | ending)
        wanted = running & started & finite & ~separated & (~ending | polish | ~self.penalised)
        thin = shared.sampled & lanes.all(~running | (~polish & ~ending))
        some = lanes.any(wanted)
        first = some & (shared.owed < 0)
        due = some & (shared.owed >= self.plan.price)
        needed: Array | None = first | due | (some & ~thin)
        if lanes.axis_name is None and self.sample is None:
            needed = None  # one problem nearly always does
        at = curvature(self.fast.params(point.table.astype(FAST)), self.fast.problem, needed)
        shared = self.preconditioned(shared, at, wanted, first, due)
        state = state._replace(shared=shared)
        cg, step, size, slope = self.direction(state, at, tol, wanted, polish, thin, ending)
        decrement = jnp.where(cg.broken, jnp.inf, cg.decrement / 2)
        settled = (decrement <= 1e-3 * tol * point.value) | (state.polished + 1 >= _POLISHES)
        # The duality gap at the optimal bias, where the gradient is what this step leaves of it.
        at_bias = certificate.weights_gap(cg.residual, self.gap_scale)
        to_bias = certificate.newton_gap(decrement, 2 * size)
        # Conjugate gradients approach the decrement from below.
        accurate = cg.squared <= _LEAST_FORCING**2 * cg.first
        gap = jnp.where(self.penalised, at_bias + to_bias, jnp.where(accurate, decrement, jnp.inf))
        known = ~thin & ~shared.rough & (~self.penalised | polish & settled)
        gap = jnp.where(known, gap, jnp.inf)
        gap = jnp.where(separable & ~shared.rough, point.value, gap)
        status = jnp.full((), RUNNING, jnp.int32)
        for holds, verdict in (  # the last that holds counts
            (known & ending, Status.STALLED),
            (known & (state.iterations >= max_iter), Status.MAX_ITER),
            (gap <= tol * point.value, Status.CONVERGED),
            (separated, Status.SEPARABLE),
            (~finite & ~shared.rough, Status.DIVERGED),
        ):
            status = jnp.where(started & holds, verdict, status)
        goes_on = running & (status == RUNNING)
        passes = cg.steps.astype(FAST) * self.cost(thin)
        remembered = (cg.steps > 0) & ~polish
        far = slope > jnp.maximum(tol, _ROUGH) * point.value
        far &= ~separable & (state.idle == 0) & (state.iterations + 1 < max_iter)
        rough = shared.rough & lanes.all(far | ~started | ~running)
        slack = jnp.asarray(4 * jnp.finfo(self.wide).eps, self.wide)
        slack = jnp.where(shared.rough, jnp.asarray(16 * jnp.finfo(FAST).eps, self.wide), slack)
        end, tries = once(
            goes_on,
            lambda _: self.line_search(point, step, size, slope, slack, rough),
            (point, jnp.zeros((), jnp.int32)),
        )
        progress = (end.value < point.value * (1 - slack)) | (
            self.penalised & (end.weights_gap < point.weights_gap / 2)
        )
        # A sample has done what it can, or must not decide that an unpenalised fit is at its end.
        spent = ~progress | (slope > state.drop * point.value / 4)
        spent |= ~self.penalised & (decrement <= tol * point.value)
        spent &= running & started & ~polish
        idle = jnp.where(progress | ~started, 0, jnp.where(polish, state.idle, state.idle + 1))
        switch = ~shared.exact & lanes.any(running & (idle >= _IDLE))
        switch &= self.exact is not self.fast
        shared = Shared(
            inverse=shared.inverse,
            owed=shared.owed + lanes.most(passes),
            rough=rough,
            sampled=shared.sampled & ~lanes.any(spent) & ~switch,
            exact=shared.exact | switch,
        )
        new = State(
            shared=shared,
            at=end,
            gap=gap,
            memory=jax.tree.map(
                lambda new, old: jnp.where(cg.broken, 0, jnp.where(remembered, new, old)),
                cg.memory,
                state.memory,
            ),
            drop=jnp.where(started & ~polish, slope / point.value, state.drop),
            idle=jnp.where(switch, 0, idle),
            polished=jnp.where(polish, state.polished + 1, 0),
            iterations=jnp.where(goes_on & ~polish, state.iterations + 1, state.iterations),
            products=state.products + passes + tries.astype(FAST),
            status=status,
        )
        return State(shared, *lanes.only(running, new[1:], state[1:]))
