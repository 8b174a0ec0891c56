"""Advice for fits that have not converged."""

from collections.abc import Callable

import numpy as np

from jaxsoftmax.estimator._conversions import Examples, Numbers, double
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._result import Fit, Status
from jaxsoftmax.regression._separation import diverging_weights

_SCALE_RATIO = 1e3  # scales of columns above this, or that differ by more, are worth a word


def advice(
    fit: Fit,
    C: float,
    examples: Examples,
    *,
    named: Callable[[Numbers], str],
    fit_bias: bool,
    max_iter: int,
) -> str:
    """Advice for a fit that has not converged; `named` gives the names of marked columns."""
    with np.errstate(all="ignore"):
        X, labels, share = examples.X, examples.labels, examples.share
        size = np.abs(X).max(0)
        scales = size * (X / np.where(size > 0, size, 1)).std(0)  # squares of X may overflow
        least, most = scales[scales > 0].min(initial=np.inf), scales.max()
        ratio = most / least
        right = (X @ fit.params.weights.T + fit.params.bias).argmax(1) == labels
    words = [
        f"The scales of the columns go from {least:.1e} to {most:.1e}, a ratio of {ratio:.1e}."
    ]
    if max(ratio, most) > _SCALE_RATIO:
        words.append(
            "Standardise the columns, for example by sklearn.preprocessing.StandardScaler."
        )
    if np.isinf(C) and np.isfinite(fit.objective):
        with double(X.dtype):
            moving = diverging_weights(
                Params(*fit.params),
                X,
                labels,
                sample_weight=share,
                fit_bias=fit_bias,
            ).weights.any(0)
        if moving.any():
            words.append(
                f"The classes are separable along {named(np.asarray(moving))}, whose "
                "coefficients have no finite optimum without a penalty: choose a finite C."
            )
    elif right[share > 0].all():
        words.append(
            "All examples are classified right, so a smaller C may do: they are separable."
        )
    if fit.status == Status.MAX_ITER:
        words.append(f"Raise max_iter, now {max_iter}.")
    if fit.status == Status.STALLED:
        words.append(
            f"The precision of {X.dtype} allows no more: "
            + ("pass float64 features or " if X.dtype == np.float32 else "")
            + "raise tol."
        )
    return " ".join(words)
