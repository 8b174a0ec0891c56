"""The scikit-learn classifier: scikit-learn's own checks, its tools, its data and its files."""

import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import joblib
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils.estimator_checks import parametrize_with_checks

from jaxsoftmax import Status, fit
from jaxsoftmax.estimator import SoftmaxRegression, _persistence
from jaxsoftmax.regression.solver._model import make_frame
from tests.helpers import X64

# Bad parameters and integers for floats go in on purpose.
pytestmark = [pytest.mark.usefixtures("no_jaxtyping"), pytest.mark.slow]
# It sets the precision of its computations itself: the double run asks only whether it does.
single = pytest.mark.single
NAMES = ["a", "b", "c", "d"]


@cache
def iris() -> tuple[NDArray[Any], NDArray[Any]]:
    X, y = load_iris(return_X_y=True)
    return X, y


@cache
def fitted() -> SoftmaxRegression:
    return SoftmaxRegression().fit(*iris())


@single
@parametrize_with_checks([SoftmaxRegression()])
def test_scikit_learns_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


# The same problem as scikit-learn's.

DATASETS: dict[str, Callable[[], tuple[NDArray[Any], NDArray[Any]]]] = {
    "digits": lambda: (load_digits().data / 16, load_digits().target),
    "wine": lambda: (scale(load_wine().data), load_wine().target),
    "iris": iris,
    "two classes": lambda: (scale(load_breast_cancer().data), load_breast_cancer().target),
}


@single
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, np.float64) for name in DATASETS), ("iris", np.float32), ("two classes", np.float32)],
)
def test_it_is_a_drop_in_for_logistic_regression(name: str, dtype: Any) -> None:
    X, y = DATASETS[name]()
    for C in (0.01, 1.0, 100.0):
        peer = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=500).fit(X, y)
        model = SoftmaxRegression(C=C).fit(X.astype(dtype), y)
        probabilities = model.predict_proba(X.astype(dtype))
        np.testing.assert_allclose(probabilities, peer.predict_proba(X), atol=1e-5)
        np.testing.assert_array_equal(model.predict(X.astype(dtype)), peer.predict(X))
        assert model.decision_function(X).shape == peer.decision_function(X).shape
        for attribute in ("coef_", "intercept_", "classes_", "n_iter_"):
            assert getattr(model, attribute).shape == getattr(peer, attribute).shape
        np.testing.assert_allclose(model.coef_, peer.coef_, rtol=1e-3, atol=1e-4)
        assert model.status_ == Status.CONVERGED.name
        assert model.gap_ <= model.tol


@single
@pytest.mark.parametrize("classes", [2, 3])
def test_without_an_intercept_and_without_a_penalty(classes: int) -> None:
    X, y = iris()
    X, y = X[:, :2], np.minimum(y, classes - 1)
    peer = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cg", tol=1e-10)
    model = SoftmaxRegression(C=np.inf, fit_intercept=False).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), peer.fit(X, y).predict_proba(X), atol=1e-5)
    np.testing.assert_array_equal(model.intercept_, 0)


@single
def test_a_tiny_c_leaves_the_intercept_free() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(10, 3)), np.array([0] * 7 + [1] * 3)
    X[:, 1] = 5.0
    model = SoftmaxRegression(C=1e-7).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), [[0.7, 0.3]] * 10, atol=1e-5)
    model = SoftmaxRegression().fit(X, y)
    np.testing.assert_allclose(model.coef_[:, 1], 0, atol=1e-12)  # the constant column


@single
def test_outputs_fit_each_other() -> None:
    X, y = iris()
    for labels in (y, y == 2):
        model = SoftmaxRegression().fit(X, labels)
        probabilities = model.predict_proba(X)
        classes = len(model.classes_)
        assert probabilities.shape == (150, classes)
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-15)
        np.testing.assert_allclose(model.predict_log_proba(X), np.log(probabilities), rtol=1e-9)
        logits = model.decision_function(X)
        assert logits.shape == ((150,) if classes == 2 else (150, 3))
        likeliest = model.classes_[probabilities.argmax(1)]
        np.testing.assert_array_equal(model.predict(X), likeliest)
        assert model.score(X, labels) == (likeliest == labels).mean()
    far = 1e4 * X[:1]
    assert np.isfinite(model.predict_log_proba(far)).all()


