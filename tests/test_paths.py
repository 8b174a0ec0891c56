"""Fits along a path of penalties."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jaxsoftmax import Fit, Params, Status, fit, fit_path, l2_grid, linear_logits
from tests.fits import CLASSES, EXAMPLES, WIDTH, data
from tests.fits import small_fit as fit_of_examples
from tests.helpers import WIDE

DOUBLE = jnp.float64 == WIDE
TOL = 1e-13 if DOUBLE else 1e-6  # of parameters the square root of it is left
L2S = np.array([1e-2, 10.0, 1e-4, 0.3])  # in no order


small_fit = partial(fit_of_examples, tol=TOL)


def small_path(features: jax.Array, labels: jax.Array, **kwargs: Any) -> Fit:
    defaults: dict[str, Any] = {"num_classes": CLASSES, "l2s": L2S, "tol": TOL}
    return fit_path(features, labels, **(defaults | kwargs))


def same(actual: Fit, expected: Fit, atol: float = 1e-6 if DOUBLE else 3e-3) -> None:
    np.testing.assert_array_equal(actual.status, expected.status)
    for one, other in zip(actual.params, expected.params, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)
    np.testing.assert_allclose(actual.objective, expected.objective, rtol=1e-12 if DOUBLE else 2e-6)


def entry(fits: Fit, *index: int) -> Fit:
    result: Fit = jax.tree.map(lambda values: values[index], fits)
    return result


def test_a_path_equals_single_fits_in_any_order() -> None:
    features, labels = data()
    path = small_path(features, labels)
    assert (path.status == Status.CONVERGED).all()
    assert (path.gap <= TOL).all()
    for i, l2 in enumerate(L2S):
        same(entry(path, i), small_fit(features, labels, l2=l2))


def test_a_path_equals_scikit_learn() -> None:
    features, labels = (np.asarray(value) for value in data())
    path = small_path(*data())
    for i, l2 in enumerate(L2S):
        model = LogisticRegression(C=1 / (l2 * EXAMPLES), solver="newton-cholesky", tol=1e-9)
        model.fit(features.astype(np.float64), labels)
        atol = 1e-6 if DOUBLE else 3e-3
        np.testing.assert_allclose(path.params.weights[i], model.coef_, atol=atol)
        np.testing.assert_allclose(path.params.bias[i], model.intercept_, atol=atol)


@pytest.mark.single
def test_a_path_is_compiled_once() -> None:
    features, labels = data()
    traces = 0

    @jax.jit
    def fitted(l2s: jax.Array) -> Fit:
        nonlocal traces
        traces += 1
        return small_path(features, labels, l2s=l2s)

    first = fitted(jnp.asarray(L2S, WIDE))
    second = fitted(jnp.asarray(L2S[::-1].copy(), WIDE))
    assert traces == 1
    same(entry(first, 0), entry(second, -1))


@pytest.mark.usefixtures("no_debug_nans")
def test_of_invalid_penalties_only_their_own_fits_are_lost() -> None:
    features, labels = data()
    l2s = jnp.asarray([1.0, -1.0, jnp.nan, 0.1], WIDE)
    path = jax.jit(lambda l2s: small_path(features, labels, l2s=l2s))(l2s)
    expected = [Status.CONVERGED, Status.DIVERGED, Status.DIVERGED, Status.CONVERGED]
    np.testing.assert_array_equal(path.status, expected)
    same(entry(path, 3), small_fit(features, labels, l2=0.1))


def test_a_path_may_end_without_penalty_on_separable_data() -> None:
    features, _ = data()
    labels = jnp.argmax(features[:, :CLASSES], 1)
    path = small_path(features, labels, l2s=np.array([0.0, 1e-3, 1.0, 1e-6]))
    expected = [Status.SEPARABLE, *[Status.CONVERGED] * 3]
    np.testing.assert_array_equal(path.status, expected)


def test_a_path_with_more_columns_than_examples_equals_single_fits() -> None:
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(12, 20)), WIDE)
    labels = jnp.arange(12) % CLASSES
    path = small_path(features, labels)
    for i, l2 in enumerate(L2S):
        same(entry(path, i), fit(features, labels, num_classes=CLASSES, l2=l2, tol=TOL))


@pytest.mark.slow
@pytest.mark.single
def test_derivatives_of_a_path_are_those_of_single_fits() -> None:
    features, labels = data()

    def of_path(features: jax.Array) -> jax.Array:
        return jnp.sum(small_path(features, labels).params.weights ** 2, (1, 2))

    def of_single_fit(features: jax.Array, l2: float) -> jax.Array:
        return jnp.sum(small_fit(features, labels, l2=l2).params.weights ** 2)

    # In reverse and forward mode.
    forward = jax.jvp(of_path, (features,), (jnp.ones_like(features),))[1]
    slopes = jax.jacrev(of_path)(features)
    for i, l2 in enumerate(L2S):
        expected = jax.grad(of_single_fit)(features, l2)
        rtol = 1e-5 if DOUBLE else 1e-2
        atol = rtol * float(jnp.abs(expected).max())
        np.testing.assert_allclose(slopes[i], expected, rtol=rtol, atol=atol)
        np.testing.assert_allclose(forward[i], expected.sum(), rtol=rtol, atol=10 * atol)


def test_the_grid_begins_where_weights_move_no_logit() -> None:
    features, labels = data()
    scaled = features * jnp.asarray([1e-3, 1.0, 30.0, 1e4], WIDE) + 7
    for columns in (features, scaled):
        l2s = l2_grid(columns, labels, num_classes=CLASSES, num=9)
        np.testing.assert_allclose(l2s[:-1] / l2s[1:], 10, rtol=1e-4)
        path = small_path(columns, labels, l2s=l2s[:2])
        spread = [jnp.std(linear_logits(entry(path, i).params, columns), 0).max() for i in range(2)]
        assert 0.009 < spread[0] <= 0.0101
        assert 0.08 < spread[1] <= 0.11


def test_the_grid_of_a_model_without_bias_counts_the_means_of_the_columns() -> None:
    features, labels = data()
    l2s = l2_grid(features + 7, labels, num_classes=CLASSES, num=9, fit_bias=False)
    path = small_path(features + 7, labels, l2s=l2s[:1], fit_bias=False)
    logits = linear_logits(entry(path, 0).params, features + 7)
    size = jnp.sqrt(jnp.mean(logits**2, 0)).max()
    assert 0.009 < size <= 0.0101


@pytest.mark.parametrize("size", [1e-15, 1e-10, 1e10, 1e15])
def test_the_grid_follows_the_scale_of_the_features(size: float) -> None:
    features, labels = data()
    expected = l2_grid(features, labels, num_classes=CLASSES, num=3)
    scaled = l2_grid(size * features, labels, num_classes=CLASSES, num=3)
    np.testing.assert_allclose(scaled[:2], expected[:2] * size**2, rtol=1e-5)


def test_the_grid_is_the_default() -> None:
    features, labels = data()
    weight = jnp.asarray(np.random.default_rng(1).integers(0, 3, EXAMPLES), WIDE)
    l2s = l2_grid(features, labels, num_classes=CLASSES, sample_weight=weight)
    assert l2s.shape == (25,)
    path = small_path(features, labels, l2s=None, sample_weight=weight)
    assert path.status.shape == (25,)
    expected = small_path(features, labels, l2s=l2s, sample_weight=weight)
    np.testing.assert_array_equal(path.objective, expected.objective)


@pytest.mark.single
def test_the_grid_takes_probability_labels_and_features_that_say_nothing() -> None:
    features, labels = data()
    probabilities = jax.nn.one_hot(labels, CLASSES)
    kwargs: dict[str, Any] = {"num_classes": CLASSES, "num": 3}
    expected = l2_grid(features, labels, **kwargs)
    np.testing.assert_allclose(l2_grid(features, probabilities, **kwargs), expected, rtol=1e-6)
    nothing = l2_grid(jnp.ones_like(features), labels, **kwargs)
    assert jnp.isfinite(nothing).all()
    assert l2_grid(features, labels, num_classes=CLASSES, num=1).shape == (1,)


@pytest.mark.single
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"l2s": 1.0}, ValueError, r"l2s must have shape \(penalties,\), got shape \(\)"),
        ({"l2s": []}, ValueError, r"l2s must have shape \(penalties,\), got shape \(0,\)"),
        ({"l2s": [1.0, -2.0]}, ValueError, "l2s must be at least 0, got -2.0"),
        ({"l2s": [1.0, np.nan]}, ValueError, "l2s must be at least 0, got nan"),
        ({"solver": "sgd"}, ValueError, "solver must be one of"),
        ({"init": Params(jnp.zeros((2, WIDTH)), jnp.zeros(2))}, ValueError, "init.weights"),
    ],
)
@pytest.mark.usefixtures("no_jaxtyping", "no_debug_nans")
def test_bad_arguments_of_a_path(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        small_path(*data(), **changed)


@pytest.mark.single
@pytest.mark.usefixtures("no_jaxtyping", "no_debug_nans")
def test_bad_arguments_of_the_grid() -> None:
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        l2_grid(*data(), num_classes=CLASSES, num=0)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
        l2_grid(*data(), num_classes=2)
    features, labels = data()
    no_flag: Any = "yes"
    with pytest.raises(TypeError, match="fit_bias must be True or False, got 'yes'"):
        l2_grid(features, labels, num_classes=CLASSES, fit_bias=no_flag)
    words: Any = ["cat"] * len(features)  # of which the message has the first ones
    with pytest.raises(TypeError, match=r"an array of numbers, got \['cat'.*\.\.\.\]"):
        l2_grid(features, words, num_classes=CLASSES)
