"""Cross-validation."""

from functools import partial
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from jaxsoftmax import CrossValidation, Status, cross_validate, l2_grid, stratified_folds
from jaxsoftmax.regression._folds import choose
from tests.fits import CLASSES, EXAMPLES, data
from tests.helpers import WIDE
from tests.test_paths import DOUBLE, L2S, TOL, entry, same, small_fit

pytestmark = pytest.mark.slow

FOLDS = 3
ATOL = 1e-5 if DOUBLE else 3e-3


def small_cv(features: Any, labels: Any, **kwargs: Any) -> CrossValidation:
    defaults: dict[str, Any] = {"num_classes": CLASSES, "l2s": L2S, "tol": TOL, "folds": FOLDS}
    return cross_validate(features, labels, **(defaults | kwargs))


def ids() -> NDArray[Any]:
    return np.array(stratified_folds(data()[1], FOLDS))


def masks() -> NDArray[Any]:
    return np.asarray(ids() == np.arange(FOLDS)[:, None]).astype(np.int8)


def test_fits_and_scores_equal_those_of_scikit_learn() -> None:
    features, labels = (np.asarray(value) for value in data())
    result = small_cv(features, labels)
    assert (result.fold_fits.status == Status.CONVERGED).all()
    for fold in range(FOLDS):
        held_out = ids() == fold
        for i, l2 in enumerate(L2S):
            x, y = features[~held_out].astype(np.float64), labels[~held_out]
            model = LogisticRegression(C=1 / (l2 * len(y)), solver="newton-cholesky", tol=1e-9)
            model.fit(x, y)
            np.testing.assert_allclose(
                result.fold_fits.params.weights[fold, i], model.coef_, atol=ATOL
            )
            x, y = features[held_out], labels[held_out]
            p = model.predict_proba(x)
            np.testing.assert_allclose(result.log_loss[fold, i], log_loss(y, p), rtol=ATOL)
            np.testing.assert_allclose(result.accuracy[fold, i], model.score(x, y), rtol=1e-6)
            brier = np.mean(np.sum((p - np.eye(CLASSES)[y]) ** 2, 1))
            np.testing.assert_allclose(result.brier[fold, i], brier, rtol=ATOL)
    assert result.best == result.log_loss.mean(0).argmin()


def test_the_fits_of_all_examples_are_single_fits() -> None:
    features, labels = data()
    result = small_cv(features, labels)
    for i, l2 in enumerate(L2S):
        same(entry(result.path, i), small_fit(features, labels, l2=l2))
    chosen = result.fit()
    np.testing.assert_array_equal(chosen.params.weights, result.path.params.weights[result.best])
    simpler = result.fit(one_standard_error=True)
    index = result.one_standard_error
    np.testing.assert_array_equal(simpler.params.weights, result.path.params.weights[index])
    assert result.l2s[index] >= result.l2s[result.best]


@pytest.mark.single
def test_folds_may_be_a_number_ids_or_masks() -> None:
    features, labels = data()
    by_number = small_cv(features, labels)
    for folds in (ids(), jnp.asarray(ids()), masks(), masks().astype(bool), masks() * 1.0):
        np.testing.assert_array_equal(
            small_cv(features, labels, folds=folds).log_loss, by_number[3]
        )
    traced = jax.jit(lambda folds: small_cv(features, labels, folds=folds).log_loss)(masks())
    # The two drivers round differently, and a gap of TOL leaves logits off by its square root.
    np.testing.assert_allclose(traced, by_number.log_loss, rtol=1e-4)


@pytest.mark.single
def test_an_example_in_neither_part_counts_nowhere() -> None:
    features, labels = data()
    left_out = masks()
    left_out[1, :7] = -1
    result = small_cv(features, labels, folds=left_out)
    weight = jnp.ones(EXAMPLES, WIDE).at[:7].set(0)
    without = small_cv(features, labels, folds=masks(), sample_weight=weight)
    np.testing.assert_allclose(result.log_loss[1], without.log_loss[1], rtol=1e-4)
    np.testing.assert_allclose(result.accuracy[1], without.accuracy[1], rtol=1e-6)
    whole = small_cv(features, labels)
    same(entry(result.path, 0), entry(whole.path, 0))


@pytest.mark.single
def test_an_example_without_a_fold_is_always_fitted() -> None:
    features, labels = data()
    folds = ids()
    folds[:4] = -1
    result = small_cv(features, labels, folds=folds)
    for fold in range(FOLDS):
        weight = jnp.asarray(folds != fold, WIDE)
        single = small_fit(features, labels, l2=L2S[0], sample_weight=weight)
        same(entry(result.fold_fits, fold, 0), single)


