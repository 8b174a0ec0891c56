"""The scikit-learn classifier that chooses its penalty by cross-validation."""

import reprlib
import warnings
from collections.abc import Callable
from inspect import signature
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import get_scorer, get_scorer_names, make_scorer
from sklearn.model_selection import check_cv
from sklearn.utils._param_validation import Interval, StrOptions

from jaxsoftmax._progress import progress_bar
from jaxsoftmax.estimator._classifier import Examples, SoftmaxClassifier
from jaxsoftmax.estimator._conversions import (
    Numbers,
    double,
    padded,
    penalty,
    scikit_learns,
    solver_tol,
)
from jaxsoftmax.regression._fit import SOLVERS, check_arguments
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._result import Fit, Status
from jaxsoftmax.regression._validation import Scores, validate

_TIE = 64  # units of rounding within which scores are equal
_TICKS = 8  # of a progress bar, at most: each begins its part of the path anew


class _Grid(NamedTuple):
    """Fits with axes (folds + 1, Cs), the last those of all examples; scores (folds, Cs)."""

    fits: Fit
    scores: Scores


class SoftmaxRegressionCV(SoftmaxClassifier):
    r"""Multinomial logistic regression whose penalty is chosen by cross-validation.

    .. math:: \hat C = \arg\max_C \operatorname{mean}_f
              \operatorname{score}\big(\hat W_{f, C};\; \text{held-out examples of fold } f\big)

    with :math:`\hat W_{f, C}` the fit of the other examples as of `SoftmaxRegression(C=C)`: what
    scikit-learn's `LogisticRegressionCV` computes, whose attributes it has. The fits of all folds
    and values of C, and those of all examples, are one compiled program. They advance together
    along the path of penalties, each certified by itself.

    Among equal scores the strongest penalty is chosen. A class that a fold has not seen has
    probability 0 there, so that its log-loss is infinite if it holds out an example of that class:
    `scores_` says so, and the choice is made without such examples. A log-loss is not clipped, as
    that of scikit-learn's scorers is, which `score` gives. NaN is the worst of scores.

    The weights of the classes count in fits, not in scores; "balanced" ones are those of all
    examples, and the penalty of two classes is that of `SoftmaxRegression` in a fold that has seen
    only one as well; both as in `LogisticRegressionCV`.

    Parameters:
      Cs: inverse strengths of the penalty, above 0, in any order; `numpy.inf` for none. A number
        stands for as many from 1e-4 to 1e4, in equal steps of their logarithm.
      cv: number of folds, a splitter of scikit-learn, or an iterable of indices (fitted, held out).
        They may leave examples out, and hold out some more than once. None for 5 folds with equal
        shares of the classes.
      scoring: what to choose by, as in scikit-learn: a name, `scorer(estimator, X, y)`, or None for
        "accuracy". "neg_log_loss", "accuracy" and "neg_brier_score" are computed beside the fits.
        Any other is called for every fold and C with a fitted classifier, which is slower, and with
        the weights of the examples if there are some and it takes `sample_weight`.
      refit: whether the model is the fit of all examples under the chosen C. Otherwise its
        coefficients and `C_` are averages over the folds of what is the best in each.
      one_standard_error: whether to choose the smallest C whose mean score is within one standard
        error of the best; not without `refit`.
      fit_intercept, class_weight, tol, max_iter, solver: as in `SoftmaxRegression`.
      verbose: above 0, `fit` shows a progress bar, which needs `jaxsoftmax[train]`, and prints how
        it ended. For the bar the path is cut into at most 8 parts that begin anew, which takes a
        little longer.

    Attributes:
      C_: the chosen C.
      Cs_: all of them.
      scores_: (folds, Cs), the larger the better.
      coefs_paths_: coefficients of the folds, (folds, Cs, classes, features), for two classes with
        one row; one feature more if there is an intercept, which comes last. As `scores_` and
        `n_iter_` it has no axis of the L1 ratios that scikit-learn has.
      n_iter_: iterations of the solver (folds, Cs).
      gaps_, statuses_: `gap_` and `status_` of all fits, (folds + 1, Cs); the last row is that of
        all examples.
      gap_, status_: those of the chosen fit; without `refit`, of the worst of those averaged.
      coef_, intercept_, classes_, n_features_in_, feature_names_in_: as in `SoftmaxRegression`.

    Example:
      >>> from sklearn.datasets import load_iris
      >>> from jaxsoftmax.estimator import SoftmaxRegressionCV
      >>> X, y = load_iris(return_X_y=True)
      >>> model = SoftmaxRegressionCV(Cs=[0.01, 1, 100, 10000]).fit(X, y)
      >>> model.C_
      100.0
      >>> print(model.scores_.mean(0).round(2))
      [-0.64 -0.14 -0.06 -0.1 ]

    Reference:
      Hastie, Tibshirani, Friedman (2009), The Elements of Statistical Learning, section 7.10.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "Cs": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "cv": ["cv_object"],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "refit": ["boolean"],
        "one_standard_error": ["boolean"],
        "fit_intercept": ["boolean"],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "tol": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "solver": [StrOptions(set(SOLVERS))],
        "verbose": ["verbose"],
    }
    _arrays = (
        *SoftmaxClassifier._arrays,
        "Cs_",
        "scores_",
        "coefs_paths_",
        "n_iter_",
        "gaps_",
    )
    _fitted = (
        "classes_",
        "C_",
        "gap_",
        "status_",
        "statuses_",
        "n_features_in_",
        "feature_names_in_",
    )

    def __init__(
        self,
        Cs: Any = 10,
        *,
        cv: Any = None,
        scoring: Any = "neg_log_loss",
        refit: bool = True,
        one_standard_error: bool = False,
        fit_intercept: bool = True,
        class_weight: Any = None,
        tol: float = 1e-6,
        max_iter: int = 100,
        solver: str = "auto",
        verbose: int = 0,
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.one_standard_error = one_standard_error
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.solver = solver
        self.verbose = verbose

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None
    ) -> "SoftmaxRegressionCV":
        """Fit and judge every C in every fold, and choose one.

        Args:
          X: (examples, features), an array or a frame.
          y: (examples,), labels: strings, booleans, integers, or a categorical column.
          sample_weight: (examples,), not negative, for fits and scores; 0 for no example.
          groups: (examples,), for a `cv` that keeps groups together, such as `GroupKFold`.

        Returns:
          The fitted model.

        Raises:
          ValueError: as `SoftmaxRegression.fit`; an entry of `Cs` is not above 0; or a fold fits or
            holds out no example of positive weight, one of them twice, or one of them both.
          TypeError: `X` is sparse.
          ModuleNotFoundError: `verbose` is above 0 and tqdm is not installed.

        Warns:
          ConvergenceWarning: some of the fits have not converged; how many, how far the worst of
            them came, and what may help.
        """
        self._validate_params()
        Cs = _strengths(self.Cs)
        if self.one_standard_error and not self.refit:
            raise ValueError("one_standard_error needs refit=True: a fold has no standard error")
        examples = self._prepared(X, y, sample_weight)
        counts = self._weights(sample_weight, None, examples.X, examples.y)
        splits = check_cv(self.cv, examples.y, classifier=True).split(
            examples.X, examples.y, groups
        )
        masks = _masks(list(splits), counts, examples.weight)
        fitted, held_out = np.vstack([masks == 0, np.ones(len(counts), bool)]), masks == 1
        l2s = penalty(Cs, (fitted @ examples.weight)[:, None], examples.present)
        grid = self._grid(
            examples, _relative(fitted * examples.weight), _relative(held_out * counts), l2s
        )
        fits = self._settled(grid.fits)
        self.Cs_ = Cs
        compiled = self._compiled(grid.scores)
        scoring = self._scoring
        if isinstance(scoring, str) and scoring in compiled:
            self.scores_ = compiled[scoring]
        else:
            weight = None if sample_weight is None else counts
            held_out &= counts > 0
            self.scores_ = self._by_scorer(fits, held_out, examples.X, examples.y, weight)
        self._set_grid(fits)
        # A loss that no C can make finite is none to choose by.
        known = self.scores_
        if scoring == "neg_log_loss":
            known = -np.asarray(grid.scores.known_log_loss, np.float64)
        self._set_choice(fits, known)
        if self.verbose:
            print(f"{type(self).__name__}: C={self.C_:g}, {self.status_} with gap {self.gap_:.1e}")
        if (self.statuses_ != Status.CONVERGED.name).any():
            warnings.warn(self._complaint(fits, examples, masks), ConvergenceWarning, stacklevel=2)
        return self

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The score by `scoring`, as of scikit-learn's searches and of `LogisticRegressionCV`.

        Args:
          X: (examples, features), an array or a frame.
          y: (examples,), the true labels.
          sample_weight: (examples,), if the scorer takes them.

        Returns:
          The score, the larger the better.

        Raises:
          NotFittedError: there was no `fit` yet.
          ValueError: the features do not fit those of `fit`, or the scorer refuses the labels.
        """
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        return self._scorer()(self, X, y, **weights)

    def _grid(self, examples: Examples, fitted: Numbers, held_out: Numbers, l2s: Numbers) -> _Grid:
        """Fits with the weights `fitted` (folds + 1, examples) under penalties (folds + 1, Cs), and
        their scores with the weights `held_out` (folds, examples)."""
        dtype = examples.X.dtype
        features, labels, *weights = padded(
            examples.X, examples.labels, fitted.T.astype(dtype), held_out.T.astype(dtype)
        )
        with double(dtype):
            arguments, static = check_arguments(
                features,
                labels,
                num_classes=len(self.classes_),
                l2=jnp.asarray(l2s),
                sample_weight=None,
                offset=None,
                init=None,
                fit_bias=bool(self.fit_intercept),
                solver=self.solver,
                tol=solver_tol(self.tol, dtype),
                max_iter=self.max_iter,
            )
            of_fits, of_scores = (jnp.asarray(weight.T) for weight in weights)
            penalties = np.asarray(arguments.l2)

            def run(penalties: Any) -> _Grid:
                result = validate(arguments, jnp.asarray(penalties), of_fits, of_scores, **static)
                return _Grid(*jax.device_get(result))

            return _in_parts(run, penalties) if self.verbose else run(penalties)

    def _compiled(self, scores: Scores) -> dict[str, Numbers]:
        """Those of the compiled program by scikit-learn's names, the larger the better."""
        log_loss, _, accuracy, brier = (np.asarray(value, np.float64) for value in scores)
        if len(self.classes_) == 2:
            brier = brier / 2  # as scikit-learn's
        return {"neg_log_loss": -log_loss, "accuracy": accuracy, "neg_brier_score": -brier}

    def _by_scorer(
        self, fits: Fit, held_out: Numbers, X: Numbers, y: Numbers, weight: Numbers | None
    ) -> Numbers:
        """The scores (folds, Cs) that `scoring` gives every model for what it has not seen; NaN for
        a fit that diverged."""
        scorer = self._scorer()
        takes = signature(getattr(scorer, "_score_func", scorer)).parameters
        scores = np.full((len(held_out), len(self.Cs_)), np.nan)
        for fold, index in np.argwhere(fits.status[:-1] != Status.DIVERGED):
            rows = held_out[fold]
            params = Params(*(value[fold, index] for value in fits.params))
            model = self._model_of(params, float(self.Cs_[index]))
            weights = {}
            if weight is not None and "sample_weight" in takes:
                weights["sample_weight"] = weight[rows]
            scores[fold, index] = scorer(model, X[rows], y[rows], **weights)
        return scores

    def _model_of(self, params: Params, C: float) -> "SoftmaxRegressionCV":
        """A fitted model of one C for a scorer to ask. Many scorers refuse infinite logits: those
        of absent classes are so low that their probability is 0."""
        lowest = np.finfo(params.bias.dtype).min / 4
        params = params._replace(bias=np.maximum(params.bias, lowest))
        model = SoftmaxRegressionCV([C], fit_intercept=self.fit_intercept)
        model.classes_, model.n_features_in_, model.C_ = self.classes_, self.n_features_in_, C
        model._set_model(params)
        return model

    @property
    def _scoring(self) -> Any:
        return "accuracy" if self.scoring is None else self.scoring

    def _scorer(self) -> Any:
        """`scoring`, told of all classes where it asks, since a fold may lack some."""
        scorer = get_scorer(self._scoring)
        function = getattr(scorer, "_score_func", None)
        takes = signature(function).parameters if function else {}
        if "labels" not in takes:
            return scorer
        known = {"labels": self.classes_}
        if "pos_label" in takes and len(self.classes_) == 2:
            known["pos_label"] = self.classes_[1]
        return make_scorer(
            function,
            greater_is_better=scorer._sign > 0,
            response_method=scorer._response_method,
            **known | scorer._kwargs,
        )

    def _set_grid(self, fits: Fit) -> None:
        """The attributes that tell of all fits."""
        weights, bias = scikit_learns(Params(*(value[:-1] for value in fits.params)))
        ends = [bias[..., None]] if self.fit_intercept else []
        self.coefs_paths_ = np.concatenate([weights, *ends], -1)
        self.n_iter_ = fits.iterations[:-1]
        self.gaps_ = fits.gap
        self.statuses_ = np.vectorize(lambda status: Status(status).name)(fits.status)

    def _set_choice(self, fits: Fit, scores: Numbers) -> None:
        """The chosen penalty and its model."""
        if self.refit:
            index = self._chosen(scores)
            self.C_ = float(self.Cs_[index])
            fold, params = -1, Params(*(value[-1, index] for value in fits.params))
        else:
            folds = np.arange(len(scores))
            best = np.array([self._chosen(of_fold[None]) for of_fold in scores])
            self.C_ = float(self.Cs_[best].mean())
            fold = int(self.gaps_[folds, best].argmax())
            index = best[fold]
            params = _averaged(Params(*(value[folds, best] for value in fits.params)))
        self._set_model(params)
        self.gap_, self.status_ = float(self.gaps_[fold, index]), str(self.statuses_[fold, index])

    def _chosen(self, scores: Numbers) -> int:
        """Index of the strongest penalty whose mean score is the best, or near it if asked. A fold
        does not count whose scores are all -inf."""
        some = ~np.isneginf(scores).all(1)
        scores = scores[some] if some.any() else scores
        mean = scores.mean(0)
        mean[np.isnan(mean)] = -np.inf
        best = mean.argmax()
        slack = 0.0
        if np.isfinite(mean[best]):
            slack = _TIE * float(np.finfo(self.coefs_paths_.dtype).eps) * abs(mean[best])
            if self.one_standard_error and len(scores) > 1:
                slack += scores[:, best].std(ddof=1) / np.sqrt(len(scores))
        near = np.flatnonzero(mean >= mean[best] - slack)
        return int(near[self.Cs_[near].argmin()])

    def _complaint(self, fits: Fit, examples: Examples, masks: Numbers) -> str:
        """Which fits have not converged, and what may help the worst of them."""
        failed = fits.status != Status.CONVERGED
        fold, index = np.unravel_index(np.where(failed, fits.gap, -1).argmax(), failed.shape)
        worst = jax.tree.map(lambda value: value[fold, index], fits)
        if fold < len(masks):
            fitted = masks[fold] == 0
            where, examples = f"fold {fold}", examples._replace(share=examples.share * fitted)
        else:
            where = "all examples"
        C = float(self.Cs_[index])
        return (
            f"{failed.sum()} of the {failed.size} fits have not converged. The worst, of {where} "
            f"at C={C:g}: {self._summary(worst)}. {self._advice(worst, C, examples)}"
        )