# Weights.


@single
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 1.0, 1: 0.5, 2: 3.0}])
def test_weights_equal_repetition(class_weight: Any) -> None:
    X, y = iris()
    weight = np.random.default_rng(0).integers(0, 5, len(y))
    repeated = np.repeat(X, weight, 0), np.repeat(y, weight)
    model = SoftmaxRegression(class_weight=class_weight)
    by_weight = clone(model).fit(X, y, sample_weight=weight)
    by_rows = clone(model).fit(*repeated)
    np.testing.assert_allclose(by_weight.coef_, by_rows.coef_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_weight.score(X, y, weight), by_rows.score(*repeated))
    if class_weight == "balanced":
        peer = LogisticRegression(class_weight="balanced", solver="newton-cholesky", tol=1e-10)
        peer.fit(*repeated)
        np.testing.assert_allclose(by_weight.predict_proba(X), peer.predict_proba(X), atol=1e-5)


@single
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_a_class_without_weight_has_probability_zero(class_weight: Any) -> None:
    X, y = iris()
    model = SoftmaxRegression(class_weight=class_weight)
    weighted = clone(model).fit(X, y, sample_weight=(y != 1).astype(float))
    without = clone(model).fit(X[y != 1], y[y != 1])
    probabilities = weighted.predict_proba(X)
    np.testing.assert_array_equal(probabilities[:, 1], 0)
    np.testing.assert_allclose(probabilities[:, [0, 2]], without.predict_proba(X), atol=1e-6)
    assert weighted.intercept_[1] == -np.inf
    by_class = SoftmaxRegression(class_weight={0: 1, 1: 0, 2: 1}).fit(X, y)
    if class_weight is None:
        np.testing.assert_allclose(by_class.predict_proba(X), probabilities, atol=1e-6)


@single
def test_weights_of_any_size_are_relative_but_for_c() -> None:
    X, y = iris()
    heavy = SoftmaxRegression(C=1e-300).fit(X, y, sample_weight=np.full(len(y), 1e300))
    np.testing.assert_allclose(heavy.predict_proba(X), fitted().predict_proba(X), atol=1e-6)


# scikit-learn's tools.


@single
def test_it_works_in_scikit_learns_tools() -> None:
    X, y = iris()
    pipeline = make_pipeline(StandardScaler(), SoftmaxRegression())
    grid = GridSearchCV(pipeline, {"softmaxregression__C": [0.1, 10.0]}, cv=3).fit(X, y)
    assert grid.best_params_ == {"softmaxregression__C": 10.0}
    assert grid.best_score_ > 0.95
    peer = LogisticRegression(solver="newton-cholesky")
    peers = cross_val_score(peer, X, y, scoring="neg_log_loss")
    scores = cross_val_score(SoftmaxRegression(), X, y, scoring="neg_log_loss")
    np.testing.assert_allclose(scores, peers, rtol=1e-3)
    calibrated = CalibratedClassifierCV(SoftmaxRegression(), cv=3).fit(X, y)
    assert calibrated.score(X, y) > 0.9
    importance = permutation_importance(fitted(), X, y, n_repeats=3, random_state=0)
    assert importance.importances_mean.argmax() in (2, 3)
    model = SoftmaxRegression(2.0, solver="lbfgs", class_weight={0: 2.0})
    assert clone(model).get_params() == model.get_params()
    assert "SoftmaxRegression" in fitted()._repr_html_()


@single
def test_a_fold_may_lack_a_class() -> None:
    X, y = iris()
    model = SoftmaxRegression()
    scores = cross_val_score(model, X, y, cv=KFold(3), scoring="accuracy")
    np.testing.assert_array_equal(scores, 0)  # sorted by class: no fold has seen its own


@single
def test_folds_of_nearly_one_size_share_a_program() -> None:

    X, y = iris()
    SoftmaxRegression().fit(X[:140], y[:140])
    programs: Any = make_frame
    size = programs._cache_size()
    for rows in range(141, 147):
        SoftmaxRegression().fit(X[:rows], y[:rows])
    assert programs._cache_size() == size


