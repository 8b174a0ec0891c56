"""The classifier that cross-validates, beside scikit-learn's and beside its own parts."""

import pickle
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import log_loss, make_scorer
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    PredefinedSplit,
    RepeatedStratifiedKFold,
    ShuffleSplit,
    StratifiedKFold,
    TimeSeriesSplit,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils.estimator_checks import parametrize_with_checks

from jaxsoftmax import Status
from jaxsoftmax.estimator import SoftmaxRegression, SoftmaxRegressionCV
from tests.helpers import X64

# Bad parameters and integers for floats go in on purpose.
pytestmark = [
    pytest.mark.usefixtures("no_jaxtyping"),
    pytest.mark.single,
    pytest.mark.slow,
]
# One number of folds and of penalties for nearly all tests, which so share a program.
CS = [0.01, 1.0, 100.0]


@cache
def iris() -> tuple[NDArray[Any], NDArray[Any]]:
    """In no order of the classes."""
    X, y = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return X[order], y[order]


def small(**params: Any) -> SoftmaxRegressionCV:
    defaults: dict[str, Any] = {"Cs": CS, "cv": 3}
    return SoftmaxRegressionCV(**defaults | params)


@cache
def fitted() -> SoftmaxRegressionCV:
    return small().fit(*iris())


# The relation of weights to repetition is checked to eight digits of the logits.
@parametrize_with_checks([small(tol=1e-8)])
def test_scikit_learns_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


# The same problem as scikit-learn's.


def peer(**params: Any) -> Any:
    """Of any supported version, with the attributes of the newest."""
    options = {"scoring": "neg_log_loss", "l1_ratios": (0,), "use_legacy_attributes": False}
    options |= {"solver": "newton-cholesky", "tol": 1e-10, "max_iter": 500} | params
    known = LogisticRegressionCV().get_params()
    return LogisticRegressionCV(**{name: v for name, v in options.items() if name in known})


def of_folds(values: Any) -> NDArray[Any]:
    """Attributes of theirs without the axis of L1 ratios, or without that of the classes."""
    if isinstance(values, dict):
        return np.asarray(next(iter(values.values())))
    return np.asarray(values[:, 0])


DATASETS: dict[str, Callable[[], tuple[NDArray[Any], NDArray[Any]]]] = {
    "wine": lambda: (scale(load_wine().data), load_wine().target),
    "two classes": lambda: (scale(load_breast_cancer().data), load_breast_cancer().target),
    "digits": lambda: (load_digits().data[:250] / 16, load_digits().target[:250]),
}


@pytest.mark.parametrize("name", DATASETS)
def test_it_is_a_drop_in_for_logistic_regression_cv(name: str) -> None:
    X, y = DATASETS[name]()
    count = 4 if name == "digits" else 10  # where their solver is slow
    model = SoftmaxRegressionCV(count).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their solver, and of what becomes of their attributes
        theirs = peer(Cs=count, solver="lbfgs" if name == "digits" else "newton-cholesky").fit(X, y)
    assert np.ravel(theirs.C_)[0] == model.C_
    np.testing.assert_array_equal(model.Cs_, theirs.Cs_)
    # Their loss of one example ends at 36, the logarithm of the rounding error.
    weak = 3 if name == "two classes" else 0
    scores = of_folds(theirs.scores_)
    np.testing.assert_allclose(
        model.scores_[:, : count - weak], scores[:, : count - weak], atol=1e-5
    )
    np.testing.assert_allclose(model.predict_proba(X), theirs.predict_proba(X), atol=1e-5)
    assert (model.scores_ <= scores + 1e-5).all()
    assert model.coef_.shape == theirs.coef_.shape
    assert model.status_ == Status.CONVERGED.name
    if not isinstance(theirs.coefs_paths_, dict):
        paths = of_folds(theirs.coefs_paths_)
        assert model.coefs_paths_.shape == paths.shape
        assert model.n_iter_.shape == of_folds(theirs.n_iter_).shape
        if name != "digits":
            np.testing.assert_allclose(
                model.coefs_paths_[:, :7], paths[:, :7], rtol=1e-3, atol=1e-4
            )
        assert type(model.C_) is type(theirs.C_)


