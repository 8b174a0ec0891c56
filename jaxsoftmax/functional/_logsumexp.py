"""Log-sum-exp, plain and with factors, real or complex, and its derivative rules."""

from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Bool, Inexact, Shaped

from jaxsoftmax import _arrays, _checks
from jaxsoftmax._checks import Axis, AxisName
from jaxsoftmax.functional._reductions import Rows, check_rows
from jaxsoftmax.functional._softmax import linear_map, softmax_from_residual, softmax_residual
from jaxsoftmax.functional._stable import (
    centre,
    compute_dtype,
    exponentials,
    fill_masked,
    nan_unless,
    shift_rows,
    subtract_max,
    upcast,
)


@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    axis_name: AxisName = None,
) -> Inexact[Array, "..."]: ...
@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: AxisName = None,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]: ...
@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: Axis,
    b: Shaped[ArrayLike, "..."] | None,
    keepdims: bool,
    return_sign: Literal[True],
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    axis_name: AxisName = None,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]: ...
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    axis_name: AxisName = None,
) -> Inexact[Array, "..."] | tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    r"""Logarithm of a sum of exponentials, weighted by `b` if given.

    .. math:: L(a, b) = \log\Bigl|\sum_i b_i \exp(a_i)\Bigr|, \qquad
              \frac{\partial L}{\partial a_j} = \frac{b_j \exp(a_j)}{\sum_i b_i \exp(a_i)}, \qquad
              \frac{\partial L}{\partial b_j} = \frac{\exp(a_j)}{\sum_i b_i \exp(a_i)}

    Args:
      a: exponents, any shape, real or complex.
      axis: the axis or axes to sum over; None, as in `jax.nn.logsumexp`, for all.
      b: factors of the exponentials, real or complex; `a` and `b` broadcast to one shape; None
        for 1.
      keepdims: keep the summed axes with size 1.
      return_sign: return also the sign of the sum.
      where: entries that take part, boolean, broadcasting to the shape of `a` and `b`; None for
        all.
      axis_name: the mesh axis or axes over which `axis` is sharded, inside `jax.shard_map`.

    Returns:
      The logarithm, with the shape of `a` less `axis`, in the dtype of `a` and `b`; with
      `return_sign` the pair (logarithm of the absolute sum, sign: -1, 0 or 1). Without it the
      logarithm of a negative sum is NaN. A sum over nothing is -inf. If `a` or `b` is complex the
      logarithm is complex, and the sign is S / abs(S) for the sum S.

    Raises:
      TypeError: `a` or `b` does not hold numbers, `where` is not boolean, `axis` is not an integer,
        or `axis_name` not a string.
      ValueError: `axis` is out of range or repeats, `a` and `b` do not broadcast to one shape, or
        `where` does not broadcast to it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import logsumexp
      >>> logsumexp(jnp.array([1000.0, 1000.0]))
      Array(1000.6932, dtype=float32)
      >>> logsumexp(jnp.zeros(3), b=jnp.array([2.0, 0.0, 5.0]))
      Array(1.9459102, dtype=float32)

    Reference:
      Blanchard, Higham, Higham (2021), Accurately computing the log-sum-exp and softmax functions,
      eq. 1.4.
    """
    dtypes = {_arrays.own_dtype(value) for value in (a, b)} - {None}
    a, b = _arrays.array("a", a), None if b is None else _arrays.array("b", b)
    if jnp.iscomplexobj(a) or (b is not None and jnp.iscomplexobj(b)):
        b = jnp.ones((), a.dtype) if b is None else b
        return _complex_logsumexp(a, b, axis, keepdims, return_sign, where, axis_name, dtypes)
    a = _arrays.real_array("a", a)
    dtype = a.dtype
    if b is not None:
        b = _arrays.real_array("b", b)
        dtypes = dtypes or {dtype}
        dtype = dtypes.pop() if len(dtypes) == 1 else jnp.dtype(compute_dtype(*dtypes))
        a, b = (v.astype(compute_dtype(dtype)) for v in (a, b))
        a, b = _checks.broadcast_together("a", a, "b", b)
    mask, rows = check_rows(a, axis, where, axis_name)
    if b is None:
        value = _jit_logsumexp(a, mask, rows)
        sign = jnp.where(jnp.isnan(value), value, jnp.where(value == -jnp.inf, 0, 1))
    else:
        value, sign = _jit_weighted_logsumexp(a, b, mask, rows)
        if not return_sign:
            value = nan_unless(sign >= 0, value)
    value, sign = value.astype(dtype), sign.astype(dtype)
    if not keepdims:
        value, sign = jnp.squeeze(value, rows.axes), jnp.squeeze(sign, rows.axes)
    return (value, sign) if return_sign else value


def _complex_logsumexp(
    a: Array,
    b: Array,
    axis: Axis,
    keepdims: bool,
    return_sign: bool,
    where: ArrayLike | None,
    axis_name: AxisName,
    dtypes: set[Any],
) -> Any:
    """Log-sum-exp of complex numbers, as in jax.nn: the sign is S / |S|."""
    double = {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}
    dtype = jnp.complex128 if (dtypes or {a.dtype}) & double else jnp.complex64
    a, b = _checks.broadcast_together("a", a.astype(dtype), "b", b.astype(dtype))
    mask, rows = check_rows(a, axis, where, axis_name)
    value, _ = _jit_weighted_logsumexp(a, b, mask, rows)
    if not keepdims:
        value = jnp.squeeze(value, rows.axes)
    if not return_sign:
        return value
    size, angle = value.real, value.imag
    sign = jnp.exp(lax.complex(jnp.zeros_like(angle), angle))
    return size, jnp.where(size == -jnp.inf, 0, sign)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def row_logsumexp(x: Array, where: Array | None, rows: Rows) -> Array:
    """log sum_i exp(x_i), in the dtype to compute in."""
    d, m = shift_rows(x, where, rows, keep_nan=True)
    return jnp.where(m == jnp.inf, jnp.inf, exponentials(d, rows).log_total + m)


