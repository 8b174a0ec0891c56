"""Softmax, log-softmax and log-sum-exp of rows with their derivative rules, on checked arrays.

The derivative of all three is the softmax itself, so it is the only residual that any rule keeps,
in the input's dtype. Each rule calls the function that it differentiates, so every higher
derivative is analytic too.

Where no mask is given a row is all arithmetic: XLA:CPU makes one kernel of it, with accurate sums,
and a comparison among it costs two to three times the time.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike


class Rows(NamedTuple):
    """What a row spans, static: axes of the array and, if it is sharded, axes of the mesh.

    Reductions keep the axes with size 1. Only their results travel over the mesh.
    """

    axes: tuple[int, ...]
    axis_name: str | tuple[str, ...] | None = None

    def sum(self, values: Array) -> Array:
        length = math.prod(values.shape[axis] for axis in self.axes)
        if values.size == length > 4096:
            # XLA:CPU of jax 0.10 adds the products of one long row in a single accumulator, which
            # for 70000 equal ones is off by 5500 eps. The barrier keeps the two sums apart.
            blocks = jnp.pad(values.reshape(-1), (0, -length % 256)).reshape(-1, 256)
            total = jnp.sum(lax.optimization_barrier(jnp.sum(blocks, 0)))
            total = total.reshape((1,) * values.ndim)
        else:
            total = jnp.sum(values, self.axes, keepdims=True)
        return total if self.axis_name is None else lax.psum(total, self.axis_name)

    def max(self, values: Array) -> Array:
        maximum = jnp.max(values, self.axes, keepdims=True, initial=-jnp.inf)
        return maximum if self.axis_name is None else lax.pmax(maximum, self.axis_name)

    def any(self, where: Array) -> Array:
        """Whether a row has an allowed entry."""
        found = jnp.any(where, self.axes, keepdims=True)
        if self.axis_name is None:
            return found
        return lax.pmax(found.astype(jnp.int32), self.axis_name) > 0


def compute_dtype(*dtypes: DTypeLike) -> DTypeLike:
    """The dtype to compute in with floating `dtypes`: the widest of them, at least float32."""
    return max((jnp.float32, *dtypes), key=lambda dtype: jnp.finfo(dtype).bits)


def wide(value: Array) -> Array:
    """`value` in the dtype to compute in."""
    return value.astype(compute_dtype(value.dtype))


def keep(where: Array | None, value: Array, otherwise: float = 0) -> Array:
    """`value` where allowed, `otherwise` where masked."""
    return value if where is None else jnp.where(where, value, otherwise)


def shifted(x: Array, where: Array | None, rows: Rows) -> tuple[Array, Array]:
    """x - m, -inf where masked, and the maximum m, kept finite for a row of -inf.

    A row with +inf or NaN is NaN.
    """
    x = keep(where, wide(x), -jnp.inf)
    maximum = rows.max(x)
    m = jnp.maximum(maximum, jnp.finfo(x.dtype).min)
    # Inside a larger jit XLA may compute x anew and contract x - m into a fused multiply-add, whose
    # x is not the rounded one that m was taken from: near 1e11 exp then overflows (jax#37234).
    # minimum(x, m) is m itself for the largest entry and keeps the contraction out.
    return jnp.minimum(x, maximum) - m, m


def or_empty(value: Array, empty: float, where: Array | None, rows: Rows) -> Array:
    """A value per row, and `empty` for a row that is masked throughout."""
    return value if where is None else jnp.where(rows.any(where), value, empty)


def log_sum(d: Array, rows: Rows) -> Array:
    """log sum exp(d) for d = x - m.

    Where one entry holds almost everything the sum is 1 + t with a tiny t. The exponential of the
    largest entry is 1 and of all others it is less, so t is the sum of the fractional parts.
    """
    # Two sums that end in a selection: XLA:CPU fuses two that end in arithmetic into one kernel,
    # which at 2000 classes or more takes three to five times as long.
    e = jnp.exp(d)
    total, tail = rows.sum(e), rows.sum(e - jnp.floor(e))
    return jnp.where(jnp.abs(total - 1) < 0.5, jnp.log1p(tail), jnp.log(total))


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
        t = t - rows.sum(p * t)
    return t


# The linear map of each rule works on its residual in the dtype of computation. As a checkpoint it
# saves the residual as it came, in the input's dtype, and converts it again when it is needed.
linear_map = partial(jax.checkpoint, prevent_cse=False)


def saved(x: Array, where: Array | None, rows: Rows, empty_is_zero: bool) -> Array:
    """What a rule keeps of x: the softmax, but x in float16, in which tails would underflow."""
    return x if x.dtype == jnp.float16 else softmax(x, where, rows, empty_is_zero)


def restored(y: Array, where: Array | None, rows: Rows, empty_is_zero: bool) -> Array:
    """The softmax from what was saved, in the dtype to compute in."""
    return softmax(wide(y), where, rows, empty_is_zero) if y.dtype == jnp.float16 else wide(y)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def softmax(x: Array, where: Array | None, rows: Rows, empty_is_zero: bool) -> Array:
    """exp(x_i) / sum_j exp(x_j), 0 in a row that is masked throughout.

    A row whose allowed entries are all -inf is NaN, or 0 if `empty_is_zero`, as the gradient of
    log-sum-exp needs it.
    """
    e = jnp.exp(shifted(x, where, rows)[0])
    total = rows.sum(e)
    # A largest entry, if there is one, adds 1 to the total.
    total = jnp.maximum(total, 1) if empty_is_zero else or_empty(total, 1.0, where, rows)
    return keep(where, e / total).astype(x.dtype)


@softmax.defjvp
def _softmax_jvp(rows: Rows, empty_is_zero: bool, primals: Any, tangents: Any) -> Any:
    """d s_i = s_i (dx_i - sum_j s_j dx_j)."""
    (x, where), (dx, _) = primals, tangents

    @linear_map
    def linear(y: Array, where: Array | None, dx: Array) -> Array:
        s = restored(y, where, rows, empty_is_zero)
        return (s * centred(keep(where, wide(dx)), s, rows)).astype(x.dtype)

    y = softmax(x, where, rows, empty_is_zero)
    return y, linear(x if x.dtype == jnp.float16 else y, where, dx)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def log_softmax(x: Array, where: Array | None, rows: Rows) -> Array:
    """x_i - log sum_j exp(x_j), -inf where masked, in the dtype to compute in."""
    d, _ = shifted(x, where, rows)
    return keep(where, d - or_empty(log_sum(d, rows), 0.0, where, rows), -jnp.inf)


@log_softmax.defjvp
def _log_softmax_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d log s_i = dx_i - sum_j s_j dx_j."""
    (x, where), (dx, _) = primals, tangents

    @linear_map
    def linear(y: Array, where: Array | None, dx: Array) -> Array:
        s = restored(y, where, rows, False)
        return keep(where, centred(keep(where, wide(dx)), s, rows))

    return log_softmax(x, where, rows), linear(saved(x, where, rows, False), where, dx)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def logsumexp(x: Array, where: Array | None, rows: Rows) -> Array:
    """log sum_i exp(x_i), in the dtype to compute in."""
    d, m = shifted(x, where, rows)
    return jnp.where(m == jnp.inf, jnp.inf, log_sum(d, rows) + m)


