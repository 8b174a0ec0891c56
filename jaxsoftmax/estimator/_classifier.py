"""The common base of the scikit-learn classifiers: checks, predictions, saving, warnings."""

import json
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from jaxsoftmax._runtime import precise
from jaxsoftmax.estimator import _persistence
from jaxsoftmax.estimator._advice import advice
from jaxsoftmax.estimator._conversions import (
    Examples,
    Numbers,
    double,
    float_dtypes,
    known_labels,
    padded,
    scikit_learns,
)
from jaxsoftmax.functional import log_softmax, softmax
from jaxsoftmax.regression._params import Params, linear_logits
from jaxsoftmax.regression._result import Fit, Status

_Model = TypeVar("_Model", bound="SoftmaxClassifier")


class SoftmaxClassifier(ClassifierMixin, BaseEstimator):
    """A fitted linear softmax model with scikit-learn's attributes and methods."""

    coef_: Any
    intercept_: Any
    classes_: Numbers
    fit_intercept: bool
    class_weight: Any
    tol: float
    max_iter: int

    # Attributes of a fitted model, which `save` writes where they are present: those that are
    # arrays of numbers as such, the others in the header.
    _arrays: tuple[str, ...] = ("coef_", "intercept_")
    _fitted: tuple[str, ...] = (
        "classes_",
        "gap_",
        "status_",
        "n_features_in_",
        "feature_names_in_",
    )

    def decision_function(self, X: Any) -> Numbers:
        """The logits (examples, classes); for two classes, (examples,), that of `classes_[1]` less
        that of `classes_[0]`.

        Args:
          X: (examples, features), an array or a frame.

        Returns:
          Logits, in the wider dtype of `coef_` and `X`.

        Raises:
          NotFittedError: there was no `fit` yet.
          ValueError: the features do not fit those of `fit` in number or name, or hold NaN.
          TypeError: `X` is sparse.
        """
        logits = self._outputs(X, None)
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def predict(self, X: Any) -> Numbers:
        """The likeliest class of each example; arguments and errors of `decision_function`."""
        logits = self.decision_function(X)
        index = (logits > 0).astype(np.intp) if logits.ndim == 1 else logits.argmax(1)
        return self.classes_[index]

    def predict_proba(self, X: Any) -> Numbers:
        """Class probabilities (examples, classes); arguments and errors of `decision_function`."""
        return self._outputs(X, softmax)

    def predict_log_proba(self, X: Any) -> Numbers:
        """Logarithms of `predict_proba` that do not underflow; -inf for an absent class."""
        return self._outputs(X, log_softmax)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the fitted model to a safetensors file with a JSON header, without pickle.

        It holds parameters and attributes, but not the state of `partial_fit`: after `load` that
        goes on from the coefficients with a fresh optimiser.

        Args:
          path: of the file, which is overwritten.

        Raises:
          NotFittedError: there was no `fit` yet.
          FileNotFoundError: there is no such folder.
          ModuleNotFoundError: safetensors is not installed; `jaxsoftmax[sklearn]` brings it.
          TypeError: a class or a parameter is neither a string nor a boolean nor a number, as a
            splitter or a function is.
        """
        check_is_fitted(self, "coef_")
        arrays = {name: getattr(self, name) for name in self._arrays}
        fitted = {name: getattr(self, name) for name in self._fitted if hasattr(self, name)}
        params = self.get_params(deep=False)
        if isinstance(params.get("class_weight"), dict):  # JSON has no keys but strings
            params["class_weight"] = [
                [np.asarray(key).item(), weight] for key, weight in params["class_weight"].items()
            ]
        if not (folder := Path(path).absolute().parent).is_dir():
            raise FileNotFoundError(f"there is no folder {folder} to write {Path(path).name} into")
        header = {
            "estimator": type(self).__name__,
            "dtype": str(self.coef_.dtype),
            "params": {name: _plain(name, value) for name, value in params.items()},
            "fitted": {
                name: _persistence.encoded(value) if isinstance(value, np.ndarray) else value
                for name, value in fitted.items()
            },
        }
        _persistence.save(path, _persistence.Contents(arrays, header))

    @classmethod
    def load(cls: type[_Model], path: str | PathLike[str]) -> _Model:
        """The model that `save` wrote, with the same predictions to the last bit.

        Args:
          path: of the file.

        Returns:
          A fitted model.

        Raises:
          FileNotFoundError: there is no such file.
          ModuleNotFoundError: safetensors is not installed; `jaxsoftmax[sklearn]` brings it.
          ValueError: the file is damaged, truncated, or of something else, or it is a folder.
        """
        try:
            arrays, header = _persistence.load(path)
            if (written := header["estimator"]) == cls.__name__:
                return cls._restored(arrays, header)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks a part of a {cls.__name__}: {error!r}") from error
        raise ValueError(f"{path} holds a {written}, not a {cls.__name__}")

    @classmethod
    def _restored(cls: type[_Model], arrays: dict[str, Numbers], header: dict[str, Any]) -> _Model:
        params = header["params"]
        if isinstance(params.get("class_weight"), list):
            params["class_weight"] = dict(params["class_weight"])
        model = cls(**params)
        for name in cls._arrays:
            setattr(model, name, arrays[name])
        fitted = header["fitted"]
        for name in {"classes_", "n_features_in_"} | (set(cls._fitted) & set(fitted)):
            value = fitted[name]
            value = _persistence.decoded(value) if isinstance(value, dict) else value
            setattr(model, name, value)
        rows = len(model.classes_) if len(model.classes_) > 2 else 1
        shapes = {"coef_": (rows, model.n_features_in_), "intercept_": (rows,)}
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {arrays[name].shape}")
        return model

    def _outputs(self, X: Any, link: Callable[[Array], Array] | None) -> Numbers:
        check_is_fitted(self, "coef_")
        X = self._checked(X, reset=False)
        dtype = np.result_type(X.dtype, self.coef_.dtype)
        params = Params(self.coef_.astype(dtype), self.intercept_.astype(dtype))
        with double(dtype):
            outputs = _linked(params, *padded(X.astype(dtype, copy=False)), link=link)
            return np.array(outputs)[: len(X)]

    def _examples(self, X: Any, y: Any, *, reset: bool) -> tuple[Numbers, Numbers]:
        """Features as float32 or float64, as scikit-learn would convert them, and labels."""
        X, y = self._checked(X, y=known_labels(y), reset=reset)
        check_classification_targets(y)
        return X, y

    def _prepared(self, X: Any, y: Any, sample_weight: Any) -> Examples:
        """The examples of a fit, whose classes become those of the model."""
        X, y = self._examples(X, y, reset=True)
        self.classes_ = np.unique(y)
        labels = self._encoded(y)
        weight = self._weights(sample_weight, self.class_weight, X, y)
        if not weight.any():
            if sample_weight is not None and not np.asarray(sample_weight).any():
                raise ValueError("Sample weights must contain at least one non-zero number.")
            raise ValueError(f"class_weight leaves no example a weight: {self.class_weight}")
        share = (weight / weight.max()).astype(X.dtype)
        present = self.classes_[np.bincount(labels, share, len(self.classes_)) > 0]
        if len(present) < 2:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes in the data, but the "
                f"data contains only one class: {present.tolist()[0]!r}"
            )
        return Examples(X, y, labels, weight, share, len(present))

    def _checked(self, X: Any, *, reset: bool, **labels: Any) -> Any:
        """Features, or with `y` features and labels; NaN is looked for where it can be placed."""
        if sparse.issparse(X):
            size = np.prod(X.shape, dtype=float) * (4 if X.dtype == np.float32 else 8)
            raise TypeError(
                "Sparse data was passed for X, but dense data is required. X.toarray() makes it "
                f"dense and takes {size / 1e6:,.1f} MB; where that is too much, reduce the columns "
                "first, for example by sklearn.decomposition.TruncatedSVD."
            )
        if not isinstance(getattr(X, "dtype", np.dtype(float)), np.dtype):
            X = np.asarray(X)  # of a library with dtypes of its own, such as torch
        checked = validate_data(
            self, X, **labels, reset=reset, dtype=float_dtypes(X), ensure_all_finite=False
        )
        self._check_finite(checked[0] if labels else checked)
        return checked

    def _check_finite(self, X: Numbers) -> None:
        with np.errstate(all="ignore"):
            if np.isfinite(X.sum()):
                return
        bad: Any = ~np.isfinite(X).all(0)
        if bad.any():
            what = (
                "NaN"
                if np.isnan(X).any()
                else f"infinity or a value too large for {X.dtype!r} (infinite)"
            )
            raise ValueError(
                f"Input X contains {what}. It is in {self._named(bad)}; impute the values or "
                "drop their rows first, for example by sklearn.impute.SimpleImputer in a Pipeline."
            )

    def _named(self, columns: Numbers) -> str:
        """The marked columns in words: their names if they have some, else their numbers."""
        names = getattr(self, "feature_names_in_", np.arange(len(columns)))[columns].tolist()
        words = ", ".join(map(repr, names[:5]))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return f"column{'s' if len(names) > 1 else ''} {words}{more}"

    def _encoded(self, y: Numbers) -> Numbers:
        """Labels as indices into `classes_`."""
        index = np.searchsorted(self.classes_, y).astype(np.int32)
        found = self.classes_[np.minimum(index, len(self.classes_) - 1)]
        if (unseen := np.unique(y[found != y])).size:
            raise ValueError(f"y has labels that are not in classes: {unseen.tolist()}")
        return index

    def _weights(self, sample_weight: Any, class_weight: Any, X: Numbers, y: Numbers) -> Numbers:
        """Weights of the examples in float64, those of their classes included."""
        # That all are 0 scikit-learn refuses, which for a batch of `partial_fit` is no error.
        nothing = sample_weight is not None and not np.asarray(sample_weight).any()
        given = np.ones(np.asarray(sample_weight).shape) if nothing else sample_weight
        weight = _check_sample_weight(given, X, dtype=np.float64, ensure_non_negative=True)
        weight = 0 * weight if nothing else weight
        if class_weight is not None:
            # An example of weight 0 is no example: it does not count as one of its class.
            counted = weight > 0 if class_weight == "balanced" else np.ones(len(y), bool)
            classes = np.unique(y[counted]) if class_weight == "balanced" else self.classes_
            if class_weight == "balanced":
                per_class = compute_class_weight(
                    class_weight, classes=classes, y=y[counted], sample_weight=weight[counted]
                )
            else:
                per_class = _weight_per_class(class_weight, classes.tolist())
            if (per_class < 0).any():
                raise ValueError(f"class_weight must not be negative, got {class_weight}")
            weight = weight.copy()
            weight[counted] *= per_class[np.searchsorted(classes, y[counted])]
        return weight

    def _model(self) -> Params:
        """Weights and bias with a row for every class."""
        if len(self.classes_) > 2:
            return Params(self.coef_, self.intercept_)
        halves = np.array([-0.5, 0.5], self.coef_.dtype)
        return Params(halves[:, None] * self.coef_, halves * self.intercept_)

    def _set_model(self, params: Params) -> None:
        self.coef_, self.intercept_ = scikit_learns(params)

    def _settled(self, fits: Fit) -> Fit:
        """Fits with their status by `tol`, which asks less than the fits themselves were asked."""
        short = np.isin(fits.status, (Status.STALLED, Status.MAX_ITER))
        status: Any = np.where(short & (fits.gap <= self.tol), Status.CONVERGED, fits.status)
        return fits._replace(status=status)

    def _summary(self, fit: Fit) -> str:
        return (
            f"{Status(int(fit.status)).name} after {fit.iterations} iterations with gap "
            f"{fit.gap:.1e} (tol={self.tol:g}) and gradient norm {fit.gradient_norm:.1e}"
        )

    def _advice(self, fit: Fit, C: float, examples: Examples) -> str:
        """Advice for a fit that has not converged."""
        return advice(
            fit,
            C,
            examples,
            named=self._named,
            fit_bias=bool(self.fit_intercept),
            max_iter=self.max_iter,
        )


@partial(jax.jit, static_argnames="link")
@precise
def _linked(params: Params, features: Array, link: Callable[[Array], Array] | None) -> Array:
    logits = linear_logits(params, features)
    if link is None:
        return logits
    if logits.shape[1] == 1:
        # Of two classes the one that no example had lies infinitely below the other.
        others = jnp.where(logits == jnp.inf, -jnp.inf, 0)
        logits = jnp.concatenate([others, jnp.where(logits == jnp.inf, 0, logits)], 1)
    return link(logits)


def _weight_per_class(class_weight: dict[Any, float], classes: list[Any]) -> Numbers:
    """The weights of a dict, 1 where it has none; its other keys are ignored if it names all."""
    missing = [label for label in classes if label not in class_weight]
    if missing and len(class_weight) > len(classes) - len(missing):
        raise ValueError(f"The classes, {missing}, are not in class_weight")
    return np.array([class_weight.get(label, 1.0) for label in classes], np.float64)


def _plain(name: str, value: Any) -> Any:
    """A parameter as JSON can express it."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    try:
        json.dumps(value)
    except TypeError as error:
        raise TypeError(
            f"{name}={value!r} cannot be saved without pickle; set_params({name}=...) to a string "
            "or a number first, which leaves the predictions as they are."
        ) from error
    return value