@row_logsumexp.defjvp
def _logsumexp_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d L = sum_j s_j dx_j."""
    (x, where), (dx, _) = primals, tangents

    @linear_map
    def linear(y: Array, where: Array | None, dx: Array) -> Array:
        s = softmax_from_residual(y, where, rows, "logsumexp")
        return rows.sum(s * fill_masked(where, upcast(dx)))

    y = softmax_residual(x, where, rows, "logsumexp")
    return row_logsumexp(x, where, rows), linear(y, where, dx)


class _WeightedSum(NamedTuple):
    """The parts of a sum S = sum_i b_i exp(a_i), in which a and b may be complex."""

    root: Array  # exp((x - c) / 2) with x = Re a, 0 where masked; b root root cannot overflow
    phase: Array  # exp(a - x)
    terms: Array  # b exp(a - c)
    total: Array  # their sum, 1 in an empty row
    c: Array  # x of the entry with the largest term, per row
    empty: Array  # whether no entry counts


def _weighted_sum(a: Array, b: Array, where: Array | None, rows: Rows) -> _WeightedSum:
    """Sum b_i exp(a_i) relative to the largest term."""
    x = a.real
    info = jnp.finfo(x.dtype)
    # The largest |b_i| exp(x_i), not the largest x_i, must neither overflow nor underflow. A score
    # finds its entry, c is then a number of x and exact.
    log_b = jnp.log(jnp.where(b == 0, 1, jnp.abs(b)))
    score = fill_masked(where, jnp.where(b == 0, -jnp.inf, x + log_b), -jnp.inf)
    best = rows.max(score)
    empty = best == -jnp.inf
    near = score >= best - 1 - 8 * info.eps * jnp.minimum(jnp.abs(best), info.max)
    c = jnp.where(empty, 0, rows.max(jnp.where(near, x, -jnp.inf)))
    # c, which is +inf if an x is, need not be the maximum: the other side has a guard like that of
    # `subtract_max`.
    side = jnp.where(x > c, jnp.maximum(x, c) - c, subtract_max(x, c))
    root = fill_masked(where, jnp.where(empty, 0, jnp.exp(jnp.where(x == c, 0, side) / 2)))
    phase = jnp.ones((), a.dtype)
    if jnp.iscomplexobj(a):
        phase = jnp.exp(lax.complex(jnp.zeros_like(x), fill_masked(where, a.imag)))
    factor = root.astype(a.dtype)
    terms = jnp.where(score == -jnp.inf, 0, b * phase * factor * factor)
    return _WeightedSum(root, phase, terms, jnp.where(empty, 1, rows.sum(terms)), c, empty)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def weighted_logsumexp(a: Array, b: Array, where: Array | None, rows: Rows) -> tuple[Array, Array]:
    """log|S| and the sign of S = sum_i b_i exp(a_i), in the dtype to compute in.

    For complex a and b they are log S and 1.
    """
    w = _weighted_sum(a, b, where, rows)
    # As in `exponentials`: near |S| = 1 the terms that are not the largest keep their digits.
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
    """d log S = sum_j (q_j da_j + s_j db_j) with s_j = exp(a_j) / S and q_j = b_j s_j.

    The sign is constant. q is not formed from s: where b_j = 0 it is 0, and s_j may overflow.
    """
    (a, b, where), (da, db, _) = primals, tangents
    value, sign = weighted_logsumexp(a, b, where, rows)
    parts = [
        rows.sum(share(a, b, where, rows) * fill_masked(where, dv))
        for dv, share in ((da, _weighted_shares), (db, _shares))
        if not isinstance(dv, SymbolicZero)
    ]
    return (value, sign), (sum(parts), jnp.zeros_like(sign))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _weighted_shares(a: Array, b: Array, where: Array | None, rows: Rows) -> Array:
    """q_i = b_i exp(a_i) / sum_j b_j exp(a_j), 0 in a row that is empty."""
    w = _weighted_sum(a, b, where, rows)
    return w.terms / w.total


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _shares(a: Array, b: Array, where: Array | None, rows: Rows) -> Array:
    """s_i = exp(a_i) / sum_j b_j exp(a_j), 0 in a row that is empty.

    Where b_i = 0 its size may overflow, and is then the largest number: 0 times it is 0.
    """
    w = _weighted_sum(a, b, where, rows)
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
        parts.append(q * centre(fill_masked(where, da), q, rows))
    if not isinstance(db, SymbolicZero):
        terms = _shares(a, b, where, rows) * fill_masked(where, db)
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
        parts.append(s * centre(fill_masked(where, da), q, rows))
    if not isinstance(db, SymbolicZero):
        parts.append(-s * rows.sum(s * fill_masked(where, db)))
    return s, sum(parts)


# Called outside jit, each is one compiled program, as in jax.nn.
_jit_logsumexp = jax.jit(row_logsumexp, static_argnums=(2,))
_jit_weighted_logsumexp = jax.jit(weighted_logsumexp, static_argnums=(3,))
