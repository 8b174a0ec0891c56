"""Entropy and Kullback-Leibler divergence of softmax distributions, with their derivative rules."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _arrays, _checks
from jaxsoftmax._checks import Axis
from jaxsoftmax.functional._reductions import Rows, check_rows
from jaxsoftmax.functional._softmax import row_log_softmax, row_softmax
from jaxsoftmax.functional._stable import (
    centre,
    compute_dtype,
    constant_max,
    fill_empty_rows,
    fill_masked,
    nan_unless,
    shift_rows,
    upcast,
)


def entropy(
    logits: Shaped[ArrayLike, "..."],
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Entropy of the softmax of logits, in nats.

    .. math:: H(z) = -\sum_k p_k \log p_k, \qquad p = \sigma(z), \qquad
              \frac{\partial H}{\partial z_j} = -p_j (\log p_j + H)

    Args:
      logits: any shape, real.
      axis: the axis or axes of the classes; None for all.
      where: classes that take part, boolean, broadcasting to the shape of `logits`; None for all.

    Returns:
      The entropy in nats, with the shape of `logits` less `axis`, in float32 or float64. A class of
      probability 0 contributes 0; a row that is masked throughout has entropy 0.

    Raises:
      TypeError: `logits` is not real, `where` is not boolean, or `axis` is not an integer.
      ValueError: `axis` is out of range or repeats, or `where` does not broadcast to the shape of
        `logits`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import entropy
      >>> entropy(jnp.array([0.0, 0.0, -jnp.inf]))
      Array(0.6931472, dtype=float32)

    Reference:
      Cover and Thomas (2006), Elements of Information Theory, eq. 2.1.
    """
    z = upcast(_arrays.real_array("logits", logits))
    mask, rows = check_rows(z, axis, where)
    return jnp.squeeze(_jit_entropy(z, mask, rows), rows.axes)


