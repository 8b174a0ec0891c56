"""Many fits in one program: what `jax.vmap` makes of `fit`."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxsoftmax import Fit, Params, Status, fit
from jaxsoftmax._runtime import Lanes
from jaxsoftmax.regression.solver import _preconditioner
from jaxsoftmax.regression.solver import _vmapped as _batch
from tests.fits import CLASSES, EXAMPLES, L2, WIDTH, data
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


@pytest.fixture
def groups_of_three(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Problems side by side in groups whose size does not divide their number."""
    monkeypatch.setattr(_batch, "_MOST", 3)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("groups_of_three")
def test_groups_of_problems_equal_single_fits() -> None:
    features, labels = data()
    drawn = weights()
    fits = jax.vmap(lambda weight: small_fit(features, labels, sample_weight=weight))(drawn)
    assert fits.status.shape == (PROBLEMS,)
    for i in range(PROBLEMS):
        same(entry(fits, i), small_fit(features, labels, sample_weight=drawn[i]))


def test_large_problems_side_by_side_equal_single_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that begin with the Hessian of a sample, and in float32."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(600, WIDTH)), WIDE)
    scores = features @ rng.normal(size=(WIDTH, CLASSES)) + rng.gumbel(size=(600, CLASSES))
    labels = jnp.argmax(scores, 1)
    drawn = jnp.asarray(rng.multinomial(600, np.full(600, 1 / 600), size=2), WIDE)

    def fitted(weight: jax.Array, l2: jax.Array) -> Fit:
        return fit(features, labels, num_classes=CLASSES, l2=l2, sample_weight=weight, tol=TOL)

    l2s = jnp.asarray([1e-3, 0.1], WIDE)
    singles = [[fitted(weight, l2) for l2 in l2s] for weight in drawn]
    monkeypatch.setattr(_preconditioner, "_LARGE", 0)
    jax.clear_caches()
    together = jax.vmap(jax.vmap(fitted, (None, 0)), (0, None))(drawn, l2s)
    jax.clear_caches()
    assert (together.status == Status.CONVERGED).all()
    for i in range(2):
        for k in range(2):
            same(entry(together, i, k), singles[i][k])


@pytest.mark.usefixtures("no_debug_nans")
def test_a_problem_without_optimum_leaves_the_others_alone() -> None:
    features, labels = data()
    bad = weights().at[1].set(0).at[2, 0].set(jnp.nan).at[3, 1].set(-1)
    fits = jax.vmap(lambda weight: small_fit(features, labels, sample_weight=weight))(bad)
    expected = [Status.CONVERGED, *[Status.DIVERGED] * 3, Status.CONVERGED]
    np.testing.assert_array_equal(fits.status, expected)
    assert jnp.isnan(fits.params.weights[1:4]).all()
    same(entry(fits, 4), small_fit(features, labels, sample_weight=bad[4]))


def test_problems_that_lack_a_class_keep_its_place() -> None:
    features, labels = data()
    without = jnp.stack([jnp.where(labels == k, 0, 1) for k in range(CLASSES)]).astype(WIDE)
    fits = jax.vmap(lambda weight: small_fit(features, labels, sample_weight=weight))(without)
    assert (fits.status == Status.CONVERGED).all()
    for k in range(CLASSES):
        assert fits.params.bias[k, k] == -jnp.inf
        assert not fits.params.weights[k, k].any()
        same(entry(fits, k), small_fit(features, labels, sample_weight=without[k]))


def test_problems_with_more_columns_than_examples_equal_single_fits() -> None:
    rng = np.random.default_rng(0)
    features, labels = jnp.asarray(rng.normal(size=(12, 20)), WIDE), jnp.arange(12) % CLASSES
    weight = jnp.ones((2, 12), WIDE).at[1, :4].set(0)

    def fitted(weight: jax.Array) -> Fit:
        return fit(features, labels, num_classes=CLASSES, l2=L2, sample_weight=weight, tol=TOL)

    fits = jax.vmap(fitted)(weight)
    for i in range(2):
        same(entry(fits, i), fitted(weight[i]))


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

    both = jax.vmap(jax.vmap(fitted, (None, 0)), (0, None))
    program = jax.make_jaxpr(both)(jnp.ones((PROBLEMS, examples)), jnp.ones(2))
    assert max(sizes_in(program.jaxpr)) <= examples * (width + 1)


def sizes_in(jaxpr: Any) -> Iterator[int]:
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for inner in jaxprs_in_params(equation.params):
            yield from sizes_in(inner)


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


def test_the_last_problem_that_runs_pays_for_itself_alone() -> None:
    lanes = Lanes(4, "problems")
    matrix = jnp.arange(6.0).reshape(2, 3)
    vectors = jnp.arange(12.0).reshape(4, 3)

    def image(running: jax.Array, own: jax.Array) -> jax.Array:
        return lanes.of_running(lambda v: matrix @ v, running, own)

    images = jax.vmap(image, axis_name="problems")
    two, one = jnp.array([True, False, True, False]), jnp.array([False, False, True, False])
    expected = vectors @ matrix.T  # of small integers, so exact
    np.testing.assert_array_equal(images(two, vectors), expected)
    np.testing.assert_array_equal(images(one, vectors), jnp.tile(expected[2], (4, 1)))
