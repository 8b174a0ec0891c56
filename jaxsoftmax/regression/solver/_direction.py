"""The direction of a step: a preconditioner, and conjugate gradients."""

import jax.numpy as jnp

from jaxsoftmax._runtime import Array, namespace, read
from jaxsoftmax.regression._penalty import inner
from jaxsoftmax.regression._plan import Plan, Preconditioning
from jaxsoftmax.regression.solver import _kernels
from jaxsoftmax.regression.solver._certificate import DISTANCE
from jaxsoftmax.regression.solver._cg import Stop
from jaxsoftmax.regression.solver._line_search import to_radius
from jaxsoftmax.regression.solver._state import AIM, CERTIFY, SEARCH, Limits, Model, State

_FORCING = 0.3  # the accuracy of a Newton step, far from the optimum
_LEAST_FORCING = 1e-3
_LEAST = 10  # steps of conjugate gradients that a preconditioner is kept for, though it is paid for
_MOST = 500
_BELIEF = 100.0  # a decrement relative to the objective


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
        model, state.point, state.inverse, state.memory, stop, precise=not model.all_penalised
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
    length = xp.where(slope > 2 * before.value, xp.minimum(to_radius(after), 1), 1)
    length = xp.where(flat, to_radius(after), length).astype(slope.dtype)
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