@pytest.mark.parametrize("scoring", ["accuracy", "neg_brier_score", "f1_macro", "roc_auc_ovr"])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_scores_and_class_weights_are_scikit_learns(scoring: str, class_weight: Any) -> None:
    X, y = iris()
    weight = np.random.default_rng(1).integers(0, 4, len(y)).astype(float)
    if scoring != "accuracy":
        weight += weight == 0  # where theirs is not called with weights, 0 counts
    model = small(scoring=scoring, class_weight=class_weight).fit(X, y, sample_weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peer(Cs=CS, cv=3, scoring=scoring, class_weight=class_weight).fit(
            X, y, sample_weight=weight
        )
    np.testing.assert_allclose(model.scores_, of_folds(theirs.scores_), atol=1e-5)
    np.testing.assert_allclose(model.score(X, y), theirs.score(X, y), atol=1e-5)
    np.testing.assert_allclose(
        model.score(X, y, sample_weight=weight), theirs.score(X, y, sample_weight=weight), atol=1e-5
    )
    np.testing.assert_allclose(model.predict_proba(X), theirs.predict_proba(X), atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_without_a_refit_it_is_the_average_of_the_folds(classes: int) -> None:
    X, y = iris()
    y = np.minimum(y, classes - 1)
    model = small(refit=False).fit(X, y)
    best = model.scores_.argmax(1)
    path = model.coefs_paths_[np.arange(3), best]
    np.testing.assert_allclose(np.c_[model.coef_, model.intercept_], path.mean(0), rtol=1e-9)
    assert model.Cs_[best].mean() == model.C_
    assert model.gap_ == model.gaps_[np.arange(3), best].max()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peer(Cs=CS, cv=3, refit=False).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), theirs.predict_proba(X), atol=1e-5)


