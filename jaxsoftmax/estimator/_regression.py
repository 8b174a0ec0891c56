"""The scikit-learn classifier with a given penalty."""

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import unique_labels

from jaxsoftmax import training
from jaxsoftmax.estimator._classifier import SoftmaxClassifier
from jaxsoftmax.estimator._conversions import Numbers, double, padded, penalty, solver_tol
from jaxsoftmax.regression._fit import SOLVERS, fit
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._result import Fit, Status

# AdaGrad starts with a step of this size for every coefficient, and the steps fall with the
# gradients that it has seen. Of AdaGrad at 0.1 and 0.3 and a few rates of Adam and SGD, one of the
# former was the nearest to the optimum, or nearly, on most of five sets of data; on some, Adam at
# 0.01 to 0.03 was nearer.
_OPTIMIZER = optax.adagrad(0.2, initial_accumulator_value=0.0)


class _OptimizerState(NamedTuple):
    """The state of `partial_fit` in NumPy arrays, which pickle in any precision."""

    opt_state: Any
    step: Any


class SoftmaxRegression(SoftmaxClassifier):
    r"""Multinomial logistic regression, fitted by Newton's method to a certified optimum.

    .. math:: \min_{W, b}\; C \sum_i s_i\, \ell(W x_i + b,\, y_i) + \tfrac12 \|W\|^2

    with the cross-entropy :math:`\ell`, examples x, labels y and weights s (`sample_weight` times
    `class_weight`): the problem of scikit-learn's `LogisticRegression(C=C)`, with its probabilities
    and its attributes. In the terms of `jaxsoftmax.fit` it is `l2 = 1 / (C * sum(s))`. For two
    classes scikit-learn penalises the one row w that is the difference of ours, -w/2 and w/2:
    :math:`\|w\|^2 = 2 \|W\|^2`, so there `l2 = 2 / (C * sum(s))`.

    An example of weight 0 is no example. A class of which there is no other has probability 0 and
    intercept -inf.

    float32 features give float32 coefficients and probabilities, all others float64, whether or not
    `jax_enable_x64` is set. Frames of pandas, polars and Arrow and arrays of NumPy, JAX and torch
    (on the CPU) are taken. Sparse matrices are not.

    Parameters:
      C: inverse strength of the penalty, above 0; `numpy.inf` for none.
      fit_intercept: whether to fit the intercept; without, it is 0.
      class_weight: a dict from class to weight, "balanced" for weights inverse to the weighted
        counts of the classes, or None for 1.
      tol: bound on (objective - minimum) / objective at which a fit counts as converged. It goes on
        to the square of it where the precision of the dtype allows, usually by one more iteration:
        an objective that is off by a share d leaves probabilities off by sqrt(d).
      max_iter: the most iterations of the solver.
      solver: "auto", "newton_cg" or "lbfgs", as in `jaxsoftmax.fit`.
      warm_start: whether `fit` starts from the last fit, if it had the same classes and number of
        features. The optimum is the same.
      verbose: above 0, `fit` prints how it ended.

    Attributes:
      coef_: weights (classes, features); for two classes (1, features).
      intercept_: bias (classes,); for two classes (1,).
      classes_: the labels, sorted.
      n_iter_: iterations of the solver, of shape (1,); after `partial_fit`, its steps.
      gap_: certified bound on (objective - minimum) / objective; not after `partial_fit`.
      status_: the name of a `jaxsoftmax.Status`, such as "CONVERGED"; not after `partial_fit`.
      n_features_in_: number of features.
      feature_names_in_: names of the features, if `X` had names that are all strings.

    Example:
      >>> from sklearn.datasets import load_iris
      >>> from jaxsoftmax.estimator import SoftmaxRegression
      >>> X, y = load_iris(return_X_y=True)
      >>> model = SoftmaxRegression().fit(X, y)
      >>> model.predict_proba(X[:2]).round(3)
      array([[0.982, 0.018, 0.   ],
             [0.971, 0.029, 0.   ]])
      >>> round(model.score(X, y), 3)
      0.973
      >>> model.status_
      'CONVERGED'
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "C": [Interval(Real, 0, None, closed="right")],
        "fit_intercept": ["boolean"],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "tol": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "solver": [StrOptions(set(SOLVERS))],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
    }

    _weight_seen: float = 0.0
    _optimizer_state: _OptimizerState | None = None

    _fitted = (*SoftmaxClassifier._fitted, "n_iter_", "_weight_seen")

    def __init__(
        self,
        C: float = 1.0,
        *,
        fit_intercept: bool = True,
        class_weight: Any = None,
        tol: float = 1e-6,
        max_iter: int = 100,
        solver: str = "auto",
        warm_start: bool = False,
        verbose: int = 0,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.solver = solver
        self.warm_start = warm_start
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "SoftmaxRegression":
        """Fit to all examples at once.

        Args:
          X: (examples, features), an array or a frame.
          y: (examples,), labels: strings, booleans, integers, or a categorical column.
          sample_weight: (examples,), not negative; weight 2 equals a repeated example, 0 none.

        Returns:
          The fitted model.

        Raises:
          ValueError: a parameter is invalid; shapes do not fit; `X` or `y` has missing or infinite
            values; there is only one class; or a weight is negative or all are 0.
          TypeError: `X` is sparse.

        Warns:
          ConvergenceWarning: the fit has not converged, with how far it came and what may help.
        """
        self._validate_params()
        last = self._last() if self.warm_start else None
        examples = self._prepared(X, y, sample_weight)
        X, total = examples.X, float(examples.weight.sum())
        features, labels, weights = padded(X, examples.labels, examples.share)
        with double(X.dtype):
            result: Fit = jax.device_get(
                fit(
                    features,
                    labels,
                    num_classes=len(self.classes_),
                    l2=penalty(self.C, total, examples.present),
                    sample_weight=weights,
                    init=self._start(last, X.shape[1], X.dtype),
                    fit_bias=bool(self.fit_intercept),
                    solver=self.solver,
                    tol=solver_tol(self.tol, X.dtype),
                    max_iter=self.max_iter,
                )
            )
        result = self._settled(result)
        self._set_model(result.params)
        self.n_iter_ = np.array([result.iterations])
        self.gap_ = float(result.gap)
        self.status_ = Status(int(result.status)).name
        self._weight_seen, self._optimizer_state = total, None
        if self.verbose:
            print(f"{type(self).__name__}: {self._summary(result)}")
        if result.status != Status.CONVERGED:
            warnings.warn(
                f"The fit has not converged: {self._summary(result)}. "
                f"{self._advice(result, self.C, examples)}",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> "SoftmaxRegression":
        r"""Take one step of an optimiser on one batch, for data that do not fit in memory.

        The step descends the batch's mean loss plus the penalty of `C` for all weight S seen so
        far, this batch's included: :math:`\tfrac{1}{2CS} \|W\|^2`. So a stream of which every
        example comes once has in the end the problem of `fit`. The optimiser is AdaGrad at rate
        0.2, whose step for a coefficient falls with the gradients that it has seen: it needs no
        schedule, and columns of another scale take steps of another size. After a `fit` or a
        `load` it goes on from the coefficients.

        Batches of a few dozen to a few thousand examples in random order, and columns of scale 1,
        serve it best; `jaxsoftmax.training` has any other optimiser.

        Args:
          X: (batch, features), an array or a frame.
          y: (batch,), labels, all of `classes`.
          classes: all labels that may come; needed in the first call.
          sample_weight: (batch,), not negative; weight 2 equals a repeated example.

        Returns:
          The model after the step.

        Raises:
          ValueError: as `fit`, except for a single class; `classes` is missing in the first call,
            or another than before; or `y` has a label that is not among them, which is named.
          TypeError: `X` is sparse.

        Example:
          >>> import numpy as np
          >>> from jaxsoftmax.estimator import SoftmaxRegression
          >>> model = SoftmaxRegression()
          >>> for _ in range(20):
          ...     X = np.array([[-1.0], [0.5], [2.0]])
          ...     model = model.partial_fit(X, ["a", "b", "b"], classes=["a", "b"])
          >>> model.predict([[-2.0], [1.0]])
          array(['a', 'b'], dtype='<U1')

        Reference:
          Duchi, Hazan, Singer (2011), Adaptive subgradient methods for online learning and
          stochastic optimization, figure 1.
        """
        self._validate_params()
        if self.class_weight == "balanced":
            raise ValueError(
                "class_weight 'balanced' is not supported for partial_fit, which does not see all "
                "examples; pass a dict"
            )
        last = self._last()
        known = self._known_classes(classes, last)
        X, y = self._examples(X, y, reset=last is None)
        self.classes_ = known
        labels = self._encoded(y)
        weight = self._weights(sample_weight, self.class_weight, X, y)
        dtype = X.dtype if last is None else self.coef_.dtype
        seen = self._weight_seen + float(weight.sum())
        with double(dtype):
            params = self._start(last, X.shape[1], dtype)
            before = self._optimizer_state or _OptimizerState(
                _OPTIMIZER.init(jax.tree.map(jnp.asarray, params)), np.int32(0)
            )
            state: Any = training.TrainState(params, *before)
            if weight.any():  # else the classes of the batch have weight 0, and it says nothing
                share = (weight / weight.max()).astype(dtype)
                state, _ = training.train_step(
                    state,
                    *padded(X.astype(dtype, copy=False), labels, share),
                    optimizer=_OPTIMIZER,
                    l2=penalty(self.C, seen, len(known)),
                )
            state = jax.device_get(state)
        # Its steps are those of each coefficient alone, so the others are as without a bias.
        bias = state.params.bias if self.fit_intercept else np.zeros_like(state.params.bias)
        self._set_model(Params(state.params.weights, bias))
        self._weight_seen = seen
        self._optimizer_state = _OptimizerState(state.opt_state, state.step)
        self.n_iter_ = np.array([state.step])
        for certificate in {"gap_", "status_"} & set(vars(self)):
            delattr(self, certificate)
        return self

    def _last(self) -> tuple[Numbers, Params] | None:
        """Classes and parameters of the last fit."""
        return (self.classes_, self._model()) if hasattr(self, "coef_") else None

    def _start(self, last: tuple[Numbers, Params] | None, width: int, dtype: Any) -> Params:
        """Parameters to start from: the last ones where they fit, else 0."""
        weights: Any = np.zeros((len(self.classes_), width), dtype)
        bias: Any = np.zeros(len(self.classes_), dtype)
        if last is not None and np.array_equal(last[0], self.classes_):
            params = last[1]
            if params.weights.shape == weights.shape and np.isfinite(params.weights).all():
                # The bias of a class without examples is -inf, and now it may have some.
                finite = np.where(np.isfinite(params.bias), params.bias, 0)
                weights, bias = params.weights.astype(dtype), finite.astype(dtype)
        return Params(weights, bias)

    def _known_classes(self, classes: Any, last: Any) -> Numbers:
        """All classes that a batch may have, from the first call on."""
        if classes is None:
            if last is None:
                raise ValueError("classes must be passed on the first call to partial_fit.")
            return self.classes_
        known: Numbers = unique_labels(np.asarray(classes))
        if last is not None and not np.array_equal(known, self.classes_):
            raise ValueError(
                f"`classes={classes!r}` is not the same as on last call to partial_fit, was: "
                f"{self.classes_!r}"
            )
        if len(known) < 2:
            raise ValueError(f"classes must be at least 2, got {known.tolist()}")
        return known
