"""Softmax, log-softmax, log-sum-exp and temperature with their derivative rules, on checked arrays.

The derivative of the first three is the softmax itself, so it is the only residual that their rules
keep, in the input's dtype. Each rule calls the function that it differentiates, so every higher
derivative is analytic too.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from jaxsoftmax.functional._reductions import Rows


def compute_dtype(*dtypes: DTypeLike) -> DTypeLike:
    """The dtype to compute in with floating `dtypes`: the widest of them, at least float32."""
    return max((jnp.float32, *dtypes), key=lambda dtype: jnp.finfo(dtype).bits)


def wide(value: Array) -> Array:
    """`value` in the dtype to compute in."""
    return value.astype(compute_dtype(value.dtype))


def keep(where: Array | None, value: Array, otherwise: float = 0) -> Array:
    """`value` where allowed, `otherwise` where masked."""
    return value if where is None else jnp.where(where, value, otherwise)


def largest(x: Array, where: Array | None, rows: Rows, keep_nan: bool) -> tuple[Array, Array]:
    """x in the dtype to compute in, -inf where masked, and its maximum as `Rows.max` gives it."""
    x = rows.select(where, x, -jnp.inf)
    return wide(x), wide(rows.max(x, keep_nan))


def less(x: Array, maximum: Array, in_loop: bool = False) -> Array:
    """x - m for the maximum m, kept finite for a row of -inf. A row with +inf or NaN is NaN."""
    # Inside a larger jit XLA may compute x anew and contract x - m into a fused multiply-add, whose
    # x is not the rounded one that m was taken from: near 1e11 exp then overflows (jax#37234).
    # The minimum is m itself for the largest entry and keeps the contraction out. It takes the
    # maximum as it came: of m alone XLA:CPU makes an array of the size of x.
    # In a loop a selection does the same in one instruction instead of four. The library of XLA:CPU
    # has none, so where that may take all of a softmax the minimum is faster.
    x = jnp.where(maximum < x, maximum, x) if in_loop else jnp.minimum(x, maximum)
    return x - finite(maximum)


def finite(maximum: Array) -> Array:
    """The maximum m, kept finite for a row of -inf."""
    return jnp.maximum(maximum, jnp.finfo(maximum.dtype).min)


def shifted(
    x: Array, where: Array | None, rows: Rows, sums: int = 2, keep_nan: bool = False
) -> tuple[Array, Array]:
    """x - m, -inf where masked, for so many sums over a row, and the maximum m, kept finite."""
    x, maximum = largest(x, where, rows, keep_nan)
    return less(x, maximum, rows.in_loop(x, sums)), finite(maximum)


def or_empty(value: Array, empty: float, where: Array | None, rows: Rows) -> Array:
    """A value per row, and `empty` for a row that is masked throughout."""
    return value if where is None else jnp.where(rows.any(where), value, empty)


class Exponentials(NamedTuple):
    """exp(x - m), their sum over a row, and its logarithm."""

    e: Array
    total: Array
    log_total: Array


def exponentials(d: Array, rows: Rows) -> Exponentials:
    """Those of d = x - m.

    Where one entry holds almost everything the sum is 1 + t with a tiny t. The exponential of a
    largest entry is 1 and of all others it is less, so t is the sum of the fractional parts.
    """
    e = jnp.exp(d)
    total, t = rows.sums(e, e - jnp.floor(e))
    log_total = jnp.log1p(jnp.where(jnp.abs(total - 1) < 0.5, t, total - 1))
    # The larger of both sums is the total: XLA would drop a sum that is not used, before it sees
    # that the logarithm uses it.
    return Exponentials(e, jnp.maximum(total, t), log_total)


def only_if(condition: Array, value: Array) -> Array:
    """`value`, or NaN with NaN derivatives; on the way to a `value` there is no NaN."""
    one = condition.astype(value.dtype)
    return value * (one / one)


def centred(t: Array, p: Array, rows: Rows) -> Array:
    """t less its mean under the weights p, which sum to 1.

    This projection is applied twice: in exact arithmetic the second changes nothing, but it
    restores what the rounding of the first lost, so that a saturated row keeps its tiny derivative
    and a row of the transpose sums to 0.
    """
    for _ in range(2):
        t = t + rows.spread(-rows.sum(p * t), t)
    return t


# What a softmax is: a value, or the derivative of something.
Use = Literal["value", "log_softmax", "logsumexp"]

# The linear map of each rule works on its residual in the dtype of computation. As a checkpoint it
# saves the residual as it came, in the input's dtype, and converts it again when it is needed.
linear_map = partial(jax.checkpoint, prevent_cse=False)


def saved(x: Array, where: Array | None, rows: Rows, use: Use) -> Array:
    """What a rule keeps of x: the softmax, but x in float16, in which tails would underflow."""
    return x if x.dtype == jnp.float16 else softmax(x, where, rows, use)


def restored(y: Array, where: Array | None, rows: Rows, use: Use) -> Array:
    """The softmax from what was saved, in the dtype to compute in."""
    return softmax(wide(y), where, rows, use) if y.dtype == jnp.float16 else wide(y)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def softmax(x: Array, where: Array | None, rows: Rows, use: Use = "value") -> Array:
    """exp(x_i) / sum_j exp(x_j), 0 in a row that is masked throughout.

    A row whose allowed entries are all -inf is NaN, but 0 as the gradient of log-sum-exp. Beside a
    logarithm the sum is the one that it takes, and is computed once.
    """
    d, _ = shifted(x, where, rows, sums=1 if use == "value" else 2)
    if use == "value":
        e = jnp.exp(d)
        (total,) = rows.sums(e)
    else:
        e, total, _ = exponentials(d, rows)
    # A largest entry, if there is one, adds 1 to the total.
    total = jnp.maximum(total, 1) if use == "logsumexp" else or_empty(total, 1.0, where, rows)
    return rows.select(where, e / total).astype(x.dtype)


@softmax.defjvp
def _softmax_jvp(rows: Rows, use: Use, primals: Any, tangents: Any) -> Any:
    """d s_i = s_i (dx_i - sum_j s_j dx_j)."""
    (x, where), (dx, _) = primals, tangents

    @linear_map
    def linear(y: Array, where: Array | None, dx: Array) -> Array:
        s = restored(y, where, rows, use)
        return (s * centred(keep(where, wide(dx)), s, rows)).astype(x.dtype)

    y = softmax(x, where, rows, use)
    return y, linear(x if x.dtype == jnp.float16 else y, where, dx)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def log_softmax(x: Array, where: Array | None, rows: Rows) -> Array:
    """x_i - log sum_j exp(x_j), -inf where masked, in the dtype to compute in."""
    x, maximum = largest(x, where, rows, keep_nan=False)
    in_loop = rows.in_loop(x, sums=2)
    d = less(x, maximum, in_loop)
    log_total = or_empty(exponentials(d, rows).log_total, 0.0, where, rows)
    if in_loop and not rows.is_short(x):
        # The same number from negatives: for a broadcast that two loops share XLA:CPU may write out
        # an array of the size of x.
        d = -finite(maximum) - jnp.maximum(-x, -maximum)
    return rows.select(where, d - log_total, -jnp.inf)


@log_softmax.defjvp
def _log_softmax_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d log s_i = dx_i - sum_j s_j dx_j."""
    (x, where), (dx, _) = primals, tangents

    @linear_map
    def linear(y: Array, where: Array | None, dx: Array) -> Array:
        s = restored(y, where, rows, "log_softmax")
        return keep(where, centred(keep(where, wide(dx)), s, rows))

    return log_softmax(x, where, rows), linear(saved(x, where, rows, "log_softmax"), where, dx)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def logsumexp(x: Array, where: Array | None, rows: Rows) -> Array:
    """log sum_i exp(x_i), in the dtype to compute in."""
    d, m = shifted(x, where, rows, keep_nan=True)
    return jnp.where(m == jnp.inf, jnp.inf, exponentials(d, rows).log_total + m)


