"""The line search of Newton's method: steps are halved until the objective falls enough.

Reference:
  Nocedal, Wright (2006), Numerical Optimization, algorithm 3.1 (backtracking).
"""

import numpy as np

from jaxsoftmax._runtime import Array, namespace, read
from jaxsoftmax.regression.solver import _kernels
from jaxsoftmax.regression.solver._state import CERTIFY, IDLE, SEARCH, Limits, Model, Numbers, State
from jaxsoftmax.regression.solver._verdict import certify, judge, rounding

_ARMIJO = 1e-4
_RADIUS = 30.0  # of a step that was too long, in standard coordinates


def search(model: Model, state: State, limits: Limits) -> State:
    """Evaluate the objective at the end of the step; accept the step, or shorten it.

    Where a certificate is due, the same pass over the examples makes it.
    """
    before = state.numbers
    xp = namespace(before.value)
    trying, certifying = before.phase == SEARCH, before.phase == CERTIFY
    bound = (
        before.value * (1 + rounding(before.value.dtype)) - _ARMIJO * before.length * before.slope
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
        precise=not model.all_penalised,
    )
    value, weights_gap, divergence, distant, accepted = read(measured)
    accepted = accepted > 0
    after = judge(model, before, value, weights_gap, limits)
    after = after.where(accepted, shorten(before))
    gap = divergence + xp.where(model.penalised, weights_gap, distant)
    certified = certify(model, before, gap, limits).where(certifying, before)
    return state._replace(point=point, numbers=after.where(trying, certified))


def shorten(before: Numbers) -> Numbers:
    """Try a shorter part of a step; 0 if it moves nothing any more, which ends the fit."""
    xp = namespace(before.value)
    length = before.length / 2
    length = xp.where(length * before.size > _radius(before), to_radius(before), length)
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


def to_radius(numbers: Numbers) -> Array:
    """The part of the direction that is as long as the radius."""
    return _radius(numbers) / namespace(numbers.size).where(numbers.size > 0, numbers.size, 1)
