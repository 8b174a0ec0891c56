"""Two drivers of one iteration: a Python loop over compiled kernels, and a compiled loop.

The Python loop compiles only what a run needs, can be interrupted, and sees every step; it needs
concrete arrays. Where arrays are traced, the same phases are branches of one `lax.while_loop`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._runtime import Array, namespace, precise
from jaxsoftmax.regression._data import Arguments
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._result import Fit, Status
from jaxsoftmax.regression._rows import Examples
from jaxsoftmax.regression.solver._leaving import put_back, remaining, some_of, state_of
from jaxsoftmax.regression.solver._model import Frame, Setting, make_frame, model_of
from jaxsoftmax.regression.solver._newton import init, next_phase, result, step
from jaxsoftmax.regression.solver._state import DONE, SEARCH, Limits, Model, Numbers, State


class Course(NamedTuple):
    """Where a path of penalties is: the start, the last two tables and logarithms of l2."""

    start: Array
    table: Array
    before: Array
    log: Array
    log_before: Array


def begin(
    frame: Frame, start: Params | None, l2: Array, setting: Setting
) -> tuple[Model, State, Course]:
    """Model, first state and course under the first penalty."""
    model = model_of(frame, l2, penalised=setting.penalised)
    xp = namespace(l2)
    classes, columns = len(frame.exact.target), frame.exact.shape[1]
    table = xp.zeros((classes, setting.problems, columns), l2.dtype)
    if start is not None:
        # A class absent from the fit that gave the start has bias -inf there.
        bias = xp.where(start.bias == -np.inf, 0, start.bias).astype(start.bias.dtype)
        leading = Params(
            start.weights if start.weights.ndim == 3 else start.weights[None],
            bias if bias.ndim == 2 else bias[None],
        )
        table = model.project(table + model.coordinates.table(leading))
    log = xp.broadcast_to(xp.log(l2), setting.problems)
    course = Course(table, table, table, log, xp.full_like(log, float("nan")))
    state = init(model, table, setting.sizes, uniform=setting.uniform)
    return model, state, course


def go_on(
    frame: Frame, state: State, course: Course, l2: Array, setting: Setting
) -> tuple[Model, State, Course]:
    """Model and state under the next penalty. Tables are nearly linear in log(l2), so the start is
    where the last two point to; what was learnt of the Hessian is kept."""
    table, numbers = state.point.table, state.numbers
    xp = namespace(numbers.value)
    table = np.asarray(table) if xp is np else table
    log = xp.broadcast_to(xp.log(l2), setting.problems)
    ratio = (log - course.log) / (course.log - course.log_before)
    ratio = xp.where((ratio > 0) & (ratio < 2), ratio, 0)[None, :, None]
    guess = table + ratio * (table - course.before)
    diverged = (numbers.status == int(Status.DIVERGED))[None, :, None]
    guess = xp.where(diverged, course.start, guess).astype(table.dtype)
    model = model_of(frame, l2, penalised=setting.penalised)
    new = init(model, guess, setting.sizes, uniform=False)
    fresh = new.numbers._replace(products=numbers.products, owed=numbers.owed)
    state = new._replace(inverse=state.inverse, memory=state.memory, numbers=fresh)
    return model, state, Course(course.start, table, table, log, course.log)


@np.errstate(all="ignore")  # as JAX
def solve_on_host(arguments: Arguments, l2s: Any, limits: Limits, setting: Setting) -> Fit:
    """Fits under penalties (problems or 1, penalties), driven by Python.

    Returns:
      A `Fit` of NumPy arrays with leading axes (problems, penalties).
    """
    order = np.argsort(-l2s, 1)
    frame = on_host(make_frame(arguments, setting=setting))
    start = jax.tree.map(lambda v: np.asarray(v).astype(l2s.dtype), arguments.init)
    fits: list[Fit] = []
    for l2 in np.take_along_axis(l2s, order, 1).T:
        if not fits:
            model, state, course = begin(frame, start, l2, setting)
        else:
            model, state, course = go_on(frame, state, course, l2, setting)
        state = run(model, state, limits, setting)
        fit = result(model, state, limits)
        if setting.narrow and (fit.status == Status.STALLED).any():
            fit = _refine(arguments, fit, l2, limits, setting)
        fits.append(fit)
    if len(fits) == 1:
        return jax.tree.map(lambda values: values[:, None], fits[0])
    back = np.broadcast_to(np.argsort(order, 1), (setting.problems, len(fits)))

    def stacked(*values: Any) -> Any:
        whole = np.stack(values, 1)
        return np.take_along_axis(whole, back.reshape(*back.shape, *[1] * (whole.ndim - 2)), 1)

    whole: Fit = jax.tree.map(stacked, *fits)
    return whole


def on_host(frame: Frame) -> Frame:
    """The frame with its coordinates read, in which a start and a result are computed."""
    coordinates = frame.coordinates
    small = jax.tree.map(np.asarray, coordinates._replace(rows=None))
    return frame._replace(coordinates=small._replace(rows=coordinates.rows))


def run(model: Model, state: State, limits: Limits, setting: Setting) -> State:
    """Phase after phase until every problem is done; those that are leave, where that pays."""
    whole, index = state, np.arange(setting.problems)
    while (phase := int(next_phase(state.numbers, setting.sizes))) != DONE:
        if _pays(model, state, setting) and len(some := remaining(state.numbers)) < len(index):
            whole = put_back(whole, index, state)
            model, limits = some_of(model, limits, some)
            state, index = state_of(state, some), index[some]
        try:
            state = step(phase, model, state, limits, setting)
        except BaseException as error:
            numbers = state.numbers
            error.add_note(
                f"The fit was at step {int(numbers.iterations.max())}, with an objective of "
                f"{numbers.value.max():.6g} and a gap of {numbers.gap.max():.1e}."
            )
            raise
    return state if len(index) == setting.problems else put_back(whole, index, state)


def _pays(model: Model, state: State, setting: Setting) -> bool:
    """Whether so much has been multiplied that programs for fewer problems are worth compiling."""
    if setting.problems == 1 or not isinstance(model.exact, Examples):
        return False
    examples, columns = model.exact.shape
    entries = examples * columns * len(state.moves) * setting.problems
    return bool(state.numbers.products.max() * entries >= setting.plan.leaving)


def _refine(arguments: Arguments, fit: Fit, l2: Any, limits: Limits, setting: Setting) -> Fit:
    """Go on with products in the dtype of the problem where float32 allowed no more progress."""
    setting = setting._replace(narrow=False)
    left = np.maximum(limits.max_iter - fit.iterations, 0).astype(l2.dtype)
    one = limits._replace(max_iter=left)
    new = solve_on_host(arguments._replace(init=fit.params), l2[:, None], one, setting)
    new = jax.tree.map(lambda values: values[:, 0], new)
    new = new._replace(iterations=new.iterations + fit.iterations)
    stalled = fit.status == Status.STALLED

    def chosen(new: Any, old: Any) -> Any:
        return np.where(stalled.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    refined: Fit = jax.tree.map(chosen, new, fit)
    return refined


def pack(state: State) -> Any:
    """The state with its numbers as one array: each array takes a kernel in every phase."""
    nothing: Any = None
    return state._replace(numbers=nothing), fused_stack(state.numbers)


def fused_stack(values: Any) -> Array:
    """`jnp.stack` in one kernel: XLA:CPU has one for each operand of a concatenation."""
    index = jnp.arange(len(values))[:, None]
    whole = jnp.zeros((len(values), *values[0].shape), values[0].dtype)
    for i, value in enumerate(values):
        whole = jnp.where(index == i, value[None], whole)
    return whole


def unpack(packed: Any) -> State:
    state: State = packed[0]
    return state._replace(numbers=Numbers(*packed[1]))


@precise
def solve_traced(arguments: Arguments, l2s: Array, limits: Limits, setting: Setting) -> Fit:
    """The same in one compiled loop."""
    order = jnp.argsort(-l2s, 1)
    in_order = jnp.take_along_axis(l2s, order, 1).T
    frame = make_frame(arguments, setting=setting)
    start = jax.tree.map(lambda v: v.astype(l2s.dtype), arguments.init)

    def minimise(model: Model, state: State) -> State:
        def of_phase(phase: int, packed: Any) -> Any:
            return pack(step(phase, model, unpack(packed), limits, setting))

        def proceed(packed: Any) -> Any:
            phase = next_phase(Numbers(*packed[1]), setting.sizes).astype(jnp.int32)
            branches = [partial(of_phase, i) for i in range(SEARCH, DONE)]
            return lax.switch(phase - SEARCH, branches, packed)  # CERTIFY is clamped to SEARCH

        def going(packed: Any) -> Array:
            return jnp.any(Numbers(*packed[1]).phase < DONE)

        return unpack(lax.while_loop(going, proceed, pack(state)))

    model, state, course = begin(frame, start, in_order[0], setting)
    state = minimise(model, state)
    first = result(model, state, limits)
    if len(in_order) == 1:
        return jax.tree.map(lambda values: values[:, None], first)

    def next_fit(carry: tuple[State, Course], l2: Array) -> tuple[tuple[State, Course], Fit]:
        model, state, course = go_on(frame, *carry, l2, setting)
        state = minimise(model, state)
        return (state, course), result(model, state, limits)

    _, others = lax.scan(next_fit, (state, course), in_order[1:])
    back = jnp.argsort(order, 1)

    def restored(first: Array, others: Array) -> Array:
        values = jnp.moveaxis(jnp.concatenate([first[None], others]), 0, 1)
        index = back.reshape(*back.shape, *[1] * (values.ndim - 2))
        return jnp.take_along_axis(values, index, 1)

    fits: Fit = jax.tree.map(restored, first, others)
    return fits