def test_weights_equal_repeated_examples() -> None:
    features, labels = (np.asarray(value) for value in data())
    weight = np.random.default_rng(1).integers(0, 3, EXAMPLES)
    weighted = small_cv(features, labels, folds=ids(), sample_weight=weight)
    repeated = small_cv(
        np.repeat(features, weight, 0), np.repeat(labels, weight), folds=np.repeat(ids(), weight)
    )
    for name in ("log_loss", "accuracy", "brier"):
        one, other = getattr(weighted, name), getattr(repeated, name)
        np.testing.assert_allclose(one, other, rtol=1e-6 if DOUBLE else 1e-3)
    assert weighted.best == repeated.best


@pytest.mark.single
def test_probability_labels_of_one_class_equal_classes() -> None:
    features, labels = data()
    classes = small_cv(features, labels)
    probabilities = small_cv(features, jax.nn.one_hot(labels, CLASSES, dtype=WIDE))
    for name in ("log_loss", "accuracy", "brier"):
        one, other = getattr(probabilities, name), getattr(classes, name)
        np.testing.assert_allclose(one, other, rtol=1e-6 if DOUBLE else 1e-3)


def test_a_fold_that_has_not_seen_a_class_gives_it_probability_0() -> None:
    features, labels = data()
    folds = np.where(labels == 0, 0, ids())  # the first fold holds out all of class 0
    result = small_cv(features, labels, folds=folds)
    assert (result.fold_fits.params.bias[0, :, 0] == -jnp.inf).all()
    assert (result.log_loss[0] == jnp.inf).all()
    assert jnp.isfinite(result.log_loss[1:]).all()
    assert (result.accuracy[0] < 1).all()
    assert jnp.isfinite(result.brier).all()
    # The choice is by the examples of classes that were seen.
    seen = np.asarray(labels)[folds == 0] != 0
    x, y = np.asarray(features)[folds == 0][seen], np.asarray(labels)[folds == 0][seen]
    losses = []
    for i in range(len(L2S)):
        weights, bias = entry(result.fold_fits, 0, i).params
        logits = np.asarray(x @ weights.T + bias)
        own = np.take_along_axis(logits, y[:, None], 1)[:, 0]
        losses.append(np.mean(np.logaddexp.reduce(logits, 1) - own))
    means = (np.asarray(losses) + np.asarray(result.log_loss[1:]).sum(0)) / FOLDS
    assert result.best == means.argmin()


@pytest.mark.single
def test_the_default_penalties_are_those_of_the_grid() -> None:
    features, labels = data()
    result = small_cv(features, labels, l2s=None, folds=2)
    np.testing.assert_array_equal(result.l2s, l2_grid(features, labels, num_classes=CLASSES))
    assert result.log_loss.shape == (2, 25)


@pytest.mark.single
@pytest.mark.parametrize("xp", [np, jnp])
def test_the_one_standard_error_rule(xp: Any) -> None:
    chosen = partial(choose, eps=1e-7)
    losses = xp.array([[0.5, 0.30, 0.20, 0.4], [0.5, 0.32, 0.40, 0.4]])  # means .5 .31 .30 .4
    falling = xp.array([4.0, 3.0, 2.0, 1.0])
    # The error of the best is 0.1, so that 0.31 and 0.4 (up to rounding above) are within it.
    assert chosen(losses, falling) == (2, 1)
    assert chosen(losses[:, ::-1], falling[::-1]) == (1, 2)
    assert chosen(losses[:1], falling)[1] == 2  # one fold has no error
    # Nor does a fold count that holds out nothing but classes that it has not seen.
    unseen = xp.concatenate([losses, xp.full((1, 4), float("inf"))])
    assert chosen(unseen, falling) == (2, 1)
    # Of equal means the strongest penalty, whatever their order.
    equal = xp.array([[0.3, 0.2, 0.2, 0.2]])
    assert chosen(equal, falling)[0] == 1
    assert chosen(equal, falling[::-1])[0] == 3
    assert chosen(xp.full((2, 4), float("inf")), falling) == (0, 0)
    assert chosen(xp.array([[0.3, -float("inf"), 0.2, 0.2]] * 2), falling) == (1, 1)


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
def test_a_penalty_that_is_invalid_is_not_chosen_and_has_no_score() -> None:
    features, labels = data()
    l2s = jnp.asarray([-1.0, 0.3, 1e-2, jnp.nan], WIDE)
    result = jax.jit(lambda l2s: small_cv(features, labels, l2s=l2s))(l2s)
    for name in ("log_loss", "accuracy", "brier"):
        scores = getattr(result, name)
        assert jnp.isnan(scores[:, [0, 3]]).all()
        assert jnp.isfinite(scores[:, 1:3]).all()
    assert int(result.best) in (1, 2)
    assert int(result.one_standard_error) in (1, 2)


