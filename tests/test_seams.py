"""The seams of the solver: kinds of rows, and two drivers of one iteration."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax import Fit, Status
from jaxsoftmax.regression._plan import Plan
from jaxsoftmax.regression._rows import Dense, Examples
from jaxsoftmax.regression.solver._drivers import begin, run
from jaxsoftmax.regression.solver._model import Frame, Setting, standard_coordinates
from jaxsoftmax.regression.solver._newton import result, step
from jaxsoftmax.regression.solver._state import Limits, State
from tests.benchmarks.first_call import OURS, kernels
from tests.fits import CLASSES, EXAMPLES, L2, TOL, WIDTH, data, make_problem, small_fit, status
from tests.helpers import WIDE, X64, eps

close = partial(np.testing.assert_allclose, rtol=1e-3, atol=(2 * TOL * np.log(CLASSES) / L2) ** 0.5)
STEP = "jaxsoftmax.regression.solver._drivers.step"  # as a driver calls it


@dataclass(frozen=True)
class Blocks:
    """Rows that are a list of blocks of NumPy arrays, such as come from a disk."""

    blocks: list[Examples]
    target: Any

    kept = traceable = False
    dtype = WIDE

    @property
    def shape(self) -> tuple[int, int]:
        return EXAMPLES, self.blocks[0].shape[1]

    def offset_range(self) -> Any:
        return np.zeros(1, WIDE)

    def separable(self, offset_range: Any) -> Any:
        return np.zeros(1, WIDE)

    def while_loop(
        self, condition: Callable[..., Any], body: Callable[..., Any], value: Any
    ) -> Any:
        while condition(value):
            value = body(value)
        return value

    def total(self, f: Callable[..., Any], *arguments: Any) -> Any:
        parts = [jax.jit(f)(block, *arguments) for block in self.blocks]
        return jax.tree.map(lambda *values: sum(values[1:], start=values[0]), *parts)


def blocks_of(rows: Examples, size: int) -> Blocks:
    assert isinstance(rows.design, Dense)
    blocks = []
    for start in range(0, EXAMPLES, size):
        of = slice(start, start + size)
        block = replace(
            rows,
            design=Dense(np.asarray(rows.design.columns)[of]),
            labels=np.asarray(rows.labels)[..., of],
            share=np.asarray(rows.share)[..., of],
            target=np.asarray(rows.target),
        )
        blocks.append(block)
    return Blocks(blocks, np.asarray(rows.target))


@pytest.mark.single
@pytest.mark.parametrize("l2", [0.0, L2])
def test_a_list_of_blocks_has_the_fit_of_all_examples(l2: float) -> None:
    features, labels = data()
    expected = small_fit(features, labels, l2=l2)
    problem = make_problem(features, labels, num_classes=CLASSES)
    coordinates = standard_coordinates(features, problem.share, fit_bias=True, plan=Plan())
    columns = coordinates.standardise(features)
    rows = blocks_of(Examples.of(problem, Dense(columns), CLASSES, EXAMPLES), 25)
    sizes = Plan(factor_bytes=0).preconditioning(EXAMPLES, WIDTH, CLASSES, kept=False)
    setting = Setting(CLASSES, True, 1, None, True, l2 > 0, False, sizes, Plan())
    small = jax.tree.map(np.asarray, coordinates)
    free = np.ones((CLASSES, 1, WIDTH + 1), WIDE)
    frame = Frame(rows, None, small, free, free / CLASSES, None)  # type: ignore[arg-type]
    with np.errstate(all="ignore"):
        model, state, _ = begin(frame, None, np.full(1, l2, WIDE), setting)
        limits = Limits(np.full(1, TOL, WIDE), np.full(1, 500, WIDE))
        found = result(model, run(model, state, limits, setting), limits)
    assert found.status[0] == status(expected) == Status.CONVERGED
    close(found.params.weights[0], expected.params.weights)
    close(found.params.bias[0], expected.params.bias)
    close(found.objective[0], expected.objective, rtol=10 * TOL)


PROBLEMS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "unpenalised": lambda: {"l2": 0.0},
    "separable": lambda: {"l2": 0.0, "labels": data()[0][:, :CLASSES].argmax(-1)},
    "cut short": lambda: {"max_iter": 3},
    "below the floor": lambda: {"tol": 1e-36},
    "saturated": lambda: {"offset": np.full((EXAMPLES, CLASSES), [100.0, 0.0, 0.0], WIDE)},
    "dropped": lambda: {"sample_weight": (np.arange(EXAMPLES) >= 9).astype(WIDE)},
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_both_drivers_take_the_same_steps(name: str) -> None:
    features, labels = data()
    changed = PROBLEMS[name]()
    max_iter = changed.pop("max_iter", 500)
    # The same arguments in all cases, which then are one program.
    arrays: dict[str, Any] = {
        "features": features,
        "labels": labels,
        "l2": L2,
        "tol": TOL,
        "offset": np.zeros((EXAMPLES, CLASSES), WIDE),
        "sample_weight": np.ones(EXAMPLES, WIDE),
    }
    arrays |= changed
    host = small_fit(**arrays, max_iter=max_iter)
    traced = jax.jit(partial(small_fit, max_iter=max_iter))(**arrays)
    assert status(host) == status(traced)
    assert abs(int(host.iterations) - int(traced.iterations)) <= (0 if X64 else 1)
    if status(host) == Status.CONVERGED:
        close(traced.params.weights, host.params.weights)
    np.testing.assert_allclose(traced.objective, host.objective, rtol=1e-5, atol=10 * eps(WIDE))


@pytest.mark.slow
@pytest.mark.single
def test_vmap_outside_jit_is_driven_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = data()
    on_host: list[bool] = []

    def recorded(phase: int, model: Any, state: State, *arguments: Any) -> State:
        on_host.append(isinstance(state.numbers.value, np.ndarray))
        return step(phase, model, state, *arguments)

    monkeypatch.setattr(STEP, recorded)
    weights = jnp.ones((2, EXAMPLES), WIDE).at[0, :5].set(0)

    def fitted(weights: jax.Array) -> Fit:
        return jax.vmap(lambda own: small_fit(features, labels, sample_weight=own))(weights)

    fitted(weights)
    assert set(on_host) == {True}
    on_host.clear()
    jax.jit(fitted)(weights)
    assert set(on_host) == {False}


@pytest.mark.single
def test_an_interrupted_fit_says_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = data()
    phases: list[int] = []

    def interrupted(phase: int, *arguments: Any) -> Any:
        phases.append(phase)
        if len(phases) == 8:
            raise KeyboardInterrupt
        return step(phase, *arguments)

    monkeypatch.setattr(STEP, interrupted)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        small_fit(features, labels)
    assert len(phases) == 8
    (note,) = interrupt.value.__notes__
    assert note.startswith("The fit was at step 2, with an objective of 0.")
    monkeypatch.undo()
    assert status(small_fit(features, labels)) == Status.CONVERGED


CROSS_VALIDATION = """
from jaxsoftmax import cross_validate
call = lambda: cross_validate(images.astype(np.float32), digits, num_classes=10, l2s=[1.0, 1e-2])
"""


@pytest.mark.slow
@pytest.mark.single
@pytest.mark.parametrize(
    ("code", "most"),
    [
        (OURS["fit, digits"], 108),
        (OURS["fit inside jit, digits"], 156),
        (CROSS_VALIDATION, 170),
    ],
)
def test_first_calls_compile_few_kernels(code: str, most: int) -> None:
    """Most of a first call is compilation, 15 to 25 ms for each kernel."""
    fusing = jax.__version_info__ < (0, 11)  # newer ones fuse less
    assert kernels(code) <= most * (1 if fusing else 1.2)
