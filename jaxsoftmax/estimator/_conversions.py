"""Between what scikit-learn takes and gives, and what JAX computes."""

from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from jaxsoftmax.regression._params import Params

Numbers = NDArray[Any]

# The most features that are copied for the sake of a common shape.
_PADDED = 2**22


class Examples(NamedTuple):
    """Checked data of a fit.

    Attributes:
      X: features (examples, features).
      y: their labels.
      labels: these as indices into the classes.
      weight: float64 weights, those of the classes included.
      share: the weights relative to the largest, in the dtype of the features.
      present: number of classes that have an example of positive weight.
    """

    X: Numbers
    y: Numbers
    labels: Numbers
    weight: Numbers
    share: Numbers
    present: int


def double(dtype: Any) -> Any:
    """Context in which JAX computes in float64 if that is the dtype, whatever the user has set."""
    return jax.enable_x64(bool(dtype == np.float64))


def padded(features: Numbers, *others: Numbers) -> list[Numbers]:
    """Arrays of examples with rows of zeros up to a number that others of nearly theirs share.

    A program is compiled for each shape, which takes seconds where a small fit takes milliseconds:
    so the folds of a cross-validation share one. It is a multiple of 256, for many rows one of an
    eighth to a sixteenth of them. Large features are not copied.
    """
    arrays = [features, *others]
    if features.size > _PADDED:
        return arrays
    rows = len(features)
    step = max(256, 2 ** (rows.bit_length() - 4))
    more = -rows % step
    return [np.pad(array, [(0, more)] + [(0, 0)] * (array.ndim - 1)) for array in arrays]


def penalty(C: Any, weight: Any, present: int) -> Any:
    """The penalty of `jaxsoftmax.fit` that `C` is, for this total weight of the examples.

    Of two classes, counting those that have examples, scikit-learn penalises one row.
    """
    return (2 if present == 2 else 1) / (C * weight)


def solver_tol(tol: float, dtype: Any) -> float:
    """The tolerance of the solver for a `tol` of scikit-learn: its square, where that is less."""
    return max(min(tol, tol * tol), float(np.finfo(dtype).tiny))


def scikit_learns(params: Params) -> Params:
    """Parameters in scikit-learn's shapes: of two classes, the one row that is their difference."""
    weights: Any
    bias: Any
    weights, bias = (np.array(value) for value in params)
    if bias.shape[-1] == 2:
        weights, bias = weights[..., 1:, :] - weights[..., :1, :], bias[..., 1:] - bias[..., :1]
    return Params(weights, bias)


def float_dtypes(X: Any) -> list[Any]:
    """The dtypes in which features may be computed, the default first.

    scikit-learn asks arrays and pandas for their dtype, but no other frames.
    """
    if hasattr(X, "columns"):
        own = {getattr(dtype, "numpy_dtype", dtype) for dtype in getattr(X, "dtypes", ())}
        if own == {np.dtype(np.float32)} or np.asarray(X[:1]).dtype == np.float32:
            return [np.float32]
    return [np.float64, np.float32]


def known_labels(y: Any) -> Any:
    """Labels of which none is missing; integers that are objects, as those of a frame may be, as
    integers."""
    labels = np.asarray(y)
    if isinstance(y, np.ma.MaskedArray) and (count := np.sum(y.mask)):
        raise ValueError(f"Input y has {count} masked labels; drop the rows without a label.")
    if labels.dtype != object or labels.ndim != 1:
        return y
    for row, label in enumerate(labels):
        if _is_missing(label):
            raise ValueError(
                f"Input y contains NaN or another missing value: {label!r} in row {row}; "
                "drop the rows without a label."
            )
    if all(isinstance(label, Integral) and not isinstance(label, bool) for label in labels):
        return np.array(labels.tolist())
    return y


def _is_missing(label: Any) -> bool:
    try:
        return label is None or bool(label != label)
    except TypeError:  # pandas.NA has no truth value
        return True
