"""Exact references for the softmax family: the plain definitions, by mpmath at 60 digits.

A reference is kept as a pair of floats, far below the eps of float64, with the scale that its error
is measured in. For a value that is the value itself, for log-sum-exp also the maximum m if that is
larger; for a derivative J v it is, entry by entry, sum_j |J_ij| |v_j|: what a relative error of 1
in each term could amount to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
        self.p = e / e.sum()
        # 1 - p, which for the largest entry may have no digits left at 60.
        self.others = 1 - self.p
        self.others[largest] = np.delete(self.p, largest).sum()
        self.log_total = mpmath.log1p(np.delete(e, largest).sum())
        # x - m is rounded, which exp turns into |x - m| / 2 eps; the largest entry has it from the
        # tail that the next one leads.
        self.rounding = (x[largest] - x) / 2
        self.rounding[largest] = np.delete(self.rounding, largest).min()


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
    value = v - row.p * v.sum()
    return value, row.others * abs(v) + row.p * (abs(v).sum() - abs(v))


def cross_entropy(row: Row, labels: Any) -> tuple[Any, Any]:
    counted = labels != 0
    value = -np.dot(labels[counted], log_softmax(row)[0][counted])
    return value, value


def cross_entropy_gradient(row: Row, labels: Any) -> tuple[Any, Any]:
    value, scale = log_softmax_vjp(row, labels)
    return -value, scale


def make_rows(x: Any, where: NDArray[Any] | None = None) -> list[Row]:
    x = as_float64(x)
    allowed = np.broadcast_to(True if where is None else where, x.shape)
    with mpmath.workdps(DIGITS):
        return [Row(*row) for row in zip(x, allowed, strict=True)]


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


def as_float64(x: Any) -> NDArray[Any]:
    return np.asarray(x).astype(np.float64)


def units(result: Any, exact: Exact, info: Any) -> NDArray[Any]:
    """Error in units of the dtype's eps times the scale; NaN or a wrong infinity is infinitely off.

    `info` is `jnp.finfo` of the dtype. An error below its smallest number does not count, for which
    in float32 and float64 the smallest normal one is taken: XLA flushes the rest to zero.
    """
    result = as_float64(result)
    smallest = float(info.tiny if info.bits >= 32 else info.smallest_subnormal)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.maximum(np.abs((result - exact.high) - exact.low) - smallest, 0)
        off = error / (float(info.eps) * exact.scale)
    off = np.where(error == 0, 0, np.where(np.isnan(off), np.inf, off))
    return np.where((result == exact.high) & np.isinf(result), 0, off)


class Inputs(NamedTuple):
    """Rows of logits and what goes with them: a mask, a vector, a class, probabilities."""

    x: jax.Array
    where: NDArray[Any] | None
    v: jax.Array
    label: jax.Array
    labels: jax.Array

    def vectors(self) -> dict[str | None, list[NDArray[Any]]]:
        """The arguments of the references, by name."""
        one_hot = np.arange(self.x.shape[1]) == np.asarray(self.label)[:, None]
        return {
            None: [],
            "v": [as_float64(self.v)],
            "label": [as_float64(one_hot)],
            "labels": [as_float64(self.labels)],
        }


def families(dtype: Any, long: int, every: int = 1) -> dict[str, Inputs]:
    """Logits by kind, of the rows that take long one in `every`.

    In each row the class is the largest entry; every second v is 1 there and 0 elsewhere, the
    others are random.
    """
    random = np.random.default_rng(0)
    eps, largest = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).max)
    gaps = np.arange(0.0, 81, every)
    dominant = random.normal(size=(len(gaps), 100))
    dominant[np.arange(len(gaps)), random.integers(100, size=len(gaps))] = 4 + gaps
    pairs = np.stack([np.arange(0, 80, 0.25), np.zeros(320), np.full(320, -3.0)], -1)
    offsets = 10.0 ** np.arange(4, 31, every)
    offsets = offsets[offsets < largest / 4]
    steps = random.integers(-20, 21, size=(len(offsets), 100))
    few, some = 30 // every, 50 // every
    mask = random.random((few, 100)) < 0.7
    logits: dict[str, tuple[Any, Any]] = {
        "normal, 3": (3 * random.normal(size=(200, 3)), None),
        "normal, 100": (3 * random.normal(size=(some, 100)), None),
        f"normal, {long}": (3 * random.normal(size=(1, long)), None),
        f"equal, {long}": (np.zeros((1, long)), None),
        "dominant, 3": (pairs, None),
        "dominant, 100": (dominant, None),
        "offset 1e4-1e30": (offsets[:, None] * (1 + eps * steps), None),
        "near ties": (1 + eps * random.integers(-3, 4, size=(few, 100)), None),
        "masked": (3 * random.normal(size=(few, 100)), mask),
    }
    inputs = {}
    for name, (values, where) in logits.items():
        x = jnp.asarray(values).astype(dtype)
        allowed = np.ones(x.shape) if where is None else np.where(where, 1.0, 0.0)
        label = np.argmax(np.where(allowed > 0, as_float64(x), -np.inf), -1)
        v = random.normal(size=x.shape)
        v[::2] = (np.arange(x.shape[1]) == label[:, None])[::2]
        shares = allowed * random.random(x.shape)
        shares = shares / shares.sum(-1, keepdims=True)
        vectors = [jnp.asarray(part).astype(dtype) for part in (allowed * v, shares)]
        inputs[name] = Inputs(x, where, vectors[0], jnp.asarray(label), vectors[1])
    return inputs


def jvp(f: Callable[..., Any], inputs: Inputs) -> Any:
    return jax.jvp(f, (inputs.x,), (inputs.v,))[1]


def vjp(f: Callable[..., Any], inputs: Inputs) -> Any:
    return jax.vjp(f, inputs.x)[1](inputs.v)[0]


def gradient(f: Callable[..., Any], inputs: Inputs) -> Any:
    return jax.grad(lambda x: jnp.sum(f(x)))(inputs.x)


def hvp(f: Callable[..., Any], inputs: Inputs) -> Any:
    return jax.jvp(jax.grad(lambda x: jnp.sum(f(x))), (inputs.x,), (inputs.v,))[1]


class Quantity(NamedTuple):
    """What is measured: `transform` of a library's `function`, or its value."""

    name: str
    function: str
    transform: Callable[..., Any] | None
    exact: Callable[..., Any]
    argument: str | None  # of `exact`, a field of Inputs
    target: float  # in eps times the scale, without the rounding of x - m


