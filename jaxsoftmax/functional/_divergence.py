"""Entropy and divergence of softmax distributions and their derivative rules, on checked logits."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax.functional._reductions import Rows
from jaxsoftmax.functional._stable import (
    centred,
    finite_maximum,
    keep,
    log_softmax,
    only_if,
    or_empty,
    shifted,
    softmax,
)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def entropy(z: Array, where: Array | None, rows: Rows) -> Array:
    """-sum_k p_k log p_k, 0 in a row that is masked throughout."""
    return -rows.sum(softmax(z, where, rows) * _finite_log_softmax(z, where, rows))


@entropy.defjvp
def _entropy_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d H = -sum_k p_k (log p_k + H) dz_k."""
    (z, where), (dz, _) = primals, tangents
    p = softmax(z, where, rows)
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
    maxima = finite_maximum(z, where, rows), finite_maximum(t, where, rows)
    shift = maxima[0] - maxima[1]
    dz, dt = (x - m for x, m in zip((z, t), maxima, strict=True))
    both = (jnp.abs(dz) < jnp.inf) & (jnp.abs(dt) < jnp.inf)
    both = both if where is None else both & where
    # Of two forms of the same number the one with the smaller parts has the smaller rounding.
    close = jnp.abs(z - t) + jnp.abs(shift) < jnp.abs(dz) + jnp.abs(dt)
    d = jnp.where(both, jnp.where(close, z - t - shift, dz - dt), 0)
    d, q = lax.optimization_barrier((d, softmax(t, where, rows)))
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
    p = softmax(z, where, rows)
    _, delta, both, q = _log_ratio(z, t, where, rows)
    log_ratio = delta - kl_divergence(z, t, where, rows)
    return jnp.where(both & (jnp.abs(log_ratio) < 0.5), q * jnp.expm1(log_ratio), p - q)


@_difference.defjvp
def _difference_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    (z, t, where), (dz, dt, _) = primals, tangents

    def difference(z: Array, t: Array) -> Array:
        return softmax(z, where, rows) - softmax(t, where, rows)

    return _difference(z, t, where, rows), jax.jvp(difference, (z, t), (dz, dt))[1]