@single
def test_large_features_are_not_copied_for_a_common_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = iris()
    coef, probabilities = fitted().coef_, fitted().predict_proba(X)
    monkeypatch.setattr("jaxsoftmax.estimator._conversions._PADDED", 500)
    model = SoftmaxRegression().fit(X, y)
    np.testing.assert_allclose(model.coef_, coef, rtol=1e-6)
    np.testing.assert_allclose(model.predict_proba(X), probabilities, atol=1e-9)


# What goes in.

FRAMES: dict[str, Callable[[NDArray[Any]], Any]] = {
    "pandas": partial(pd.DataFrame, columns=NAMES),
    "polars": partial(pl.DataFrame, schema=NAMES),
    "arrow": lambda X: pa.table(dict(zip(NAMES, X.T, strict=True))),
}
ARRAYS: dict[str, Callable[[NDArray[Any]], Any]] = {
    "numpy": np.asarray,
    "jax": jnp.asarray,
    "torch": lambda X: pytest.importorskip("torch").tensor(X),
    "list": lambda X: X.tolist(),
}


@single
@pytest.mark.parametrize("kind", FRAMES)
def test_frames_keep_and_check_their_names(kind: str) -> None:
    X, y = iris()
    frame = FRAMES[kind](X)
    model = SoftmaxRegression().fit(frame, y)
    np.testing.assert_array_equal(model.feature_names_in_, NAMES)
    np.testing.assert_array_equal(model.coef_, fitted().coef_)
    np.testing.assert_array_equal(model.predict_proba(frame), fitted().predict_proba(X))
    renamed = FRAMES["pandas"](X).rename(columns={"b": "other"})
    with pytest.raises(ValueError, match="feature names should match those that were passed"):
        model.predict(renamed)
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        model.predict(X)
    with pytest.raises(ValueError, match="X has 3 features, but SoftmaxRegression is expecting 4"):
        fitted().predict(X[:, :3])


@single
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_any_library(kind: str) -> None:
    X, y = iris()
    X = X.astype(np.float32) if kind != "list" else X
    reference = SoftmaxRegression().fit(X, y)
    model = SoftmaxRegression().fit(ARRAYS[kind](X), ARRAYS[kind](y))
    np.testing.assert_array_equal(model.coef_, reference.coef_)
    assert model.score(ARRAYS[kind](X), ARRAYS[kind](y)) == reference.score(X, y)


LABELS: dict[str, tuple[list[Any], Callable[[NDArray[Any]], Any]]] = {
    "strings": (["x", "y", "z"], np.asarray),
    "integers": ([3, 7, 100], np.asarray),
    "negative integers": ([-5, 0, 2], np.asarray),
    "pandas strings": (["x", "y", "z"], pd.Series),
    "categorical": (["x", "y", "z"], lambda y: pd.Series(y, dtype="category")),
    "polars strings": (["x", "y", "z"], pl.Series),
    "polars categories": (["x", "y", "z"], lambda y: pl.Series(y, dtype=pl.Categorical)),
    "arrow strings": (["x", "y", "z"], pa.array),
    "booleans": ([False, True, True], np.asarray),
    "polars booleans": ([False, True, True], pl.Series),
}


@single
@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind(kind: str) -> None:
    values, wrap = LABELS[kind]
    X, y = iris()
    labels = np.array(values)[y]
    model = SoftmaxRegression().fit(X, wrap(labels))
    np.testing.assert_array_equal(model.classes_, np.unique(labels))
    assert model.classes_.tolist() == sorted(set(values))
    assert (model.predict(X) == labels).mean() > 0.9
    assert model.score(X, labels) == (model.predict(X) == labels).mean()
    reference = SoftmaxRegression().fit(X, np.unique(labels, return_inverse=True)[1])
    np.testing.assert_array_equal(model.coef_, reference.coef_)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.float16, np.float64),
        (np.int32, np.float64),
        (bool, np.float64),
    ],
)
def test_the_dtype_is_that_of_the_features(given: Any, computed: Any) -> None:
    X, y = iris()
    X = (X - 3).clip(0).astype(given)
    model = SoftmaxRegression().fit(X, y)
    assert model.coef_.dtype == model.intercept_.dtype == computed
    for output in (model.decision_function, model.predict_proba, model.predict_log_proba):
        assert output(X).dtype == computed
    assert model.partial_fit(X, y).coef_.dtype == computed
    assert model.gap_ < 1e-9 if computed == np.float64 and hasattr(model, "gap_") else True
    assert jax.config.read("jax_enable_x64") == X64