def _strengths(Cs: Any) -> Numbers:
    """`Cs` as numbers."""
    if isinstance(Cs, Integral):
        return np.logspace(-4, 4, int(Cs))
    values = np.asarray(Cs, np.float64)
    if values.ndim != 1 or not values.size or not (values > 0).all():
        raise ValueError(
            f"Cs must be a number of values or a sequence of some above 0, got {reprlib.repr(Cs)}"
        )
    return values


def _masks(splits: list[Any], counts: Numbers, weight: Numbers) -> Numbers:
    """Splits as masks (folds, examples): 1 held out, 0 fitted, -1 neither.

    `counts` are weights in scores, `weight` those in fits.
    """
    rows = np.arange(len(counts))
    masks = np.full((len(splits), len(rows)), -1, np.int8)
    for fold, (mask, (fitted, held_out)) in enumerate(zip(masks, splits, strict=True)):
        mask[fitted], mask[held_out] = 0, 1
        for chosen, value, of, verb in (
            (fitted, 0, weight, "fit"),
            (held_out, 1, counts, "hold out"),
        ):
            if (mask == value).sum() < len(rows[chosen]):
                raise ValueError(
                    f"Fold {fold} of cv must {verb} an example once, and not fit what it holds "
                    "out; for more weight, use sample_weight."
                )
            if not of[mask == value].any():
                raise ValueError(f"Fold {fold} of cv must {verb} an example of positive weight.")
    return masks


