r"""Newton's method for problems side by side, in phases that a driver calls.

Each problem is in a phase:

* SEARCH: `search` evaluates the objective at the end of a step; it accepts the step or shortens it.
* BALANCE: `balance` finds the step of the bias that a certificate needs.
* CERTIFY: `search` bounds the distance from the minimum in a pass like that of a step, and
  `certify` may end the fit.
* AIM: `aim` finds the next direction d, with :math:`H d = \nabla f` up to a part of the gradient.
* DONE.

`next_phase` says which comes next, and before AIM whether the preconditioner is due: `precondition`
makes it. Problems that are in another phase wait. A penalised problem comes to CERTIFY from
BALANCE; an unpenalised one from AIM, with the direction that certifies it.

What takes the examples is compiled. The decisions are arithmetic on the few numbers that are known
of each problem, by NumPy where a Python loop drives, else as a part of a compiled loop.

Reference:
  Nocedal, Wright (2006), Numerical Optimization, algorithms 3.1 (backtracking) and 7.1 (line search
  Newton-CG).
"""

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsoftmax._runtime import Array, namespace, read
from jaxsoftmax.regression._objective import Point
from jaxsoftmax.regression._penalty import inner
from jaxsoftmax.regression._plan import Plan, Preconditioning
from jaxsoftmax.regression._result import Status
from jaxsoftmax.regression.solver import _kernels
from jaxsoftmax.regression.solver._certificate import DISTANCE, bias_step, moves_of
from jaxsoftmax.regression.solver._cg import Stop
from jaxsoftmax.regression.solver._state import (
    AIM,
    BALANCE,
    CERTIFY,
    DONE,
    IDLE,
    PRECONDITION,
    SEARCH,
    Limits,
    Model,
    Numbers,
    State,
)

_ARMIJO = 1e-4
_FORCING = 0.3  # the accuracy of a Newton step, far from the optimum
_LEAST_FORCING = 1e-3
_LEAST = 10  # steps of conjugate gradients that a preconditioner is kept for, though it is paid for
_MOST = 500
_RADIUS = 30.0  # of a step that was too long, in standard coordinates
_BELIEF = 100.0  # a decrement relative to the objective


def init(model: Model, table: Array, sizes: Preconditioning, *, uniform: bool) -> State:
    """The state before the start is evaluated; where `uniform`, probabilities are equal there."""
    xp = namespace(table)
    classes, problems, width = table.shape
    fast = model.fast.dtype
    square = (width, width) if sizes.groups else (width,)
    groups = (sizes.groups or 1, 1 if sizes.shared else problems)
    p = None
    if model.fast.kept:
        p = xp.zeros((classes, problems, model.fast.shape[0]), fast)
    zero = xp.zeros(problems, table.dtype)
    memory = xp.zeros((2, sizes.memory, *table.shape), fast)
    return State(
        point=Point(table, xp.zeros_like(table), p),
        direction=xp.zeros_like(table),
        moves=xp.zeros_like(table[:, :, :1]),
        inverse=xp.zeros((*groups, *square), fast),
        memory=memory,
        numbers=Numbers.start(zero, -1 if uniform else sizes.price),
    )


def search(model: Model, state: State, limits: Limits) -> State:
    """Evaluate the objective at the end of the step; accept the step, or shorten it.

    Where a certificate is due, the same pass over the examples makes it.
    """
    before = state.numbers
    xp = namespace(before.value)
    trying, certifying = before.phase == SEARCH, before.phase == CERTIFY
    bound = (
        before.value * (1 + _rounding(before.value.dtype)) - _ARMIJO * before.length * before.slope
    )
    # The start is accepted as it is, and so is a point that is evaluated again.
    bound = xp.where(before.length == 0, float("inf"), bound)
    bound = xp.where(trying, bound, -float("inf"))
    point, measured = _kernels.evaluate(
        model,
        state.point,
        state.direction,
        state.moves,
        xp.where(certifying, 0, before.length),
        bound,
        certifying,
        precise=not is_penalised(model),
    )
    value, weights_gap, divergence, distant, accepted = read(measured)
    accepted = accepted > 0
    after = judge(model, before, value, weights_gap, limits)
    after = after.where(accepted, shorten(before))
    gap = divergence + xp.where(model.penalised, weights_gap, distant)
    certified = certify(model, before, gap, limits).where(certifying, before)
    return state._replace(point=point, numbers=after.where(trying, certified))


