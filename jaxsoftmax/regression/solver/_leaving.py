"""Problems that are done leave those side by side: what is computed of them is thrown away."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxsoftmax._runtime import Array
from jaxsoftmax.regression._objective import Point
from jaxsoftmax.regression._penalty import Ridge
from jaxsoftmax.regression.solver._state import DONE, Limits, Model, Numbers, State

# The axis of problems.
_AXES = State(Point(1, 1, 1), 1, 1, 1, 3, Numbers(*[0] * len(Numbers._fields)))


def remaining(numbers: Numbers) -> Array:
    """The problems that go on, and as many others as make their number a power of two."""
    done = numbers.phase == DONE
    size = 1 << int((~done).sum() - 1).bit_length()
    return np.argsort(done, kind="stable")[:size]


def state_of(state: State, index: Array) -> State:
    """The state of some problems."""
    take = partial(_take, index)
    return jax.tree.map(take, state, _AXES, is_leaf=lambda v: v is None)


def put_back(whole: State, index: Array, part: State) -> State:
    """The state of all problems with that of some in it, except for their probabilities."""
    whole, part = (s._replace(point=s.point._replace(probabilities=None)) for s in (whole, part))

    def put(old: Any, new: Any, axis: int) -> Any:
        if old is None or old.shape[axis] == 1:
            return new
        if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
            old = old.copy()
            old[(slice(None),) * axis + (index,)] = new
            return old
        return _scatter(old, new, index, axis)

    return jax.tree.map(put, whole, part, _AXES, is_leaf=lambda v: v is None)


def some_of(model: Model, limits: Limits, index: Array) -> tuple[Model, Limits]:
    """The model and the limits of some problems."""
    take = partial(_take, index)

    def rows(of: Any) -> Any:
        return replace(
            of,
            labels=take(of.labels, 1),
            share=take(of.share, 1),
            offset=take(of.offset, 1),
            target=take(of.target, 1),
        )

    some = model._replace(
        exact=rows(model.exact),
        narrow=None if model.narrow is None else rows(model.narrow),
        penalty=Ridge(*(take(v, 1) for v in model.penalty)),
        penalised=take(model.penalised, 0),
        separable=take(model.separable, 0),
        offset_range=take(model.offset_range, 0),
        free=take(model.free, 1),
        centre=take(model.centre, 1),
    )
    return some, Limits(*(take(v, 0) for v in limits))


def _take(index: Array, values: Any, axis: int) -> Any:
    if values is None or values.shape[axis] == 1:
        return values
    if isinstance(values, np.ndarray):
        return values.take(index, axis)
    return _gather(values, index, axis)


@partial(jax.jit, static_argnums=2)
def _gather(values: Array, index: Array, axis: int) -> Array:
    return values.take(index, axis)


@partial(jax.jit, static_argnums=3)
def _scatter(whole: Array, part: Array, index: Array, axis: int) -> Array:
    return whole.at[(slice(None),) * axis + (index,)].set(part)