QUANTITIES = [
    Quantity("softmax", "softmax", None, softmax, None, 4),
    Quantity("  jvp", "softmax", jvp, softmax_product, "v", 32),
    Quantity("  vjp", "softmax", vjp, softmax_product, "v", 32),
    Quantity("log_softmax", "log_softmax", None, log_softmax, None, 4),
    Quantity("  jvp", "log_softmax", jvp, log_softmax_jvp, "v", 32),
    Quantity("  vjp", "log_softmax", vjp, log_softmax_vjp, "v", 32),
    Quantity("logsumexp", "logsumexp", None, logsumexp, None, 4),
    Quantity("  gradient", "logsumexp", gradient, softmax, None, 32),
    Quantity("  hvp", "logsumexp", hvp, softmax_product, "v", 64),
    Quantity("cross_entropy, class", "class", None, cross_entropy, "label", 4),
    Quantity("  gradient", "class", gradient, cross_entropy_gradient, "label", 32),
    Quantity("  hvp", "class", hvp, softmax_product, "v", 64),
    Quantity("cross_entropy, probs", "probabilities", None, cross_entropy, "labels", 4),
    Quantity("  gradient", "probabilities", gradient, cross_entropy_gradient, "labels", 32),
    Quantity("  hvp", "probabilities", hvp, softmax_product, "v", 64),
]


class Library(NamedTuple):
    """The functions of a library; the losses take logits, labels and where."""

    softmax: Callable[..., Any]
    log_softmax: Callable[..., Any]
    logsumexp: Callable[..., Any]
    class_loss: Callable[..., Any]
    probability_loss: Callable[..., Any]


def compute(library: Library, quantity: Quantity, inputs: Inputs) -> Any:
    """A quantity by a library on JAX."""

    def f(x: jax.Array) -> Any:
        where = None if inputs.where is None else jnp.asarray(inputs.where)
        match quantity.function:
            case "softmax":
                return library.softmax(x, where=where)
            case "log_softmax":
                return library.log_softmax(x, where=where)
            case "logsumexp":
                return library.logsumexp(x, axis=-1, where=where)
            case "class":
                return library.class_loss(x, inputs.label, where=where)
            case _:
                return library.probability_loss(x, inputs.labels, where=where)

    return f(inputs.x) if quantity.transform is None else quantity.transform(f, inputs)


def bound(quantity: Quantity, rows: list[Row], label: NDArray[Any]) -> NDArray[Any]:
    """The target for each entry with the rounding of x - m, in eps times the scale."""
    rounding = np.stack([np.where(row.allowed, row.rounding, 0) for row in rows])
    rounding = np.where(np.isfinite(rounding), rounding, 0)
    if quantity.function == "log_softmax" and quantity.transform is None:
        # Only the tail of the largest entry has it.
        rounding = np.where(np.arange(rounding.shape[1]) == label[:, None], rounding, 0)
    of_row = rounding[np.arange(len(rows)), label]
    if quantity.transform is None and quantity.function in ("class", "probabilities"):
        return quantity.target + of_row
    if quantity.function == "logsumexp" and quantity.transform is None:
        return np.full(len(rows), quantity.target)
    # A target of a derivative leaves room for the rounding up to a gap of 56.
    return np.maximum(quantity.target, 4 + rounding) if quantity.target > 4 else 4 + rounding