def test_each_fit_is_that_of_a_fold_alone() -> None:
    X, y = iris()
    weight = np.random.default_rng(2).random(len(y))
    model = small().fit(X, y, sample_weight=weight)
    for fold, (train, test) in enumerate(StratifiedKFold(3).split(X, y)):
        for index, C in enumerate(CS):
            alone = SoftmaxRegression(C=C).fit(X[train], y[train], weight[train])
            path = model.coefs_paths_[fold, index]
            np.testing.assert_allclose(path[:, :-1], alone.coef_, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(path[:, -1], alone.intercept_, rtol=1e-4, atol=1e-5)
            loss = log_loss(y[test], alone.predict_proba(X[test]), sample_weight=weight[test])
            np.testing.assert_allclose(model.scores_[fold, index], -loss, rtol=1e-5)
    whole = SoftmaxRegression(C=model.C_).fit(X, y, weight)
    np.testing.assert_allclose(model.predict_proba(X), whole.predict_proba(X), atol=1e-6)


# Folds.


@pytest.mark.parametrize(
    "cv",
    [
        3,
        RepeatedStratifiedKFold(n_splits=3, n_repeats=1, random_state=0),
        ShuffleSplit(3, test_size=0.2, train_size=0.5, random_state=0),
        TimeSeriesSplit(3),
        PredefinedSplit(np.arange(150) % 4 - 1),
        [(np.arange(150) % 3 != fold, np.arange(150) % 3 == fold) for fold in range(3)],
    ],
    ids=lambda cv: type(cv).__name__,
)
def test_folds_of_any_kind(cv: Any) -> None:
    X, y = iris()
    model = small(cv=cv).fit(X, y)
    if isinstance(cv, int):
        cv = StratifiedKFold(3)
    splits = cv if isinstance(cv, list) else cv.split(X, y)
    for fold, (train, test) in enumerate(splits):
        alone = SoftmaxRegression(C=1.0).fit(X[train], y[train])
        loss = log_loss(y[test], alone.predict_proba(X[test]))
        np.testing.assert_allclose(model.scores_[fold, 1], -loss, rtol=1e-5)


def test_groups_stay_together() -> None:
    X, y = iris()
    groups = np.random.default_rng(0).integers(0, 12, len(y))
    model = small(cv=GroupKFold(3)).fit(X, y, groups=groups)
    splits = list(GroupKFold(3).split(X, y, groups))
    np.testing.assert_allclose(model.scores_, small(cv=splits).fit(X, y).scores_)
    pipeline = make_pipeline(StandardScaler(), small(cv=GroupKFold(3)))
    pipeline.fit(X, y, softmaxregressioncv__groups=groups)
    with pytest.raises(ValueError, match="The 'groups' parameter should not be None"):
        small(cv=GroupKFold(3)).fit(X, y)


def test_folds_that_make_no_sense_are_refused() -> None:
    X, y = iris()
    rows = np.arange(150)
    for cv, message in (
        ([(rows, rows[:50]), (rows[50:], rows[:50])], "Fold 0 of cv must fit an example once"),
        ([(rows[50:], [0, 0])] * 2, "Fold 0 of cv must hold out an example once"),
        ([(np.r_[rows[50:], 99], rows[:50])], "Fold 0 of cv must fit an example once"),
        ([(rows[50:], [])], "Fold 0 of cv must hold out an example of positive weight"),
        ([([], rows)], "Fold 0 of cv must fit an example of positive weight"),
    ):
        with pytest.raises(ValueError, match=message):
            small(cv=cv).fit(X, y)
    weight = np.ones(150)
    weight[:50] = 0
    with pytest.raises(ValueError, match="Fold 0 of cv must hold out an example of positive"):
        small(cv=KFold(3)).fit(X, y, sample_weight=weight)


def test_weights_equal_repetition() -> None:
    X, y = iris()
    weight = np.random.default_rng(0).integers(0, 4, len(y))
    rows = np.repeat(np.arange(150), weight)
    splits = list(StratifiedKFold(3).split(X, y))
    repeated = [tuple(np.flatnonzero(np.isin(rows, side)) for side in split) for split in splits]
    for scoring in ("neg_log_loss", "accuracy", "f1_macro"):
        by_weight = small(cv=splits, scoring=scoring).fit(X, y, sample_weight=weight)
        by_rows = small(cv=repeated, scoring=scoring).fit(X[rows], y[rows])
        np.testing.assert_allclose(by_weight.scores_, by_rows.scores_, rtol=1e-5)
        np.testing.assert_allclose(by_weight.coef_, by_rows.coef_, rtol=1e-4, atol=1e-6)
        assert by_weight.C_ == by_rows.C_


def test_a_fold_may_lack_a_class() -> None:
    X, y = load_iris(return_X_y=True)
    model = small(cv=KFold(3)).fit(X, y)  # sorted by class: each fold holds out one it has not seen
    np.testing.assert_array_equal(model.scores_, -np.inf)
    assert CS[0] == model.C_
    assert np.isneginf(model.coefs_paths_[0, :, 0, -1]).all()
    assert np.isfinite(model.coef_).all()
    assert np.isfinite(small(cv=KFold(3), refit=False).fit(X, y).predict_log_proba(X)).all()
    np.testing.assert_array_equal(small(cv=KFold(3), scoring="accuracy").fit(X, y).scores_, 0)
    # Where one fold has not seen a few examples, the others decide.
    splits = list(StratifiedKFold(3).split(X, y))
    splits[0] = (splits[0][0][y[splits[0][0]] != 2], splits[0][1])
    model = small(cv=splits).fit(X, y)
    assert np.isneginf(model.scores_[0]).all()
    assert np.isfinite(model.scores_[1:]).all()
    assert model.C_ == fitted().C_


@pytest.mark.parametrize("scoring", ["neg_brier_score", "neg_log_loss", "recall"])
def test_a_fold_of_one_class_alone_predicts_it(scoring: str) -> None:
    X, y = iris()
    y = np.minimum(y, 1)
    rows = np.arange(150)
    for seen in (0, 1):
        alone = rows[y == seen][:-9], rows[y == seen][-9:]
        splits = [alone, *StratifiedKFold(2).split(X, y)]
        if scoring == "recall" and not seen:
            continue  # there is nothing to recall
        model = small(cv=splits, scoring=scoring).fit(X, y)
        assert (model.scores_[0] == (scoring == "recall")).all()
        assert np.isfinite(model.predict_proba(X)).all()


@pytest.mark.parametrize("scoring", ["roc_auc", "average_precision"])
def test_a_fold_of_one_class_alone_has_a_score_by_its_logits(scoring: str) -> None:
    X, y = iris()
    y = np.minimum(y, 1)
    seen = np.flatnonzero(y == 1)
    splits = list(StratifiedKFold(3).split(X, y))
    splits[0] = np.intersect1d(splits[0][0], seen), splits[0][1]
    model = small(cv=splits, scoring=scoring).fit(X, y)
    constant = 0.5 if scoring == "roc_auc" else y[splits[0][1]].mean()
    np.testing.assert_allclose(model.scores_[0], constant)
    assert (model.scores_[1:] > 0.9).all()


def test_an_average_over_folds_lies_between_them_though_one_lacks_a_class() -> None:
    X, y = iris()
    kept = (y != 2) | (np.cumsum(y == 2) <= 15)  # a rare class, so that biases are not all 0
    X, y = X[kept], y[kept]
    splits = list(StratifiedKFold(3).split(X, y))
    splits[0] = (splits[0][0][y[splits[0][0]] != 2], splits[0][1])
    model = small(Cs=[0.01], cv=splits, refit=False).fit(1e-3 * X, y)
    paths = model.coefs_paths_[:, 0, :, -1]
    relative = paths[1:, 2] - paths[1:, :2].mean(1)
    ours = model.intercept_[2] - model.intercept_[:2].mean()
    assert relative.min() - 1e-5 <= ours <= relative.max() + 1e-5
    np.testing.assert_allclose(model.intercept_.sum(), 0, atol=1e-6)


# The choice.


def test_ties_go_to_the_strongest_penalty_in_any_order() -> None:
    X, y = iris()
    backwards = small(Cs=CS[::-1]).fit(X, y)
    np.testing.assert_allclose(backwards.scores_[:, ::-1], fitted().scores_, rtol=1e-6)
    assert backwards.C_ == fitted().C_
    tied = make_scorer(lambda y, p: 0.5)
    assert min(CS) == small(Cs=CS[::-1], scoring=tied).fit(X, y).C_
    assert min(CS) == small(scoring=lambda model, X, y: np.nan).fit(X, y).C_


def test_the_one_standard_error_rule() -> None:
    X, y = iris()
    scores = {0.01: [0.5, 0.5, 0.5], 1.0: [0.9, 0.9, 0.9], 100.0: [0.7, 1.0, 1.3]}

    def scorer(model: Any, X: Any, y: Any) -> float:
        return scores[model.C_].pop(0)

    model = small(scoring=scorer, one_standard_error=True).fit(X, y)  # the error is 0.17
    assert model.C_ == 1.0
    assert small(scoring=lambda model, X, y: model.C_).fit(X, y).C_ == 100.0
    with pytest.raises(ValueError, match="one_standard_error needs refit=True"):
        small(one_standard_error=True, refit=False).fit(X, y)


def test_a_fold_of_unseen_classes_alone_does_not_widen_the_standard_error() -> None:
    X, y = iris()
    rows = np.arange(150)
    splits = list(StratifiedKFold(3).split(X, y))
    lost = rows[y != 2], rows[y == 2]
    for rule in (False, True):
        without = small(Cs=10, cv=splits, one_standard_error=rule).fit(X, y)
        with_lost = small(Cs=10, cv=[*splits, lost], one_standard_error=rule).fit(X, y)
        assert np.isneginf(with_lost.scores_[-1]).all()
        assert with_lost.C_ == without.C_


def test_a_fit_that_diverged_has_no_score() -> None:
    class Diverging(SoftmaxRegressionCV):
        def _settled(self, fits: Any) -> Any:
            settled = super()._settled(fits)
            settled.status[0, 0] = Status.DIVERGED
            return settled

    X, y = iris()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = Diverging(CS, cv=3, scoring=lambda model, X, y: -model.C_).fit(X, y)
    np.testing.assert_array_equal(np.isnan(model.scores_), np.arange(9).reshape(3, 3) == 0)
    assert CS[1] == model.C_


def test_without_scoring_it_is_the_accuracy_and_weights_come_only_if_there_are_some() -> None:
    X, y = iris()
    by_name = small(scoring="accuracy").fit(X, y)
    np.testing.assert_array_equal(small(scoring=None).fit(X, y).scores_, by_name.scores_)
    assert small(scoring=None).fit(X, y).score(X, y) == by_name.score(X, y)
    given = []

    def scorer(model: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
        given.append(sample_weight is not None)
        return 0.0

    small(scoring=scorer).fit(X, y)
    assert not any(given)
    small(scoring=scorer).fit(X, y, sample_weight=np.ones(150))
    assert given[9:] == 9 * [True]


def test_scorers_are_called_with_models_of_each_fold_and_c() -> None:
    X, y = iris()
    calls = []

    def scorer(model: Any, X: Any, y: Any) -> float:
        calls.append((len(y), model.C_, model.predict(X).dtype))
        assert model.decision_function(X).shape == (len(y), 3)
        return float(model.C_ == 1.0)

    labels = np.array(["x", "yy", "zzz"])[y]
    model = small(scoring=scorer).fit(X, labels)
    assert model.C_ == 1.0
    assert calls == [(50, C, labels.dtype) for _ in range(3) for C in CS]
    by_name = small(scoring="neg_log_loss").fit(X, labels)
    by_scorer = small(
        scoring=make_scorer(log_loss, greater_is_better=False, response_method="predict_proba")
    )
    np.testing.assert_allclose(by_scorer.fit(X, labels).scores_, by_name.scores_, rtol=1e-7)
    np.testing.assert_allclose(by_name.score(X, labels), -log_loss(y, by_name.predict_proba(X)))


# How the fits ended.


def test_fits_that_have_not_converged_are_told_of_once() -> None:
    X, y = iris()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = small(max_iter=2).fit(X, y)
    assert [one.category for one in caught] == [ConvergenceWarning]
    message = str(caught[0].message)
    failed = model.statuses_ != Status.CONVERGED.name
    assert f"{failed.sum()} of the 12 fits have not converged. The worst, of " in message
    assert f"with gap {model.gaps_[failed].max():.1e} (tol=1e-06)" in message
    assert "Raise max_iter, now 2." in message
    assert model.statuses_.shape == model.gaps_.shape == (4, 3)
    assert (fitted().statuses_ == Status.CONVERGED.name).all()
    assert (fitted().gaps_ <= 1e-6).all()


def test_the_bar_counts_the_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = iris()
    monkeypatch.setattr("jaxsoftmax.estimator._grid._TICKS", 2)
    with_bar = small(Cs=CS[::-1], verbose=1).fit(X, y)
    output = capsys.readouterr()
    assert "16/16" in output.err  # two parts of two penalties
    assert f"SoftmaxRegressionCV: C={with_bar.C_:g}, CONVERGED with gap" in output.out
    without = small().fit(X, y)
    assert capsys.readouterr() == ("", "")
    np.testing.assert_allclose(with_bar.scores_[:, ::-1], without.scores_, rtol=1e-5)
    paths = with_bar.coefs_paths_[:, ::-1]
    np.testing.assert_allclose(paths, without.coefs_paths_, rtol=1e-3, atol=1e-4)
    assert with_bar.C_ == without.C_


def test_the_bar_without_tqdm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ModuleNotFoundError, match=r"'jaxsoftmax\[train\]', or pass verbose=0"):
        small(verbose=1).fit(*iris())


# What goes in, and scikit-learn's tools.


def test_precision_and_names_are_those_of_the_features() -> None:
    X, y = iris()
    frame = pd.DataFrame(X.astype(np.float32), columns=["a", "b", "c", "d"])
    model = small().fit(frame, np.array(["x", "y", "z"])[y])
    assert model.coef_.dtype == model.predict_proba(frame).dtype == np.float32
    assert model.feature_names_in_.tolist() == ["a", "b", "c", "d"]
    assert model.classes_.tolist() == ["x", "y", "z"]
    assert model.C_ == fitted().C_
    np.testing.assert_allclose(model.scores_, fitted().scores_, rtol=1e-4)
    np.testing.assert_allclose(model.predict_proba(frame), fitted().predict_proba(X), atol=1e-4)
    assert fitted().coef_.dtype == np.float64
    assert jax.config.read("jax_enable_x64") == X64


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"Cs": 0}, "The 'Cs' parameter"),
        ({"Cs": [1.0, -1.0]}, "Cs must be a number of values or a sequence of some above 0"),
        ({"Cs": []}, "Cs must be"),
        ({"Cs": [[1.0]]}, "Cs must be"),
        ({"cv": "three"}, "The 'cv' parameter"),
        ({"scoring": "best"}, "The 'scoring' parameter"),
        ({"refit": "C"}, "The 'refit' parameter"),
        ({"tol": 0.0}, "The 'tol' parameter"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**params).fit(*iris())


