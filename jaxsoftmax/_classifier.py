"""What the scikit-learn classifiers share: checks of their data, predictions, saving, warnings."""

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from jaxsoftmax import _persistence
from jaxsoftmax._execution import precise
from jaxsoftmax.functional import log_softmax, softmax
from jaxsoftmax.objective import Params, linear_logits

Numbers = NDArray[Any]
_Model = TypeVar("_Model", bound="SoftmaxClassifier")

# The most features that are copied for the sake of a common shape.
_PADDED = 2**22


class SoftmaxClassifier(ClassifierMixin, BaseEstimator):
    """A fitted linear softmax model with scikit-learn's attributes and methods."""

    coef_: Any
    intercept_: Any
    classes_: Numbers

    # Attributes of a fitted model, which `save` writes where they are present.
    _fitted: tuple[str, ...] = (
        "coef_",
        "intercept_",
        "classes_",
        "n_iter_",
        "gap_",
        "status_",
        "n_features_in_",
        "feature_names_in_",
        "_weight_seen",
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

        It holds parameters and attributes, and not where `partial_fit` stands: after `load` that
        goes on from the coefficients with a fresh optimiser.

        Args:
          path: of the file, which is overwritten.

        Raises:
          NotFittedError: there was no `fit` yet.
          ModuleNotFoundError: safetensors is not installed; `jaxsoftmax[sklearn]` brings it.
          TypeError: a class or a parameter is neither a string nor a boolean nor a number.
        """
        check_is_fitted(self, "coef_")
        fitted = {name: getattr(self, name) for name in self._fitted if hasattr(self, name)}
        arrays = {name: fitted[name] for name in ("coef_", "intercept_")}
        params = self.get_params(deep=False)
        if isinstance(params.get("class_weight"), dict):  # JSON has no keys but strings
            params["class_weight"] = [
                [np.asarray(key).item(), weight] for key, weight in params["class_weight"].items()
            ]
        header = {
            "estimator": type(self).__name__,
            "dtype": str(self.coef_.dtype),
            "params": {name: _plain(value) for name, value in params.items()},
            "fitted": {
                name: _persistence.encoded(value) if isinstance(value, np.ndarray) else value
                for name, value in fitted.items()
                if name not in arrays
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
          ValueError: the file is damaged, truncated, or of something else.
        """
        arrays, header = _persistence.load(path)
        if header["estimator"] != cls.__name__:
            raise ValueError(f"{path} holds a {header['estimator']}, not a {cls.__name__}")
        params = header["params"]
        if isinstance(params.get("class_weight"), list):
            params["class_weight"] = dict(params["class_weight"])
        model = cls(**params)
        fitted = {
            name: _persistence.decoded(value) if isinstance(value, dict) else value
            for name, value in header["fitted"].items()
        }
        for name, value in (arrays | fitted).items():
            if name in cls._fitted:
                setattr(model, name, value)
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
        _check_present(y)
        X, y = self._checked(X, y=y, reset=reset)
        check_classification_targets(y)
        return X, y

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
            self, X, **labels, reset=reset, dtype=_float_dtypes(X), ensure_all_finite=False
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
                f"Input X contains {what}. It stands in {self._named(bad)}; impute the values or "
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
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if class_weight is not None and weight.any():
            # An example of weight 0 is no example: it does not count as one of its class.
            counted = weight > 0 if class_weight == "balanced" else np.ones(len(y), bool)
            classes = np.unique(y[counted]) if class_weight == "balanced" else self.classes_
            per_class = compute_class_weight(
                class_weight, classes=classes, y=y[counted], sample_weight=weight[counted]
            )
            if (per_class < 0).any():
                raise ValueError(f"class_weight must not be negative, got {class_weight}")
            weight = weight.copy()
            weight[counted] *= per_class[np.searchsorted(classes, y[counted])]
        if not weight.any():
            raise ValueError("Sample weights must contain at least one non-zero number.")
        return weight

    def _model(self) -> Params:
        """Weights and bias with a row for every class."""
        if len(self.classes_) > 2:
            return Params(self.coef_, self.intercept_)
        halves = np.array([-0.5, 0.5], self.coef_.dtype)
        return Params(halves[:, None] * self.coef_, halves * self.intercept_)

    def _set_model(self, params: Params) -> None:
        """scikit-learn's shapes: for two classes, the one row that is their difference."""
        weights, bias = (np.array(value) for value in params)
        if len(self.classes_) == 2:
            weights, bias = weights[1:] - weights[:1], bias[1:] - bias[:1]
        self.coef_, self.intercept_ = weights, bias


def double(dtype: Any) -> Any:
    """Context in which JAX computes in float64 if that is the dtype, whatever the user has set."""
    return jax.enable_x64(bool(dtype == np.float64))


def padded(features: Numbers, *others: Numbers) -> list[Numbers]:
    """Arrays of examples with rows of zeros up to a number that others of nearly theirs share.

    A program is compiled for each shape, which takes seconds where a small fit takes milliseconds:
    so the folds of a cross-validation share one. It is a multiple of 256, for many rows one of an
    eighth to a sixteenth of them. Large features are left as they are, lest they be copied.
    """
    arrays = [features, *others]
    if features.size > _PADDED:
        return arrays
    rows = len(features)
    step = max(256, 2 ** (rows.bit_length() - 4))
    more = -rows % step
    return [np.pad(array, [(0, more)] + [(0, 0)] * (array.ndim - 1)) for array in arrays]


@partial(jax.jit, static_argnames="link")
@precise
def _linked(params: Params, features: Array, link: Callable[[Array], Array] | None) -> Array:
    logits = linear_logits(params, features)
    if link is None:
        return logits
    if logits.shape[1] == 1:
        logits = jnp.concatenate([jnp.zeros_like(logits), logits], 1)
    return link(logits)


def _float_dtypes(X: Any) -> list[Any]:
    """What features may be computed in, and by default the first.

    scikit-learn asks arrays and pandas for their dtype, but no other frames.
    """
    if hasattr(X, "columns") and np.asarray(X[:1]).dtype == np.float32:
        return [np.float32]
    return [np.float64, np.float32]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _check_present(y: Any) -> None:
    """Objects that stand for a missing label; what is a number scikit-learn finds itself."""
    labels = np.asarray(y)
    if labels.dtype != object or labels.ndim != 1:
        return
    for row, label in enumerate(labels):
        if _is_missing(label):
            raise ValueError(
                f"Input y contains NaN or another missing value: {label!r} in row {row}; "
                "drop the rows without a label."
            )


def _is_missing(label: Any) -> bool:
    try:
        return label is None or bool(label != label)
    except TypeError:  # pandas.NA has no truth value
        return True