@logsumexp.defjvp
def _logsumexp_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d L = sum_j s_j dx_j."""
    (x, where), (dx, _) = primals, tangents

    @linear_map
    def linear(y: Array, where: Array | None, dx: Array) -> Array:
        return rows.sum(restored(y, where, rows, "logsumexp") * keep(where, wide(dx)))

    return logsumexp(x, where, rows), linear(saved(x, where, rows, "logsumexp"), where, dx)


def tempered(x: Array, temperature: Array, where: Array | None, rows: Rows) -> Array:
    """(x - m) / T with the maximum m, in the dtype to compute in; at T = 0 its limit, 0 or -inf.

    The derivatives are those of x / T, and at T = 0 they are 0.
    """
    t = temperature.astype(compute_dtype(x.dtype))
    return _tempered(keep(where, wide(x)), only_if(temperature >= 0, t), where, rows)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _tempered(x: Array, t: Array, where: Array | None, rows: Rows) -> Array:
    m, cold = finite_maximum(x, where, rows), _is_cold(t)
    d = x - m
    # x >= m rather than d == 0: inside a larger jit d may come from a fused multiply-add. m - m is
    # NaN for a row with +inf.
    limit = jnp.where(x >= m, m - m, -jnp.inf)
    return jnp.where(cold, limit, jnp.where(d == -jnp.inf, d, d / jnp.where(cold, 1, t)))


@partial(_tempered.defjvp, symbolic_zeros=True)
def _tempered_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d (d / T) = dx / T - d / T^2 dT for d = x - m; the shift m changes no result."""
    (x, t, where), (dx, dt, _) = primals, tangents
    cold_is_inf = jnp.where(_is_cold(t), jnp.inf, t)
    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(dx * _over_power(jnp.ones_like(t), cold_is_inf, 1))
    if not isinstance(dt, SymbolicZero):
        d = keep(where, x - finite_maximum(x, where, rows))
        d = jnp.where(d == -jnp.inf, 0, d)
        parts.append(-_over_power(d, cold_is_inf, 2) * dt)
    return _tempered(x, t, where, rows), sum(parts)


def finite_maximum(x: Array, where: Array | None, rows: Rows) -> Array:
    """The maximum m as a constant, kept finite for a row of -inf."""
    return finite(rows.max(keep(where, lax.stop_gradient(x), -jnp.inf)))


def _is_cold(t: Array) -> Array:
    return t < jnp.finfo(t.dtype).tiny


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _over_power(d: Array, t: Array, n: int) -> Array:
    """d / t^n, of a size that does not overflow even times the n of its derivative.

    What would be larger belongs to an entry without any probability, and 0 times it is 0.
    """
    largest = jnp.finfo(d.dtype).max / 1024
    for _ in range(n):
        d = jnp.clip(d / t, -largest, largest)
    return d


@_over_power.defjvp
def _over_power_jvp(n: int, primals: Any, tangents: Any) -> Any:
    (d, t), (dd, dt) = primals, tangents
    tangent = dd * _over_power(jnp.ones_like(t), t, n) - n * dt * _over_power(d, t, n + 1)
    return _over_power(d, t, n), tangent