@single
@pytest.mark.parametrize("kind", FRAMES)
def test_frames_of_float32_stay_so(kind: str) -> None:
    X, y = iris()
    model = SoftmaxRegression().fit(FRAMES[kind](X.astype(np.float32)), y)
    assert model.coef_.dtype == np.float32
    assert model.predict_proba(FRAMES[kind](X.astype(np.float32))).dtype == np.float32


@single
def test_bfloat16_of_jax_is_taken() -> None:
    y = iris()[1]
    X = jnp.asarray(iris()[0], jnp.bfloat16)
    model = SoftmaxRegression().fit(X, y)
    assert model.coef_.dtype == np.float64
    exact = SoftmaxRegression().fit(np.asarray(X.astype(jnp.float32), np.float64), y)
    np.testing.assert_array_equal(model.coef_, exact.coef_)


# What must not go in.


@single
def test_sparse_features_are_refused_with_their_cost() -> None:
    X, y = iris()
    for container in (sparse.csr_matrix, sparse.csr_array, sparse.coo_array):
        with pytest.raises(TypeError, match=r"dense data is required\. X\.toarray\(\).*0\.0 MB"):
            SoftmaxRegression().fit(container(X), y)
        with pytest.raises(TypeError, match="dense data is required"):
            fitted().predict(container(X))
    large = sparse.csr_array((10**6, 10**4), dtype=np.float32)
    with pytest.raises(TypeError, match=r"takes 40,000\.0 MB"):
        SoftmaxRegression().fit(large, np.zeros(10**6))


@single
def test_missing_and_infinite_features_name_their_columns() -> None:
    X, y = iris()
    X = X.copy()
    X[3, 1] = X[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"Input X contains NaN.*columns 1, 3"):
        SoftmaxRegression().fit(X, y)
    for make in FRAMES.values():
        with pytest.raises(ValueError, match=r"Input X contains NaN.*columns 'b', 'd'"):
            SoftmaxRegression().fit(make(X), y)
    with pytest.raises(ValueError, match=r"Input X contains NaN.*columns 1, 3"):
        fitted().predict(X)
    X[3, 1], X[7, 3] = np.inf, 1.0
    with pytest.raises(ValueError, match=r"contains infinity.*\(infinite\).*column 1;"):
        SoftmaxRegression().fit(X, y)
    wide = np.full((2, 9), np.nan)
    with pytest.raises(ValueError, match=r"columns 0, 1, 2, 3, 4 and 4 more"):
        SoftmaxRegression().fit(wide, [0, 1])


@single
@pytest.mark.parametrize(
    "missing",
    [
        lambda y: [None, *y[1:]],
        lambda y: np.array([np.nan, *y[1:]], object),
        lambda y: pd.Series([None, *y[1:]]),
        lambda y: pd.array([None, *y[1:]], dtype="string"),
        lambda y: pd.Categorical([None, *y[1:]]),
        lambda y: pl.Series([None, *y[1:]]),
        lambda y: pa.array([None, *y[1:]]),
        lambda y: pd.array([None, *[len(label) for label in y[1:]]], dtype="Int64"),
        lambda y: pl.Series([None, *[len(label) for label in y[1:]]]),
    ],
)
def test_missing_labels_are_said(missing: Callable[[list[str]], Any]) -> None:
    X, y = iris()
    labels = np.array(["x", "yy", "zzz"])[y].tolist()
    with pytest.raises(ValueError, match="Input y contains NaN"):
        SoftmaxRegression().fit(X, missing(labels))


@single
def test_one_class_alone_is_named() -> None:
    X, _ = iris()
    with pytest.raises(ValueError, match="contains only one class: 'solo'"):
        SoftmaxRegression().fit(X, ["solo"] * len(X))
    weight = np.r_[np.zeros(75), np.ones(75)]
    with pytest.raises(ValueError, match="contains only one class: 1"):
        SoftmaxRegression().fit(X, np.r_[np.zeros(75, int), np.ones(75, int)], weight)