@pytest.mark.single
def test_many_divisions_into_folds_in_one_program() -> None:
    features, labels = data()
    keys = jax.random.split(jax.random.key(0), 2)

    def judged(key: jax.Array) -> CrossValidation:
        folds = stratified_folds(labels, FOLDS, key=key)
        members = folds == jnp.arange(FOLDS, dtype=folds.dtype)[:, None]
        return small_cv(features, labels, folds=members)

    together = jax.vmap(judged)(keys)
    for i, key in enumerate(keys):
        alone = judged(key)
        rtol = 1e-5 if DOUBLE else 1e-3
        np.testing.assert_allclose(together.log_loss[i], alone.log_loss, rtol=rtol)
        same(entry(together.fit(), i), alone.fit())
        same(entry(together.fit(one_standard_error=True), i), alone.fit(one_standard_error=True))


@pytest.mark.single
@hypothesis.given(
    st.lists(st.integers(0, 4), min_size=4, max_size=60), st.integers(2, 6), st.booleans()
)
def test_folds_are_even_overall_and_within_each_class(
    labels: list[int], count: int, shuffled: bool
) -> None:
    classes = np.array(labels)
    key = jax.random.key(0) if shuffled else None
    folds = np.asarray(stratified_folds(classes, count, key=key))
    for members in (np.ones(len(classes), bool), *(classes == k for k in range(5))):
        sizes = np.bincount(folds[members], minlength=count)
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.single
def test_folds_are_those_of_scikit_learn_up_to_their_numbers() -> None:
    _, labels = data()
    classes = np.sort(labels)
    ours = stratified_folds(classes, FOLDS)
    for fold, (_, held_out) in enumerate(StratifiedKFold(FOLDS).split(classes, classes)):
        np.testing.assert_array_equal(np.flatnonzero(ours == fold), held_out)


@pytest.mark.single
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"folds": 1}, ValueError, "folds must be at least 2, got 1"),
        ({"folds": 2.5}, TypeError, "folds must be an integer, got 2.5"),
        ({"folds": np.zeros(EXAMPLES)}, TypeError, "folds of rank 1 must be integers"),
        ({"folds": np.zeros(EXAMPLES, int)}, ValueError, "there are at least 2, got values from 0"),
        ({"folds": np.arange(EXAMPLES) - 2}, ValueError, "got values from -2 to"),
        ({"folds": np.arange(4)}, ValueError, r"folds must have shape \(examples,\) = \(60,\)"),
        ({"folds": np.zeros((2, 4))}, ValueError, r"folds must have shape \(folds, examples\)"),
        (
            {"folds": np.full((2, EXAMPLES), 3)},
            ValueError,
            r"folds as masks must be 1 \(held out\)",
        ),
        ({"folds": np.zeros((2, EXAMPLES))}, ValueError, "fold 0 holds out none"),
        ({"folds": np.ones((2, EXAMPLES))}, ValueError, "fold 0 fits none"),
        ({"folds": np.arange(EXAMPLES) // 30 * 2}, ValueError, "fold 1 holds out none"),
        ({"folds": 61}, ValueError, "folds must be at most the 60 examples, got 61"),
        ({"l2s": 1.0}, ValueError, r"l2s must have shape \(penalties,\)"),
        ({"sample_weight": -np.ones(EXAMPLES)}, ValueError, "sample_weight must not be negative"),
    ],
)
@pytest.mark.usefixtures("no_jaxtyping", "no_debug_nans")
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_cv(*data(), **changed)


@pytest.mark.single
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.array([0.5, 1.5]), TypeError, "one per example, must have an integer dtype"),
        (np.array([True, False]), TypeError, "got dtype bool"),
        (np.zeros((2, 2, 2)), ValueError, r"got shape \(2, 2, 2\)"),
        (np.array(1), ValueError, r"got shape \(\)"),
    ],
)
@pytest.mark.usefixtures("no_jaxtyping")
def test_labels_that_can_not_be_stratified(
    labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stratified_folds(labels, 2)


@pytest.mark.single
def test_ids_that_are_traced_say_what_to_give() -> None:
    features, labels = data()
    with pytest.raises(TypeError, match=r"known to the trace.*give masks"):
        jax.jit(lambda folds: small_cv(features, labels, folds=folds))(ids())