@logsumexp.defjvp
def _logsumexp_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d L = sum_j s_j dx_j."""
    (x, where), (dx, _) = primals, tangents

    @linear_map
    def linear(y: Array, where: Array | None, dx: Array) -> Array:
        return rows.sum(restored(y, where, rows, True) * keep(where, wide(dx)))

    return logsumexp(x, where, rows), linear(saved(x, where, rows, True), where, dx)


class _Weighted(NamedTuple):
    """What the functions of a sum S = sum_i b_i exp(a_i) are made of; a and b may be complex."""

    root: Array  # exp((x - c) / 2) with x = Re a, 0 where masked; b root root cannot overflow
    phase: Array  # exp(a - x)
    terms: Array  # b exp(a - c)
    total: Array  # their sum, 1 in an empty row
    c: Array  # x of the entry with the largest term, per row
    empty: Array  # whether no entry counts


def _weighted(a: Array, b: Array, where: Array | None, rows: Rows) -> _Weighted:
    x = a.real
    info = jnp.finfo(x.dtype)
    # The largest |b_i| exp(x_i), not the largest x_i, must neither overflow nor underflow. A score
    # finds its entry, c is then a number of x and exact.
    log_b = jnp.log(jnp.where(b == 0, 1, jnp.abs(b)))
    score = keep(where, jnp.where(b == 0, -jnp.inf, x + log_b), -jnp.inf)
    best = rows.max(score)
    empty = best == -jnp.inf
    near = score >= best - 1 - 8 * info.eps * jnp.minimum(jnp.abs(best), info.max)
    c = jnp.where(empty, 0, rows.max(jnp.where(near, x, -jnp.inf)))
    # The guards of `shifted` on both sides of c, which is +inf if an x is.
    side = jnp.where(x > c, jnp.maximum(x, c) - c, jnp.minimum(x, c) - c)
    root = keep(where, jnp.where(empty, 0, jnp.exp(jnp.where(x == c, 0, side) / 2)))
    phase = jnp.ones((), a.dtype)
    if jnp.iscomplexobj(a):
        phase = jnp.exp(lax.complex(jnp.zeros_like(x), keep(where, a.imag)))
    wide_root = root.astype(a.dtype)
    terms = jnp.where(score == -jnp.inf, 0, b * phase * wide_root * wide_root)
    return _Weighted(root, phase, terms, jnp.where(empty, 1, rows.sum(terms)), c, empty)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def weighted_logsumexp(a: Array, b: Array, where: Array | None, rows: Rows) -> tuple[Array, Array]:
    """log|S| and the sign of S = sum_i b_i exp(a_i) for real a and b, log S and 1 for complex ones;
    both in the dtype to compute in."""
    w = _weighted(a, b, where, rows)
    # As in log_sum: near |S| = 1 the terms that are not the largest keep their digits.
    large = w.root >= 1
    head, tail = (rows.sum(jnp.where(part, w.terms, 0)) for part in (large, ~large))
    total, sign = w.total, jnp.ones_like(w.total)
    if not jnp.iscomplexobj(total):
        sign = jnp.where(w.empty, 0, jnp.sign(total))
        head, tail, total = sign * head, sign * tail, jnp.abs(total)
    log_total = jnp.where(jnp.abs(total - 1) < 0.5, jnp.log1p(tail + (head - 1)), jnp.log(total))
    return jnp.where(w.empty, -jnp.inf, log_total + w.c.astype(a.dtype)), sign


@partial(weighted_logsumexp.defjvp, symbolic_zeros=True)
def _weighted_logsumexp_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d log S = sum_j (q_j da_j + s_j db_j) with s_j = exp(a_j) / S and q_j = b_j s_j; the sign is
    constant.

    q is apart from s: where b_j = 0 it is 0, and s_j may overflow.
    """
    (a, b, where), (da, db, _) = primals, tangents
    value, sign = weighted_logsumexp(a, b, where, rows)
    parts = [
        rows.sum(share(a, b, where, rows) * keep(where, dv))
        for dv, share in ((da, _weighted_shares), (db, _shares))
        if not isinstance(dv, SymbolicZero)
    ]
    return (value, sign), (sum(parts), jnp.zeros_like(sign))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _weighted_shares(a: Array, b: Array, where: Array | None, rows: Rows) -> Array:
    """q_i = b_i exp(a_i) / sum_j b_j exp(a_j), 0 in a row that is empty."""
    w = _weighted(a, b, where, rows)
    return w.terms / w.total


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _shares(a: Array, b: Array, where: Array | None, rows: Rows) -> Array:
    """s_i = exp(a_i) / sum_j b_j exp(a_j), 0 in a row that is empty.

    Where b_i = 0 its size may overflow, and is then the largest number: 0 times it is 0.
    """
    w = _weighted(a, b, where, rows)
    size = jnp.abs(w.total)
    largest = jnp.finfo(size.dtype).max
    bounded = jnp.minimum(w.root * (w.root / size), largest).astype(a.dtype)
    return w.phase * jnp.conj(w.total / size.astype(a.dtype)) * bounded