@single
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"C": 0}, "The 'C' parameter of SoftmaxRegression must be a float in the range"),
        ({"C": -1.0}, "The 'C' parameter"),
        ({"C": "1"}, "The 'C' parameter"),
        ({"tol": 0.0}, "The 'tol' parameter"),
        ({"max_iter": -1}, "The 'max_iter' parameter"),
        ({"max_iter": 1.5}, "The 'max_iter' parameter"),
        ({"solver": "saga"}, "The 'solver' parameter"),
        ({"class_weight": "even"}, "The 'class_weight' parameter"),
        ({"fit_intercept": "yes"}, "The 'fit_intercept' parameter"),
        ({"class_weight": {0: -1.0}}, "class_weight must not be negative"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftmaxRegression(**params).fit(*iris())


@single
def test_bad_data_is_named_in_scikit_learns_words() -> None:
    X, y = iris()
    model = SoftmaxRegression()
    for arguments, message in (
        ((X, y[1:]), "Found input variables with inconsistent numbers of samples"),
        ((X[:, 0], y), "Expected 2D array, got 1D array instead"),
        ((X, y + 0.5), "Unknown label type"),
        ((X, y, -np.ones(len(y))), "Negative values in data passed to `sample_weight`"),
        ((X, y, np.ones(3)), "sample_weight.shape"),
        ((X, y, np.zeros(len(y))), "Sample weights must contain at least one non-zero number"),
        ((X, None), "requires y to be passed"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(*arguments)
    for method in ("predict", "predict_proba", "decision_function"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(SoftmaxRegression(), method)(X)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        SoftmaxRegression().save("nowhere.safetensors")


# How a fit ended.


def the_warning(model: SoftmaxRegression, X: Any, y: Any) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, y)
    assert [one.category for one in caught] == [ConvergenceWarning]
    return str(caught[0].message)


@single
def test_a_fit_that_has_not_converged_says_so_once() -> None:
    X, y = iris()
    model = SoftmaxRegression(max_iter=2)
    message = the_warning(model, X * [1, 1, 1e5, 1], y)
    assert model.status_ == Status.MAX_ITER.name
    assert model.n_iter_ == 2
    assert f"MAX_ITER after 2 iterations with gap {model.gap_:.1e}" in message
    assert "The scales of the columns go from 4.3e-01 to 1.8e+05, a ratio of 4.1e+05" in message
    assert "StandardScaler" in message
    assert "Raise max_iter, now 2." in message
    assert "StandardScaler" not in the_warning(model, X, y)


@single
def test_separable_data_without_a_penalty_name_the_diverging_columns() -> None:
    X, y = np.array([[1.0, 0], [1, 0], [1, 2], [1, 1]]), [1, 1, 0, 0]
    model = SoftmaxRegression(C=np.inf)
    message = the_warning(model, X, y)
    assert model.status_ == Status.SEPARABLE.name
    assert "separable along column 1, whose" in message
    assert "choose a finite C" in message
    assert np.isfinite(model.coef_).all()
    assert "separable along column 'b'" in the_warning(
        model, pd.DataFrame(X, columns=["a", "b"]), y
    )
    assert "a smaller C" in the_warning(SoftmaxRegression(C=1e12, max_iter=5), X, y)


@single
def test_a_fit_at_the_floor_of_its_precision_says_so() -> None:
    X, y = iris()
    model = SoftmaxRegression(C=1e4, tol=1e-15)
    message = the_warning(model, X.astype(np.float32), y)
    assert model.status_ == Status.STALLED.name
    assert "precision of float32 allows no more: pass float64 features or raise tol" in message
    SoftmaxRegression(C=1e4).fit(X.astype(np.float32), y)  # tol asks for no more than there is


@single
def test_features_of_any_size_give_advice_and_no_other_warning() -> None:
    X, y = iris()
    for factor, dtype in ((1e30, np.float32), (1e300, np.float64)):
        message = the_warning(SoftmaxRegression(), (X * factor).astype(dtype), y)
        assert "Standardise the columns" in message


@single
def test_verbose_prints_how_the_fit_ended(capsys: pytest.CaptureFixture[str]) -> None:
    SoftmaxRegression(verbose=1).fit(*iris())
    assert "SoftmaxRegression: CONVERGED after " in capsys.readouterr().out
    SoftmaxRegression().fit(*iris())
    assert capsys.readouterr().out == ""


@single
@pytest.mark.parametrize("classes", [2, 3])
def test_a_warm_start_begins_where_the_last_fit_ended(classes: int) -> None:
    X, y = iris()
    y = np.minimum(y, classes - 1)
    model = SoftmaxRegression(warm_start=True).fit(X, y)
    cold, coef = model.n_iter_[0], model.coef_
    model.fit(X, y)
    assert model.n_iter_[0] <= 1 < cold
    np.testing.assert_allclose(model.coef_, coef, rtol=1e-4, atol=1e-6)
    if classes == 3:
        model.fit(X[:, :2], y)  # another number of features: from the start
        np.testing.assert_array_equal(model.coef_, SoftmaxRegression().fit(X[:, :2], y).coef_)
        weight = (y > 0).astype(float)
        model.fit(X, y, weight).fit(X, y)  # a class comes back
        np.testing.assert_allclose(model.coef_, coef, rtol=1e-3, atol=1e-5)


# Steps on batches.


@single
@pytest.mark.parametrize("classes", [2, 3])
def test_steps_on_batches_come_near_the_optimum(classes: int) -> None:
    X, y = iris()
    X, y = scale(X), np.minimum(y, classes - 1)
    model = SoftmaxRegression(C=1 / 60)  # after 60 passes that is as C = 1 for all at once
    rng = np.random.default_rng(0)
    for _ in range(60):
        for rows in np.split(rng.permutation(len(X)), 5):
            model.partial_fit(X[rows], y[rows], classes=range(classes))
    best = SoftmaxRegression(C=1.0).fit(X, y)
    loss, least = (-one.predict_log_proba(X)[np.arange(len(X)), y].mean() for one in (model, best))
    assert abs(loss / least - 1) < 0.35
    assert model.n_iter_ == 300
    assert not hasattr(model, "gap_")
    assert model.coef_.shape == best.coef_.shape


@single
def test_weights_equal_repetition_in_a_step_too() -> None:
    X, y = iris()
    weight = np.random.default_rng(0).integers(0, 3, len(y))
    by_weight = SoftmaxRegression(class_weight={0: 2.0})
    by_rows = SoftmaxRegression(class_weight={0: 2.0})
    for _ in range(3):
        by_weight.partial_fit(X, y, classes=[0, 1, 2], sample_weight=weight)
        by_rows.partial_fit(np.repeat(X, weight, 0), np.repeat(y, weight), classes=[0, 1, 2])
    np.testing.assert_allclose(by_weight.coef_, by_rows.coef_, rtol=1e-9)


@single
def test_batches_may_lack_classes_and_unseen_labels_are_named() -> None:
    X, y = iris()
    model = SoftmaxRegression()
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        model.partial_fit(X, y)
    model.partial_fit(X[:50], y[:50], classes=[0, 1, 2])
    assert model.predict_proba(X).shape == (150, 3)
    with pytest.raises(ValueError, match=r"labels that are not in classes: \[5, 7\]"):
        model.partial_fit(X[:4], [0, 7, 5, 1])
    with pytest.raises(ValueError, match="is not the same as on last call to partial_fit"):
        model.partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="'balanced' is not supported for partial_fit"):
        SoftmaxRegression(class_weight="balanced").partial_fit(X, y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="classes must be at least 2"):
        SoftmaxRegression().partial_fit(X, y, classes=[0])
    words = SoftmaxRegression().partial_fit(X[:2], ["x", "y"], classes=["x", "y", "z"])
    with pytest.raises(ValueError, match=r"\['new'\]"):
        words.partial_fit(X[:2], ["x", "new"])


@single
def test_a_batch_of_classes_without_weight_changes_nothing() -> None:
    X, y = iris()
    y = np.minimum(y, 1)
    model = SoftmaxRegression(class_weight={0: 0.0, 1: 1.0})
    first = model.partial_fit(X[y == 0], y[y == 0], classes=[0, 1]).coef_
    np.testing.assert_array_equal(first, np.zeros((1, 4)))
    before = model.partial_fit(X, y).coef_
    np.testing.assert_array_equal(model.partial_fit(X[y == 0], y[y == 0]).coef_, before)
    with pytest.raises(ValueError, match="class_weight leaves no example a weight"):
        SoftmaxRegression(class_weight={0: 0.0, 1: 0.0}).fit(X, y)


@single
def test_steps_without_an_intercept_and_after_a_fit() -> None:
    X, y = iris()
    model = SoftmaxRegression(fit_intercept=False).partial_fit(X, y, classes=[0, 1, 2])
    np.testing.assert_array_equal(model.intercept_, 0)
    model = SoftmaxRegression().fit(X, y, sample_weight=(y > 0).astype(float))
    model.partial_fit(X, y)  # the absent class comes back
    assert np.isfinite(model.predict_log_proba(X)).all()


# Files.


def save_and_load(model: SoftmaxRegression, path: Path) -> SoftmaxRegression:
    model.save(path)
    return SoftmaxRegression.load(path)


@single
@pytest.mark.parametrize("kind", ["strings", "integers", "booleans", "pandas strings"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_saved_model_comes_back_exactly(kind: str, dtype: Any, tmp_path: Path) -> None:
    values, wrap = LABELS[kind]
    X, y = iris()
    frame = pd.DataFrame(X.astype(dtype), columns=NAMES)
    labels = np.array(values)[y]
    weights = {label: np.float64(2.0) for label in np.unique(labels)}
    model = SoftmaxRegression(np.float64(3.0), class_weight=weights, tol=1e-5)
    model.fit(frame, wrap(labels), sample_weight=(y != 1) + 0.5)
    loaded = save_and_load(model, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded.predict_proba(frame), model.predict_proba(frame))
    np.testing.assert_array_equal(loaded.classes_, model.classes_)
    assert loaded.classes_.dtype == model.classes_.dtype
    assert loaded.get_params() == model.get_params()
    assert (loaded.status_, loaded.gap_) == (model.status_, model.gap_)
    np.testing.assert_array_equal(loaded.n_iter_, model.n_iter_)
    np.testing.assert_array_equal(loaded.feature_names_in_, NAMES)
    assert loaded.feature_names_in_.dtype == object
    loaded.partial_fit(frame, wrap(labels))
    clone(loaded).fit(frame, wrap(labels))


@single
def test_an_absent_class_and_no_penalty_are_saved_too(tmp_path: Path) -> None:
    X, y = iris()
    model = SoftmaxRegression(C=np.inf).fit(X[:, :2], y, sample_weight=(y > 0).astype(float))
    loaded = save_and_load(model, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded.predict_proba(X[:, :2]), model.predict_proba(X[:, :2]))
    assert np.isinf(loaded.C)


@single
def test_the_header_is_json_that_anyone_can_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fitted().save(path)
    arrays = load_file(path)
    np.testing.assert_array_equal(arrays["coef_"], fitted().coef_)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["jaxsoftmax"])
    assert header["version"] == 1
    assert header["estimator"] == "SoftmaxRegression"
    assert header["dtype"] == "float64"
    assert header["params"]["C"] == 1.0
    assert header["fitted"]["classes_"] == {"dtype": "<i8", "values": [0, 1, 2]}


@single
def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fitted().save(path)
    content = path.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    edited = content.replace(b"CONVERGED", b"DIVERGED!")
    for damaged, message in (
        (b"", "damaged, truncated or no safetensors file"),
        (content[:5], "damaged, truncated or no safetensors file"),
        (content[:100], "damaged, truncated or no safetensors file"),
        (content[:-1], "damaged, truncated or no safetensors file"),
        (content + b"more", "damaged, truncated or no safetensors file"),
        (b"\x80\x04" + content, "damaged, truncated or no safetensors file"),
        (pickle.dumps(fitted()), "damaged, truncated or no safetensors file"),
        (flipped, "is damaged: its numbers or its header differ"),
        (edited, "is damaged: its numbers or its header differ"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as error:
            SoftmaxRegression.load(path)
        assert str(path) in str(error.value)
    save_file({"weights": np.ones(3)}, path)
    with pytest.raises(ValueError, match="a safetensors file of something else"):
        SoftmaxRegression.load(path)
    with pytest.raises(FileNotFoundError):
        SoftmaxRegression.load(tmp_path / "absent")


@single
def test_files_that_lack_a_part_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fitted().save(path)
    whole = _persistence.load(path)
    lacking = [
        _persistence.Contents(whole.arrays, {k: v for k, v in whole.header.items() if k != part})
        for part in ("estimator", "params", "fitted")
    ]
    unknown = {**whole.header, "params": {"D": 1.0}}
    fewer = {k: v for k, v in whole.header["fitted"].items() if k != "classes_"}
    for contents in (
        *lacking,
        _persistence.Contents({}, whole.header),
        _persistence.Contents(whole.arrays, unknown),
        _persistence.Contents(whole.arrays, {**whole.header, "fitted": fewer}),
    ):
        _persistence.save(path, contents)
        with pytest.raises(ValueError, match="lacks a part of a SoftmaxRegression") as error:
            SoftmaxRegression.load(path)
        assert str(path) in str(error.value)


@single
def test_pickle_and_joblib_work_across_processes(tmp_path: Path) -> None:
    X, y = iris()
    model = SoftmaxRegression().partial_fit(X, y, classes=[0, 1, 2])
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    joblib.dump(model, tmp_path / "model.joblib")
    model.save(tmp_path / "model.safetensors")
    np.save(tmp_path / "X.npy", X)
    code = """
import os, pickle, sys, joblib, numpy as np
from jaxsoftmax.estimator import SoftmaxRegression
os.chdir(sys.argv[1])
X = np.load("X.npy")
with open("model.pickle", "rb") as file:
    models = [pickle.load(file), joblib.load("model.joblib")]
models.append(SoftmaxRegression.load("model.safetensors"))
first, second, third = (model.predict_proba(X) for model in models)
np.testing.assert_array_equal(first, second)
np.testing.assert_array_equal(first, third)
models[0].partial_fit(X, models[0].predict(X))
np.save("probabilities.npy", first)
np.save("next.npy", models[0].coef_)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "probabilities.npy"), model.predict_proba(X), rtol=1e-14
    )
    model.partial_fit(X, model.predict(X))
    np.testing.assert_allclose(np.load(tmp_path / "next.npy"), model.coef_, rtol=1e-12)


# The package without scikit-learn.


@single
def test_without_scikit_learn_the_import_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import jaxsoftmax\n"
        "import jaxsoftmax.estimator\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert (
        'ImportError: jaxsoftmax.estimator needs scikit-learn: pip install "jaxsoftmax[sklearn]"'
        in run.stderr
    )


@single
def test_without_safetensors_saving_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for use in (fitted().save, SoftmaxRegression.load):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "jaxsoftmax\[sklearn\]"'):
            use(tmp_path / "model.safetensors")


@single
def test_it_is_fit_that_computes() -> None:
    X, y = iris()
    with jax.enable_x64(True):
        result = fit(X, y, num_classes=3, l2=1 / len(y), tol=1e-12)
    np.testing.assert_allclose(fitted().coef_, result.params.weights, rtol=1e-5)


@pytest.mark.single
def test_classes_named_by_digits_have_weights() -> None:
    X, y = load_iris(return_X_y=True)
    weights = [5.0, 1.0, 0.5]
    digits, letters = (
        SoftmaxRegression(class_weight=dict(zip(names, weights, strict=True))).fit(X, names[y])
        for names in (np.array(["1", "2", "3"]), np.array(["a", "b", "c"]))
    )
    np.testing.assert_array_equal(digits.coef_, letters.coef_)


@pytest.mark.single
def test_a_batch_of_weight_zero_changes_nothing() -> None:
    X, y = load_iris(return_X_y=True)
    model = SoftmaxRegression().partial_fit(X, y, classes=np.arange(3))
    before = model.coef_.copy()
    model.partial_fit(X, y, sample_weight=np.zeros(len(y)))
    np.testing.assert_array_equal(model.coef_, before)
