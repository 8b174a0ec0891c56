"""The verdict on a point: whether a certificate is due, and whether the fit ends with it."""

from functools import cache
from typing import Any

import numpy as np

from jaxsoftmax._runtime import Array, namespace, read
from jaxsoftmax.regression._result import Status
from jaxsoftmax.regression.solver import _kernels
from jaxsoftmax.regression.solver._certificate import bias_step, moves_of
from jaxsoftmax.regression.solver._state import (
    AIM,
    BALANCE,
    CERTIFY,
    DONE,
    SEARCH,
    Limits,
    Model,
    Numbers,
    State,
)


def judge(
    model: Model, before: Numbers, value: Array, weights_gap: Array, limits: Limits
) -> Numbers:
    """Update the numbers after an accepted step, and say which phase is next."""
    xp = namespace(value)
    started, moved = before.iterations >= 0, before.length > 0
    step = (started & moved).astype(value.dtype)
    progress = value < before.value * (1 - rounding(before.value.dtype))
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
def rounding(dtype: Any) -> float:
    """The relative change of an objective that counts as rounding."""
    return float(4 * np.finfo(dtype).eps)


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
