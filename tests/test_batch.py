"""Many fits in one program: what `jax.vmap` makes of `fit`."""

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax import Fit, Params, Status, fit
from jaxsoftmax.regression._plan import Plan
from jaxsoftmax.regression.solver import _newton
from jaxsoftmax.regression.solver._state import State
from tests.fits import CLASSES, EXAMPLES, L2, WIDTH, data, planned_fit
from tests.helpers import WIDE
from tests.test_paths import DOUBLE, TOL, entry, same, small_fit

pytestmark = pytest.mark.slow

PROBLEMS = 5


def weights(seed: int = 0) -> jax.Array:
    """Bootstrap replicates: how often each example was drawn."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(EXAMPLES, np.full(EXAMPLES, 1 / EXAMPLES), size=PROBLEMS)
    return jnp.asarray(drawn, WIDE)


def labels_of_problems() -> jax.Array:
    return jnp.stack([data(seed)[1] for seed in range(PROBLEMS)])


def offsets() -> jax.Array:
    rng = np.random.default_rng(3)
    return jnp.asarray(rng.normal(size=(PROBLEMS, EXAMPLES, CLASSES)), WIDE)


def starts() -> Params:
    rng = np.random.default_rng(4)
    return Params(
        jnp.asarray(rng.normal(size=(PROBLEMS, CLASSES, WIDTH)), WIDE),
        jnp.asarray(rng.normal(size=(PROBLEMS, CLASSES)), WIDE),
    )


VARIED: dict[str, Callable[[], dict[str, Any]]] = {
    "weights": lambda: {"sample_weight": weights()},
    "labels and weights": lambda: {"labels": labels_of_problems(), "sample_weight": weights()},
    "offsets": lambda: {"offset": offsets()},
    "starts": lambda: {"init": starts()},
    "tolerances": lambda: {"tol": jnp.logspace(-2, np.log10(TOL), PROBLEMS, dtype=WIDE)},
    "weights and penalties": lambda: {
        "sample_weight": weights(),
        "l2": jnp.logspace(-3, 0, PROBLEMS, dtype=WIDE),
    },
    "features": lambda: {"features": jnp.stack([data(seed)[0] for seed in range(PROBLEMS)])},
}


@pytest.mark.single
@pytest.mark.parametrize("varied", VARIED)
def test_problems_side_by_side_equal_single_fits(varied: str) -> None:
    features, labels = data()
    arrays = {"features": features, "labels": labels}

    def fitted(own: dict[str, Any]) -> Fit:
        return small_fit(**(arrays | own))

    values = VARIED[varied]()
    fits = jax.vmap(fitted)(values)
    assert (fits.status == Status.CONVERGED).all()
    for i in range(PROBLEMS):
        single = fitted(jax.tree.map(operator.itemgetter(i), values))
        if varied == "tolerances":
            tol = values["tol"][i]
            assert abs(fits.objective[i] - single.objective) <= tol * single.objective
        else:
            same(entry(fits, i), single)


def test_paths_side_by_side_equal_single_fits_whatever_the_order_of_vmap() -> None:
    features, labels = data()
    l2s = jnp.asarray([0.3, 1e-3, 3.0], WIDE)
    drawn = weights()

    def fitted(weight: jax.Array, l2: jax.Array) -> Fit:
        return small_fit(features, labels, sample_weight=weight, l2=l2)

    penalties_inside = jax.vmap(jax.vmap(fitted, (None, 0)), (0, None))(drawn, l2s)
    weights_inside = jax.vmap(jax.vmap(fitted, (0, None)), (None, 0))(drawn, l2s)
    own_penalties = jax.vmap(jax.vmap(fitted, (None, 0)))(drawn, jnp.tile(l2s, (PROBLEMS, 1)))
    for i in range(PROBLEMS):
        for k, l2 in enumerate(l2s):
            single = fitted(drawn[i], l2)
            same(entry(penalties_inside, i, k), single)
            same(entry(weights_inside, k, i), single)
            same(entry(own_penalties, i, k), single)


@pytest.mark.single
def test_groups_of_problems_equal_single_fits() -> None:
    """Groups whose size does not divide their number."""
    features, labels = data()
    drawn = weights()

    def fitted(weight: jax.Array) -> Fit:
        return planned_fit(Plan(lanes=3), features, labels, sample_weight=weight, tol=TOL)

    fits = jax.vmap(fitted)(drawn)
    assert fits.status.shape == (PROBLEMS,)
    traced = jax.jit(jax.vmap(fitted))(drawn)
    for i in range(PROBLEMS):
        single = small_fit(features, labels, sample_weight=drawn[i])
        same(entry(fits, i), single)
        same(entry(traced, i), single)


@pytest.mark.single
@pytest.mark.parametrize("varied", ["weights", "labels and weights", "offsets", "starts"])
def test_problems_that_are_done_leave(varied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = data()
    arrays = {"features": features, "labels": labels}
    values = VARIED[varied]() | VARIED["tolerances"]()
    l2s = jnp.asarray([0.3, 1e-3], WIDE)
    sizes: list[int] = []

    def recorded(phase: int, model: Any, state: State, *arguments: Any) -> State:
        sizes.append(len(state.numbers.phase))
        return _newton.step(phase, model, state, *arguments)

    monkeypatch.setattr("jaxsoftmax.regression.solver._drivers.step", recorded)

    def fitted(own: dict[str, Any], l2: jax.Array) -> Fit:
        plan = Plan(leaving=0, remembered=0)
        return planned_fit(plan, **(arrays | own), l2=l2)

    fits = jax.vmap(jax.vmap(fitted, (None, 0)), (0, None))(values, l2s)
    monkeypatch.undo()
    assert {4, PROBLEMS} <= set(sizes) <= {1, 2, 4, PROBLEMS}
    assert (fits.status == Status.CONVERGED).all()
    for i in range(PROBLEMS):
        for k, l2 in enumerate(l2s):
            own = jax.tree.map(operator.itemgetter(i), values)
            single = small_fit(**(arrays | own), l2=l2)
            assert abs(fits.objective[i, k] - single.objective) <= own["tol"] * single.objective
    same(entry(fits, PROBLEMS - 1, 0), small_fit(**(arrays | own), l2=l2s[0]))


def test_problems_with_products_in_float32_equal_single_fits() -> None:
    features, labels = data()
    drawn, l2s = weights()[:2], jnp.asarray([1e-3, 0.1], WIDE)

    def fitted(weight: jax.Array, l2: jax.Array) -> Fit:
        narrow = Plan(narrow=0, remembered=0)
        return planned_fit(narrow, features, labels, sample_weight=weight, l2=l2, tol=TOL)

    together = jax.vmap(jax.vmap(fitted, (None, 0)), (0, None))(drawn, l2s)
    for i in range(2):
        for k in range(2):
            single = small_fit(features, labels, sample_weight=drawn[i], l2=l2s[k])
            same(entry(together, i, k), single)


@pytest.mark.usefixtures("no_debug_nans")
def test_a_problem_without_optimum_leaves_the_others_alone() -> None:
    features, labels = data()
    bad = weights().at[1].set(0).at[2, 0].set(jnp.nan).at[3, 1].set(-1)
    fits = jax.vmap(lambda weight: small_fit(features, labels, sample_weight=weight))(bad)
    expected = [Status.CONVERGED, *[Status.DIVERGED] * 3, Status.CONVERGED]
    np.testing.assert_array_equal(fits.status, expected)
    assert jnp.isnan(fits.params.weights[1:4]).all()
    same(entry(fits, 4), small_fit(features, labels, sample_weight=bad[4]))


@pytest.mark.single
def test_problems_that_lack_a_class_keep_its_place() -> None:
    features, labels = data()
    without = jnp.stack([jnp.where(labels == k, 0, 1) for k in range(CLASSES)]).astype(WIDE)
    fits = jax.vmap(lambda weight: small_fit(features, labels, sample_weight=weight))(without)
    assert (fits.status == Status.CONVERGED).all()
    for k in range(CLASSES):
        assert fits.params.bias[k, k] == -jnp.inf
        assert not fits.params.weights[k, k].any()
        same(entry(fits, k), small_fit(features, labels, sample_weight=without[k]))


@pytest.mark.single
def test_problems_with_more_columns_than_examples_equal_single_fits() -> None:
    rng = np.random.default_rng(0)
    features, labels = jnp.asarray(rng.normal(size=(12, 20)), WIDE), jnp.arange(12) % CLASSES
    weight = jnp.ones((2, 12), WIDE).at[1, :4].set(0)

    def fitted(weight: jax.Array) -> Fit:
        return fit(features, labels, num_classes=CLASSES, l2=L2, sample_weight=weight, tol=TOL)

    fits = jax.vmap(fitted)(weight)
    for i in range(2):
        same(entry(fits, i), fitted(weight[i]))


@pytest.mark.single
@pytest.mark.parametrize("l2", [L2, 0.0])
def test_a_column_that_is_constant_in_one_problem_gets_weight_0_there(l2: float) -> None:
    features, labels = data()
    features = features.at[:, 1].set(jnp.where(jnp.arange(EXAMPLES) < 20, 1, 0))
    weight = jnp.ones((2, EXAMPLES), WIDE).at[1, :20].set(0)
    fits = jax.vmap(lambda w: small_fit(features, labels, sample_weight=w, l2=l2))(weight)
    assert fits.params.weights[0, :, 1].all()
    assert not fits.params.weights[1, :, 1].any()
    for i in range(2):
        same(entry(fits, i), small_fit(features, labels, sample_weight=weight[i], l2=l2), 1e-2)


@pytest.mark.single
def test_narrower_features_may_be_filled_up_with_zeros() -> None:
    """As layers of different widths are, to be fitted in one program."""
    features, labels = data()
    narrow = features.at[:, 2:].set(0)
    fits = jax.vmap(lambda features: small_fit(features, labels))(jnp.stack([features, narrow]))
    single = fit(features[:, :2], labels, num_classes=CLASSES, l2=L2, tol=TOL)
    assert not fits.params.weights[1, :, 2:].any()
    atol = 1e-6 if DOUBLE else 3e-3
    np.testing.assert_allclose(fits.params.weights[1, :, :2], single.params.weights, atol=atol)


@pytest.mark.single
def test_the_features_are_not_copied_for_each_problem() -> None:
    """Neither for weights nor for penalties: no array has problems, examples and features."""
    examples, width = 600, 40
    features, labels = jnp.ones((examples, width)), jnp.arange(examples) % CLASSES

    def fitted(weight: jax.Array, l2: jax.Array) -> Fit:
        return fit(features, labels, num_classes=CLASSES, sample_weight=weight, l2=l2)

    both = jax.jit(jax.vmap(jax.vmap(fitted, (None, 0)), (0, None)))
    text = both.lower(jnp.ones((PROBLEMS, examples)), jnp.ones(2)).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)f\d+>", text)
    sizes = [math.prod(map(int, shape.split("x")[:-1])) for shape in shapes]
    assert examples * width <= max(sizes) <= examples * (width + 1)


@pytest.mark.single
def test_derivatives_of_paths_side_by_side_are_those_of_single_fits() -> None:
    features, labels = data()
    l2s = jnp.asarray([0.3, 1e-2], WIDE)

    def size(weight: jax.Array, l2: jax.Array) -> jax.Array:
        fit = small_fit(features, labels, sample_weight=weight, l2=l2)
        return jnp.sum(fit.params.weights**2)

    slope = jax.grad(size, (0, 1))
    found = jax.vmap(jax.vmap(slope, (None, 0)), (0, None))(weights()[:2], l2s)
    for i in range(2):
        for k in range(2):
            for one, other in zip(
                (part[i, k] for part in found), slope(weights()[i], l2s[k]), strict=True
            ):
                rtol = 1e-5 if DOUBLE else 2e-2
                atol = rtol * float(jnp.abs(other).max())
                np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)