@partial(_weighted_shares.defjvp, symbolic_zeros=True)
def _weighted_shares_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d q_i = q_i (da_i - sum_j (q_j da_j + s_j db_j)) + s_i db_i."""
    (a, b, where), (da, db, _) = primals, tangents
    q = _weighted_shares(a, b, where, rows)
    parts = []
    if not isinstance(da, SymbolicZero):
        parts.append(q * centred(keep(where, da), q, rows))
    if not isinstance(db, SymbolicZero):
        terms = _shares(a, b, where, rows) * keep(where, db)
        parts.append(terms - q * rows.sum(terms))
    return q, sum(parts)


@partial(_shares.defjvp, symbolic_zeros=True)
def _shares_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d s_i = s_i (da_i - sum_j (q_j da_j + s_j db_j))."""
    (a, b, where), (da, db, _) = primals, tangents
    s = _shares(a, b, where, rows)
    parts = []
    if not isinstance(da, SymbolicZero):
        q = _weighted_shares(a, b, where, rows)
        parts.append(s * centred(keep(where, da), q, rows))
    if not isinstance(db, SymbolicZero):
        parts.append(-s * rows.sum(s * keep(where, db)))
    return s, sum(parts)


def tempered(x: Array, temperature: Array, where: Array | None, rows: Rows) -> Array:
    """(x - m) / T with the maximum m, in the dtype to compute in; at T = 0 its limit, 0 or -inf.

    The derivatives are those of x / T, and at T = 0 they are 0.
    """
    t = temperature.astype(compute_dtype(x.dtype))
    return _tempered(keep(where, wide(x)), only_if(temperature >= 0, t), where, rows)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _tempered(x: Array, t: Array, where: Array | None, rows: Rows) -> Array:
    m, cold = _finite_maximum(x, where, rows), _is_cold(t)
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
        d = keep(where, x - _finite_maximum(x, where, rows))
        d = jnp.where(d == -jnp.inf, 0, d)
        parts.append(-_over_power(d, cold_is_inf, 2) * dt)
    return _tempered(x, t, where, rows), sum(parts)