def _relative(weights: Numbers) -> Numbers:
    """In units of the largest of each row, so that float32 holds them."""
    return weights / weights.max(1, keepdims=True)


def _in_parts(run: Callable[[Numbers], _Grid], l2s: Numbers) -> _Grid:
    """`run` on parts of the path of one size, from strong to weak penalties, with a bar."""
    order = np.argsort(-l2s[-1])
    size = -(-len(order) // _TICKS)
    whole = np.pad(order, (0, -len(order) % size), mode="edge")
    parts = []
    with progress_bar(len(whole) * len(l2s), "fit", "verbose", 0) as bar:
        for some in np.split(whole, len(whole) // size):
            parts.append(run(l2s[:, some]))
            bar.update(some.size * len(l2s))
    back = np.argsort(order)
    grid: _Grid = jax.tree.map(lambda *values: np.concatenate(values, 1)[:, back], *parts)
    return grid


def _averaged(folds: Params) -> Params:
    """The mean over folds, for each class over those that have seen it.

    A vector that is added to all classes changes no probability. So that it does not matter where a
    fold lacks a class, each is taken relative to the classes that all have seen.
    """
    seen = folds.bias > -np.inf
    common = seen.all(0)

    def mean(values: Any) -> Any:
        of = seen.reshape(*seen.shape, *[1] * (values.ndim - 2))
        if common.any():
            values = values - values[:, common].mean(1, keepdims=True)
        total = np.where(of, values, 0).sum(0) / np.maximum(of.sum(0), 1)
        present = of.any(0)
        centre = total.sum(0) / present.sum()
        return np.where(present, total - centre, 0)

    weights, bias = mean(folds.weights), mean(folds.bias)
    bias[~seen.any(0)] = -np.inf
    return Params(*(value.astype(folds.bias.dtype) for value in (weights, bias)))
