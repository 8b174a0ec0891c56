r"""Newton's method for problems side by side.

A driver calls `init`, then `step` until every problem is done, then `result`. Each problem is in a
phase:

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
  Nocedal, Wright (2006), Numerical Optimization, algorithm 7.1 (line search Newton-CG).
"""

from typing import Any

from jaxsoftmax._runtime import Array, namespace, read
from jaxsoftmax.regression._objective import Point
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._plan import Preconditioning
from jaxsoftmax.regression._result import Fit, Status
from jaxsoftmax.regression.solver._direction import aim, precondition
from jaxsoftmax.regression.solver._line_search import search
from jaxsoftmax.regression.solver._model import Setting
from jaxsoftmax.regression.solver._state import (
    AIM,
    BALANCE,
    PRECONDITION,
    SEARCH,
    Limits,
    Model,
    Numbers,
    State,
)
from jaxsoftmax.regression.solver._verdict import balance


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


def step(phase: int, model: Model, state: State, limits: Limits, setting: Setting) -> State:
    """Advance the problems that are in a phase."""
    if phase <= SEARCH:
        return search(model, state, limits)
    if phase == BALANCE:
        return balance(model, state)
    if phase == PRECONDITION:
        return precondition(model, state, setting.sizes, setting.plan)
    return aim(model, state, limits, setting.sizes)


def next_phase(numbers: Numbers, sizes: Preconditioning) -> Any:
    """The phase that comes next."""
    phase, owed = numbers.phase.min(), numbers.owed.max()
    due = (phase == AIM) & ((owed < 0) | (owed >= sizes.price))
    return phase - due.astype(phase.dtype) * (AIM - PRECONDITION)


def result(model: Model, state: State, limits: Limits) -> Fit:
    """The fits, with leading problems."""
    numbers = state.numbers
    xp = namespace(numbers.value)
    value, table, gradient = numbers.value, read(state.point.table), read(state.point.gradient)
    present = read(model.exact.target) > 0
    params = model.coordinates.params(model.project(table))
    present = present[:, :, 0].T
    # Under jit an invalid tolerance is found here.
    status = xp.where(limits.tol > 0, numbers.status, int(Status.DIVERGED))
    poison = xp.where(status == int(Status.DIVERGED), float("nan"), 0).astype(value.dtype)
    bias = xp.where(present, params.bias, -float("inf")) + poison[:, None]
    gap = numbers.gap / xp.where(value == 0, 1, value) + poison
    return Fit(
        params=Params(params.weights + poison[:, None, None], bias.astype(value.dtype)),
        objective=value,
        gap=gap.astype(value.dtype),
        gradient_norm=model.coordinates.gradient_norm(gradient),
        iterations=numbers.iterations.astype("int32"),
        status=status.astype("int32"),
    )
