"""The scikit-learn classifier that chooses its penalty by cross-validation."""

import warnings
from inspect import signature
from numbers import Integral, Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import get_scorer_names
from sklearn.model_selection import check_cv
from sklearn.utils._param_validation import Interval, StrOptions

from jaxsoftmax.estimator._classifier import SoftmaxClassifier
from jaxsoftmax.estimator._conversions import (
    Examples,
    Numbers,
    double,
    padded,
    penalty,
    scikit_learns,
    solver_tol,
)
from jaxsoftmax.estimator._grid import (
    Grid,
    averaged,
    in_parts,
    relative,
    scorer_of,
    split_masks,
    strengths,
)
from jaxsoftmax.regression._fit import SOLVERS, check_arguments
from jaxsoftmax.regression._folds import choose
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._result import Fit, Status
from jaxsoftmax.regression._validation import Scores, validate


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
        means as many from 1e-4 to 1e4, in equal steps of their logarithm.
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
    _arrays = (*SoftmaxClassifier._arrays, "Cs_", "scores_", "coefs_paths_", "n_iter_", "gaps_")
    _fitted = (*SoftmaxClassifier._fitted, "C_", "statuses_")

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
        Cs = strengths(self.Cs)
        if self.one_standard_error and not self.refit:
            raise ValueError("one_standard_error needs refit=True: a fold has no standard error")
        examples = self._prepared(X, y, sample_weight)
        counts = self._weights(sample_weight, None, examples.X, examples.y)
        splits = check_cv(self.cv, examples.y, classifier=True).split(
            examples.X, examples.y, groups
        )
        masks = split_masks(list(splits), counts, examples.weight)
        fitted, held_out = np.vstack([masks == 0, np.ones(len(counts), bool)]), masks == 1
        l2s = penalty(Cs, (fitted @ examples.weight)[:, None], examples.present)
        grid = self._grid(
            examples, relative(fitted * examples.weight), relative(held_out * counts), l2s
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
        return scorer_of(self._scoring, self.classes_)(self, X, y, **weights)

    def _grid(self, examples: Examples, fitted: Numbers, held_out: Numbers, l2s: Numbers) -> Grid:
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

            def run(penalties: Any) -> Grid:
                result = validate(arguments, jnp.asarray(penalties), of_fits, of_scores, **static)
                return Grid(*jax.device_get(result))

            return in_parts(run, penalties) if self.verbose else run(penalties)

    def _compiled(self, scores: Scores) -> dict[str, Numbers]:
        """The compiled program's scores by scikit-learn's names, the larger the better."""
        log_loss, _, accuracy, brier = (np.asarray(value, np.float64) for value in scores)
        if len(self.classes_) == 2:
            brier = brier / 2  # as scikit-learn's
        return {"neg_log_loss": -log_loss, "accuracy": accuracy, "neg_brier_score": -brier}

    def _by_scorer(
        self, fits: Fit, held_out: Numbers, X: Numbers, y: Numbers, weight: Numbers | None
    ) -> Numbers:
        """The scores (folds, Cs) that `scoring` gives every model for what it has not seen; NaN for
        a fit that diverged."""
        scorer = scorer_of(self._scoring, self.classes_)
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
            params = averaged(Params(*(value[folds, best] for value in fits.params)))
        self._set_model(params)
        self.gap_, self.status_ = float(self.gaps_[fold, index]), str(self.statuses_[fold, index])

    def _chosen(self, scores: Numbers) -> int:
        """Index of the chosen penalty."""
        eps = float(np.finfo(self.coefs_paths_.dtype).eps)
        return int(choose(-scores, 1 / self.Cs_, eps)[int(self.one_standard_error)])

    def _complaint(self, fits: Fit, examples: Examples, masks: Numbers) -> str:
        """A warning of fits that have not converged, with advice for the worst of them."""
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