def test_no_penalty_is_an_infinite_c() -> None:
    X, y = iris()
    X = X[:, :2]
    model = small(Cs=[1.0, 100.0, np.inf], scoring=lambda model, X, y: model.C_)
    model.set_params(fit_intercept=False).fit(X, y)
    assert np.inf == model.C_
    assert model.coefs_paths_.shape == (3, 3, 3, 2)
    alone = SoftmaxRegression(C=np.inf, fit_intercept=False).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), alone.predict_proba(X), atol=1e-6)


def test_it_works_in_scikit_learns_tools() -> None:
    X, y = iris()
    pipeline = make_pipeline(StandardScaler(), small())
    scores = cross_val_score(pipeline, X, y, cv=2)  # by its scoring
    assert ((scores < 0) & (scores > -0.3)).all()
    grid = GridSearchCV(small(), {"class_weight": [None, "balanced"]}, cv=2, scoring="accuracy")
    assert grid.fit(X, y).best_score_ > 0.9
    assert clone(small(scoring="accuracy")).get_params() == small(scoring="accuracy").get_params()
    assert "SoftmaxRegressionCV" in fitted()._repr_html_()


# Files.


@pytest.mark.parametrize("refit", [True, False])
def test_a_saved_model_comes_back_exactly(refit: bool, tmp_path: Path) -> None:
    X, y = iris()
    model = small(Cs=np.array(CS), refit=refit, class_weight={0: 2.0}).fit(X, y)
    path = tmp_path / "model.safetensors"
    model.save(path)
    for loaded in (SoftmaxRegressionCV.load(path), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
        assert loaded.score(X, y) == model.score(X, y)
        fitted_attributes = {name for name in vars(model) if name.endswith("_")}
        assert {name for name in vars(loaded) if name.endswith("_")} == fitted_attributes
        for name in fitted_attributes:
            value = getattr(loaded, name)
            np.testing.assert_array_equal(value, getattr(model, name))
            assert np.asarray(value).dtype == np.asarray(getattr(model, name)).dtype
        np.testing.assert_array_equal(loaded.Cs, CS)
    with pytest.raises(ValueError, match="holds a SoftmaxRegressionCV, not a SoftmaxRegression"):
        SoftmaxRegression.load(path)


@pytest.mark.parametrize("params", [{"cv": KFold(3)}, {"scoring": make_scorer(log_loss)}])
def test_what_needs_pickle_is_not_saved(params: dict[str, Any], tmp_path: Path) -> None:
    model = pickle.loads(pickle.dumps(fitted())).set_params(**params)
    with pytest.raises(TypeError, match=f"{next(iter(params))}=.* cannot be saved without pickle"):
        model.save(tmp_path / "model.safetensors")
    model.set_params(cv=3, scoring="accuracy").save(tmp_path / "model.safetensors")