def _finite_maximum(x: Array, where: Array | None, rows: Rows) -> Array:
    maximum = rows.max(keep(where, lax.stop_gradient(x), -jnp.inf))
    return jnp.maximum(maximum, jnp.finfo(x.dtype).min)


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


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def entropy(z: Array, where: Array | None, rows: Rows) -> Array:
    """-sum_k p_k log p_k, 0 in a row that is masked throughout."""
    return -rows.sum(softmax(z, where, rows, False) * _finite_log_softmax(z, where, rows))


@entropy.defjvp
def _entropy_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d H = -sum_k p_k (log p_k + H) dz_k."""
    (z, where), (dz, _) = primals, tangents
    p = softmax(z, where, rows, False)
    gradient = -p * centred(_finite_log_softmax(z, where, rows), p, rows)
    return entropy(z, where, rows), rows.sum(gradient * keep(where, dz))


def _finite_log_softmax(z: Array, where: Array | None, rows: Rows) -> Array:
    """log p_k, or 0 where it is -inf."""
    log_p = log_softmax(z, where, rows)
    return jnp.where(log_p == -jnp.inf, 0, log_p)


def _exp_less_tangent(x: Array) -> Array:
    """exp(x) - 1 - x, of which the series keeps the digits near 0."""
    series = jnp.ones_like(x)
    for k in range(8 if x.dtype == jnp.float32 else 14, 2, -1):
        series = 1 + x * (1 / k) * series
    return jnp.where(jnp.abs(x) < 0.25, x * x / 2 * series, jnp.expm1(x) - x)


class _LogRatio(NamedTuple):
    """log(p / q) for p = softmax(z) and q = softmax(t), up to a constant per row."""

    d: Array  # z - t less the difference of their maxima, 0 where p or q is 0
    delta: Array  # d less its mean under q
    both: Array  # where neither is 0
    q: Array


def _log_ratio(z: Array, t: Array, where: Array | None, rows: Rows) -> _LogRatio:
    maxima = _finite_maximum(z, where, rows), _finite_maximum(t, where, rows)
    shift = maxima[0] - maxima[1]
    dz, dt = (x - m for x, m in zip((z, t), maxima, strict=True))
    both = (jnp.abs(dz) < jnp.inf) & (jnp.abs(dt) < jnp.inf)
    both = both if where is None else both & where
    # Of two forms of the same number the one with the smaller parts has the smaller rounding.
    close = jnp.abs(z - t) + jnp.abs(shift) < jnp.abs(dz) + jnp.abs(dt)
    d = jnp.where(both, jnp.where(close, z - t - shift, dz - dt), 0)
    d, q = lax.optimization_barrier((d, softmax(t, where, rows, False)))
    return _LogRatio(d, centred(d, q, rows), both, q)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def kl_divergence(z: Array, t: Array, where: Array | None, rows: Rows) -> Array:
    """sum_k q_k log(q_k / p_k) = log sum_k q_k exp(delta_k), 0 in a row that is masked throughout.

    As the mean of delta is 0 the sum is 1 + sum_k q_k (exp(delta_k) - 1 - delta_k), whose terms are
    not negative. They keep their digits between distributions that are close.
    """
    # The barriers keep exponentials and selections out of the sums, which would compute them anew.
    d, delta, both, q = lax.optimization_barrier(_log_ratio(z, t, where, rows))
    (dz, _), (dt, _) = shifted(z, where, rows), shifted(t, where, rows)
    ez = lax.optimization_barrier(jnp.exp(dz))
    total_z = rows.sum(ez)
    # q exp(delta) is exp(dz + c), also where q is 0. The largest q is 1 over the sum of exp(dt).
    c = jnp.log(rows.max(q)) - rows.sum(q * d)
    scaled = ez * jnp.exp(jnp.minimum(c, 40))
    large = ~both | (delta > 1)
    terms = jnp.where(large, scaled - q * (1 + delta), q * _exp_less_tangent(jnp.minimum(delta, 1)))
    excluded = (ez == 0) & (dt > -jnp.inf) & ~both
    total = rows.sum(lax.optimization_barrier(jnp.where(excluded, jnp.inf, terms)))
    value = jnp.where(c > 40, c + jnp.log(total_z), jnp.log1p(jnp.maximum(total, 0)))
    value = jnp.where(total == jnp.inf, total, value)
    return only_if(or_empty(total_z, 1.0, where, rows) > 0, value)


@partial(kl_divergence.defjvp, symbolic_zeros=True)
def _kl_divergence_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d D = sum_k (p_k - q_k) dz_k - q_k delta_k dt_k."""
    (z, t, where), (dz, dt, _) = primals, tangents
    parts = []
    if not isinstance(dz, SymbolicZero):
        parts.append(rows.sum(_difference(z, t, where, rows) * keep(where, dz)))
    if not isinstance(dt, SymbolicZero):
        _, delta, _, q = _log_ratio(z, t, where, rows)
        parts.append(-rows.sum(q * delta * keep(where, dt)))
    return kl_divergence(z, t, where, rows), sum(parts)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _difference(z: Array, t: Array, where: Array | None, rows: Rows) -> Array:
    """p - q, with the digits that it has between distributions that are close."""
    p = softmax(z, where, rows, False)
    _, delta, both, q = _log_ratio(z, t, where, rows)
    log_ratio = delta - kl_divergence(z, t, where, rows)
    return jnp.where(both & (jnp.abs(log_ratio) < 0.5), q * jnp.expm1(log_ratio), p - q)


@_difference.defjvp
def _difference_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    (z, t, where), (dz, dt, _) = primals, tangents

    def difference(z: Array, t: Array) -> Array:
        return softmax(z, where, rows, False) - softmax(t, where, rows, False)

    return _difference(z, t, where, rows), jax.jvp(difference, (z, t), (dz, dt))[1]