def judge(
    model: Model, before: Numbers, value: Array, weights_gap: Array, limits: Limits
) -> Numbers:
    """Update the numbers after an accepted step, and say which phase is next."""
    xp = namespace(value)
    started, moved = before.iterations >= 0, before.length > 0
    step = (started & moved).astype(value.dtype)
    progress = value < before.value * (1 - _rounding(before.value.dtype))
    progress |= weights_gap < before.weights_gap / 2
    after = before._replace(
        value=value,
        weights_gap=weights_gap,
        gap=before.gap + float("inf"),
        drop=xp.where(step > 0, before.slope / value, before.drop),
        idle=xp.where(started & ~(moved & progress), before.idle + step, 0),
        iterations=xp.maximum(before.iterations + step, 0),
        products=before.products + 1,
    )
    ending = after.ending(limits)
    near = model.penalised & ((weights_gap <= limits.tol * value) | ending)
    after = after._replace(phase=xp.where(near, BALANCE, AIM))
    proved = ~model.penalised & (value < model.separable)
    separated = proved & ((value <= limits.tol) | ending)
    finite = xp.isfinite(value + weights_gap)
    status = xp.where(finite, int(Status.SEPARABLE), int(Status.DIVERGED))
    done = after._replace(gap=value, phase=0 * after.phase + DONE, status=status)
    return done.where(~finite | separated, after)


@cache
def _rounding(dtype: Any) -> float:
    """The relative change of an objective that counts as rounding."""
    return float(4 * np.finfo(dtype).eps)


def shorten(before: Numbers) -> Numbers:
    """Try a shorter part of a step; 0 if it moves nothing any more, which ends the fit."""
    xp = namespace(before.value)
    length = before.length / 2
    length = xp.where(length * before.size > _radius(before), _to_radius(before), length)
    lost = ~(length * before.size > np.finfo(length.dtype).eps)
    return before._replace(
        length=xp.where(lost, 0, length),
        idle=xp.where(lost, IDLE, before.idle),
        products=before.products + 1,
    )


def _radius(numbers: Numbers) -> Array:
    """How long a step may be that is not trusted; the more were taken, the further it may be."""
    radius: Array = _RADIUS * 2 ** (numbers.iterations / 5)
    return radius


def _to_radius(numbers: Numbers) -> Array:
    """The part of the direction that is as long as that."""
    return _radius(numbers) / namespace(numbers.size).where(numbers.size > 0, numbers.size, 1)


def balance(model: Model, state: State) -> State:
    """Find a step of the bias that gives the classes the shares of the data, for a certificate."""
    numbers = state.numbers
    xp = namespace(numbers.value)
    balancing = numbers.phase == BALANCE
    due = balancing[None, :, None]
    direction = read(state.direction)
    products = read(_kernels.bias_products(model, state.point))
    residual = read(state.point.gradient)[:, :, -1:]
    target = read(model.exact.target)
    step, left = bias_step(products, residual, target)
    bias_alone = xp.concatenate([xp.zeros_like(direction[:, :, :-1]), step], 2)
    return state._replace(
        direction=xp.where(due, bias_alone, direction),
        moves=xp.where(due, moves_of(target, left), 0),
        numbers=numbers._replace(phase=xp.where(balancing, CERTIFY, numbers.phase)),
    )


def certify(model: Model, before: Numbers, gap: Array, limits: Limits) -> Numbers:
    """End the fit if the gap is small, or can become no smaller."""
    xp = namespace(gap)
    gap = xp.where(xp.isnan(gap), float("inf"), gap)
    converged = gap <= limits.tol * before.value
    done = converged | before.ending(limits)
    full = before.iterations >= limits.max_iter
    failed = xp.where(full, int(Status.MAX_ITER), int(Status.STALLED))
    return before._replace(
        gap=gap,
        phase=xp.where(done, DONE, xp.where(model.penalised, AIM, SEARCH)),
        status=xp.where(converged, int(Status.CONVERGED), failed),
    )


def precondition(model: Model, state: State, sizes: Preconditioning, plan: Plan) -> State:
    """Make the preconditioner anew."""
    numbers = state.numbers
    aiming = (numbers.phase == AIM).astype(model.fast.dtype)
    part = aiming / aiming.sum()
    # A column that is constant in a problem depends on that of the bias there.
    fixed = 1 - read(model.free).max(0, keepdims=True)
    ridge = (read(model.penalty.weight) + fixed).astype(part.dtype)
    if sizes.shared and ridge.shape[1] > 1:
        parts = part[None, :, None]
        xp = namespace(numbers.value)
        ridge = xp.where(parts > 0, ridge * parts, 0).sum(1, keepdims=True)
    least = ridge[:, :, :-1].min(2, initial=1)
    first = namespace(numbers.owed).asarray(numbers.owed.max() < 0)
    inverse = _kernels.inverse(
        model, state.point, ridge, least, part, first, sizes=sizes, plan=plan
    )
    return state._replace(inverse=inverse, numbers=numbers._replace(owed=0 * abs(numbers.owed)))