def kl_divergence(
    logits: Shaped[ArrayLike, "..."],
    target_logits: Shaped[ArrayLike, "..."],
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Kullback-Leibler divergence of a target distribution from a model, both given by logits.

    .. math:: D(q \| p) = \sum_k q_k \log\frac{q_k}{p_k}, \qquad q = \sigma(t), \; p = \sigma(z)

    It is summed in terms that are never negative, so that it and its derivatives keep their digits
    between distributions that are close.

    Args:
      logits: z of the model, any shape, real.
      target_logits: t of the target, of the shape of `logits`.
      axis: the axis or axes of the classes; None for all.
      where: classes that take part, boolean, broadcasting to the shape of `logits`; None for all.

    Returns:
      The divergence in nats, at least 0, with the shape of `logits` less `axis`, in float32 or
      float64. A class that both exclude contributes 0, one that the model alone excludes makes it
      +inf.

    Raises:
      TypeError: `logits` or `target_logits` is not real, `where` is not boolean, or `axis` is not
        an integer.
      ValueError: `axis` is out of range or repeats, the shapes of `logits` and `target_logits`
        differ, or `where` does not broadcast to them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import kl_divergence
      >>> kl_divergence(jnp.zeros(2), jnp.array([0.0, -jnp.inf]))
      Array(0.6931472, dtype=float32)

    Reference:
      Kullback and Leibler (1951), On information and sufficiency, eq. 2.4.
    """
    z = _arrays.real_array("logits", logits)
    t = _arrays.real_array("target_logits", target_logits)
    _checks.has_shape("target_logits", t, z.shape, "(shape of logits)")
    dtype = compute_dtype(z.dtype, t.dtype)
    mask, rows = check_rows(z, axis, where)
    value = _jit_kl_divergence(z.astype(dtype), t.astype(dtype), mask, rows)
    return jnp.squeeze(value, rows.axes)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def row_entropy(z: Array, where: Array | None, rows: Rows) -> Array:
    """-sum_k p_k log p_k, 0 in a row that is masked throughout."""
    return -rows.sum(row_softmax(z, where, rows) * _finite_log_softmax(z, where, rows))


@row_entropy.defjvp
def _entropy_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d H = -sum_k p_k (log p_k + H) dz_k."""
    (z, where), (dz, _) = primals, tangents
    p = row_softmax(z, where, rows)
    gradient = -p * centre(_finite_log_softmax(z, where, rows), p, rows)
    return row_entropy(z, where, rows), rows.sum(gradient * fill_masked(where, dz))


def _finite_log_softmax(z: Array, where: Array | None, rows: Rows) -> Array:
    """log p_k, with 0 in place of -inf."""
    log_p = row_log_softmax(z, where, rows)
    return jnp.where(log_p == -jnp.inf, 0, log_p)


def _exp_minus_tangent(x: Array) -> Array:
    """exp(x) - 1 - x, near 0 from its series, which keeps the digits."""
    series = jnp.ones_like(x)
    for k in range(8 if x.dtype == jnp.float32 else 14, 2, -1):
        series = 1 + x * (1 / k) * series
    return jnp.where(jnp.abs(x) < 0.25, x * x / 2 * series, jnp.expm1(x) - x)


class _LogRatio(NamedTuple):
    """log(p / q) for p = softmax(z) and q = softmax(t), up to a constant per row."""

    d: Array  # z - t minus the difference of their maxima, 0 where p or q is 0
    delta: Array  # d minus its mean under q
    both: Array  # where neither is 0
    q: Array


def _log_ratio(z: Array, t: Array, where: Array | None, rows: Rows) -> _LogRatio:
    """Compare p and q by differences of logits, which are exact between close distributions."""
    maxima = constant_max(z, where, rows), constant_max(t, where, rows)
    shift = maxima[0] - maxima[1]
    dz, dt = (x - m for x, m in zip((z, t), maxima, strict=True))
    both = (jnp.abs(dz) < jnp.inf) & (jnp.abs(dt) < jnp.inf)
    both = both if where is None else both & where
    # Of two forms of the same number the one with the smaller parts has the smaller rounding.
    close = jnp.abs(z - t) + jnp.abs(shift) < jnp.abs(dz) + jnp.abs(dt)
    d = jnp.where(both, jnp.where(close, z - t - shift, dz - dt), 0)
    d, q = lax.optimization_barrier((d, row_softmax(t, where, rows)))
    return _LogRatio(d, centre(d, q, rows), both, q)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def row_kl_divergence(z: Array, t: Array, where: Array | None, rows: Rows) -> Array:
    """sum_k q_k log(q_k / p_k) = log sum_k q_k exp(delta_k), 0 in a row that is masked throughout.

    As the mean of delta is 0 the sum is 1 + sum_k q_k (exp(delta_k) - 1 - delta_k), whose terms are
    not negative. They keep their digits between distributions that are close.
    """
    # The barriers keep exponentials and selections out of the sums, which would compute them anew.
    d, delta, both, q = lax.optimization_barrier(_log_ratio(z, t, where, rows))
    (dz, _), (dt, _) = shift_rows(z, where, rows), shift_rows(t, where, rows)
    ez = lax.optimization_barrier(jnp.exp(dz))
    total_z = rows.sum(ez)
    # q exp(delta) is exp(dz + c), also where q is 0. The largest q is 1 over the sum of exp(dt).
    c = jnp.log(rows.max(q)) - rows.sum(q * d)
    scaled = ez * jnp.exp(jnp.minimum(c, 40))
    large = ~both | (delta > 1)
    terms = jnp.where(
        large, scaled - q * (1 + delta), q * _exp_minus_tangent(jnp.minimum(delta, 1))
    )
    excluded = (ez == 0) & (dt > -jnp.inf) & ~both
    total = rows.sum(lax.optimization_barrier(jnp.where(excluded, jnp.inf, terms)))
    value = jnp.where(c > 40, c + jnp.log(total_z), jnp.log1p(jnp.maximum(total, 0)))
    value = jnp.where(total == jnp.inf, total, value)
    return nan_unless(fill_empty_rows(total_z, 1.0, where, rows) > 0, value)


@partial(row_kl_divergence.defjvp, symbolic_zeros=True)
def _kl_divergence_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d D = sum_k (p_k - q_k) dz_k - q_k delta_k dt_k."""
    (z, t, where), (dz, dt, _) = primals, tangents
    parts = []
    if not isinstance(dz, SymbolicZero):
        parts.append(rows.sum(_difference(z, t, where, rows) * fill_masked(where, dz)))
    if not isinstance(dt, SymbolicZero):
        _, delta, _, q = _log_ratio(z, t, where, rows)
        parts.append(-rows.sum(q * delta * fill_masked(where, dt)))
    return row_kl_divergence(z, t, where, rows), sum(parts)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _difference(z: Array, t: Array, where: Array | None, rows: Rows) -> Array:
    """p - q, with the digits that it has between distributions that are close."""
    p = row_softmax(z, where, rows)
    _, delta, both, q = _log_ratio(z, t, where, rows)
    divergence = row_kl_divergence(z, t, where, rows)
    # Between others log(p / q) is off by more than p - q is.
    close = both & (jnp.abs(delta) + divergence < 1)
    return jnp.where(close, q * jnp.expm1(delta - divergence), p - q)


@_difference.defjvp
def _difference_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d (p - q) = dp - dq."""
    (z, t, where), (dz, dt, _) = primals, tangents

    def difference(z: Array, t: Array) -> Array:
        return row_softmax(z, where, rows) - row_softmax(t, where, rows)

    return _difference(z, t, where, rows), jax.jvp(difference, (z, t), (dz, dt))[1]


# Called outside jit, each is one compiled program, as in jax.nn.
_jit_entropy = jax.jit(row_entropy, static_argnums=(2,))
_jit_kl_divergence = jax.jit(row_kl_divergence, static_argnums=(3,))
