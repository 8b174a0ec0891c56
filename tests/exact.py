"""Exact references for the softmax family: the plain definitions, by mpmath at 60 digits.

A reference is kept as a pair of floats, far below the eps of float64, with the scale that its error
is measured in. For a value that is the value itself; for a derivative J v it is, entry by entry,
sum_j |J_ij| |v_j|: what a relative error of 1 in each term could amount to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath
import numpy as np
from numpy.typing import NDArray

DIGITS = 60
_mpf = np.vectorize(mpmath.mpf, otypes=[object])
_exp = np.vectorize(mpmath.exp, otypes=[object])


class Exact(NamedTuple):
    """The number high + low, and the scale of its error."""

    high: NDArray[Any]
    low: NDArray[Any]
    scale: NDArray[Any]


class Row:
    """One row of logits with what its references are made of; a masked entry has no derivative."""

    def __init__(self, x: NDArray[Any], allowed: NDArray[Any]) -> None:
        self.allowed = allowed
        x = np.where(allowed, x, -np.inf)
        largest = int(np.argmax(x))
        self.maximum = mpmath.mpf(float(x[largest]))
        self.shifted = _mpf(x) - self.maximum
        e = _exp(self.shifted)
        self.total = e.sum()
        self.p = e / self.total
        # 1 - p, which for the largest entry may have no digits left at 60.
        self.others = 1 - self.p
        self.others[largest] = np.delete(self.p, largest).sum()
        self.log_total = mpmath.log1p(np.delete(e, largest).sum())


def softmax(row: Row) -> tuple[Any, Any]:
    return row.p, row.p


def log_softmax(row: Row) -> tuple[Any, Any]:
    return row.shifted - row.log_total, row.shifted - row.log_total


def logsumexp(row: Row) -> tuple[Any, Any]:
    value = row.maximum + row.log_total
    return value, max(abs(value), abs(row.maximum))


def softmax_product(row: Row, v: Any) -> tuple[Any, Any]:
    """J v of the softmax, which is J^T v, and the Hessian of log-sum-exp times v."""
    value, scale = log_softmax_jvp(row, v)
    return row.p * value, row.p * scale


def log_softmax_jvp(row: Row, v: Any) -> tuple[Any, Any]:
    size = row.p * abs(v)
    value, scale = v - np.dot(row.p, v), row.others * abs(v) + (size.sum() - size)
    return np.where(row.allowed, value, 0), np.where(row.allowed, scale, 0)


def log_softmax_vjp(row: Row, v: Any) -> tuple[Any, Any]:
    """Also minus the gradient of the cross-entropy with labels v."""
    value = v - row.p * v.sum()
    return value, row.others * abs(v) + row.p * (abs(v).sum() - abs(v))


def cross_entropy(row: Row, labels: Any) -> tuple[Any, Any]:
    counted = labels != 0
    value = -np.dot(labels[counted], log_softmax(row)[0][counted])
    return value, value


def reference(
    quantity: Callable[..., tuple[Any, Any]], rows: list[Row], *vectors: NDArray[Any]
) -> Exact:
    """A quantity of each row, with one row of each array of `vectors`."""
    with mpmath.workdps(DIGITS):
        results = [
            quantity(row, *map(_mpf, parts)) for row, *parts in zip(rows, *vectors, strict=True)
        ]
        value, scale = (np.stack(part) for part in zip(*results, strict=True))
        high = value.astype(np.float64)
        finite = np.isfinite(high)
        low = np.where(finite, value - _mpf(np.where(finite, high, 0)), 0).astype(np.float64)
    return Exact(high, low, np.abs(scale.astype(np.float64)))


def make_rows(x: NDArray[Any], where: NDArray[Any] | None = None) -> list[Row]:
    allowed = np.broadcast_to(True if where is None else where, x.shape)
    with mpmath.workdps(DIGITS):
        return [Row(*row) for row in zip(x, allowed, strict=True)]


def units(result: Any, exact: Exact, info: Any) -> NDArray[Any]:
    """Error in units of the dtype's eps times the scale; NaN or a wrong infinity is infinitely off.

    `info` is `jnp.finfo` of the dtype. An error below its smallest number does not count, for which
    XLA takes the smallest normal one in float32 and float64: it flushes the rest to zero.
    """
    result = np.asarray(result).astype(np.float64)
    smallest = float(info.tiny if info.bits >= 32 else info.smallest_subnormal)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.maximum(np.abs((result - exact.high) - exact.low) - smallest, 0)
        off = error / (float(info.eps) * exact.scale)
    off = np.where(error == 0, 0, np.where(np.isnan(off), np.inf, off))
    return np.where((result == exact.high) & np.isinf(result), 0, off)