def aim(model: Model, state: State, limits: Limits, sizes: Preconditioning) -> State:
    """Find the direction of the next step by conjugate gradients.

    They stop when the residual is a part of the gradient that falls with the decrement, or would
    certify a penalised problem. Where nothing is penalised, the direction near the optimum is the
    certificate, and is found well.
    """
    before = state.numbers
    xp = namespace(before.value)
    aiming, ending = before.phase == AIM, before.ending(limits)
    stop = _stop(model, state, limits, sizes)
    x, memory, measured = _kernels.direction(
        model, state.point, state.inverse, state.memory, stop, precise=not is_penalised(model)
    )
    _, _, slope, steps, _ = read(measured).astype(before.value.dtype)
    # A saturated model has no curvature: there is nothing but the gradient to go along.
    flat = aiming & ~((steps > 0) & (slope > 0) & (slope < float("inf")))
    direction = x if x.dtype == state.direction.dtype else read(x).astype(state.direction.dtype)
    if xp is jnp or flat.any() or not aiming.all():
        x, gradient, old = (read(v) for v in (direction, state.point.gradient, state.direction))
        slope = xp.where(flat, inner(gradient, gradient), slope)
        found = xp.where(flat[None, :, None], gradient, x)
        direction = xp.where(aiming[None, :, None], found, old).astype(old.dtype)
    close = ending | (~flat & (slope / 2 <= limits.tol * before.value))
    after = before._replace(
        slope=slope,
        size=abs(read(direction)).max((0, 2)),
        products=before.products + steps,
        phase=xp.where(~model.penalised & close, CERTIFY, SEARCH),
    )
    # The objective is not negative, and where a quadratic model falls below 0 it is not trusted.
    length = xp.where(slope > 2 * before.value, xp.minimum(_to_radius(after), 1), 1)
    length = xp.where(flat, _to_radius(after), length).astype(slope.dtype)
    after = after._replace(length=length).where(aiming, before)
    # Where there was no curvature the preconditioner is of no use elsewhere.
    owed = before.owed + xp.where(flat, sizes.price, xp.where(aiming, steps, 0)).max()
    return state._replace(direction=direction, memory=memory, numbers=after._replace(owed=owed))


def _stop(model: Model, state: State, limits: Limits, sizes: Preconditioning) -> Array:
    """When conjugate gradients stop, as a `Stop` in one array."""
    numbers = state.numbers
    xp = namespace(numbers.value)
    penalised, classes, width = model.penalised, len(state.direction), state.direction.shape[2]
    wanted = limits.tol * numbers.value
    # After a certificate that failed, what was enough before is too much.
    share = xp.where(numbers.gap < float("inf"), wanted / (4 * numbers.gap), 1)
    enough = wanted / 2 * xp.maximum(xp.minimum(share, 1), _LEAST_FORCING)
    precise = xp.where(numbers.ending(limits), float("inf"), 2 * wanted)
    forcing = xp.minimum(xp.maximum(xp.sqrt(numbers.drop) / 2, _LEAST_FORCING), _FORCING)
    # With a new preconditioner they go on; an old one is replaced once that is paid for.
    most = xp.where(numbers.owed > 0, xp.maximum(sizes.price - numbers.owed, _LEAST), _MOST)
    stop = Stop(
        precise=xp.where(penalised, -1, precise),
        forcing=forcing**2,
        enough=xp.where(penalised, enough, (wanted / (4 * DISTANCE)) ** 2 / (classes * width)),
        decrement=xp.where(penalised, enough, float("inf")),
        # The objective is not negative: where it cannot fall so far, there is hardly curvature.
        largest=_BELIEF * numbers.value,
        most=xp.where(numbers.phase == AIM, most, -1),
    )
    return xp.stack(stop).astype(model.fast.dtype)


def is_penalised(model: Model) -> bool:
    """Whether all problems are known to be penalised."""
    return isinstance(model.penalised, np.ndarray) and bool(model.penalised.all())


def next_phase(numbers: Numbers, sizes: Preconditioning) -> Any:
    """The phase that comes next."""
    phase, owed = numbers.phase.min(), numbers.owed.max()
    due = (phase == AIM) & ((owed < 0) | (owed >= sizes.price))
    return phase - due.astype(phase.dtype) * (AIM - PRECONDITION)
