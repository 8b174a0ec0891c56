"""Division of logits by a temperature, with the limit at 0, and its derivative rules.

With the maximum m of a row and a temperature T >= 0 the result is (x - m) / T, of which softmax and
log-softmax are those of x / T. At T = 0 it is the limit: 0 at the largest entries and -inf
elsewhere, with derivatives 0.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax.functional._reductions import Rows
from jaxsoftmax.functional._stable import (
    compute_dtype,
    constant_max,
    fill_masked,
    nan_unless,
    upcast,
)


@partial(jax.jit, static_argnums=(3,))
def divide_by_temperature(x: Array, temperature: Array, where: Array | None, rows: Rows) -> Array:
    """(x - m) / T in the dtype to compute in, with the derivatives of x / T; NaN if T < 0."""
    t = temperature.astype(compute_dtype(x.dtype))
    return _divide(fill_masked(where, upcast(x)), nan_unless(temperature >= 0, t), where, rows)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _divide(x: Array, t: Array, where: Array | None, rows: Rows) -> Array:
    """(x - m) / T of logits and temperatures in one dtype."""
    m, cold = constant_max(x, where, rows), _is_cold(t)
    d = x - m
    # x >= m rather than d == 0: inside a larger jit d may come from a fused multiply-add. m - m is
    # NaN for a row with +inf.
    limit = jnp.where(x >= m, m - m, -jnp.inf)
    return jnp.where(cold, limit, jnp.where(d == -jnp.inf, d, d / jnp.where(cold, 1, t)))


@partial(_divide.defjvp, symbolic_zeros=True)
def _divide_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d (d / T) = dx / T - d / T^2 dT for d = x - m; the shift m changes no result."""
    (x, t, where), (dx, dt, _) = primals, tangents
    cold_is_inf = jnp.where(_is_cold(t), jnp.inf, t)
    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(dx * _divide_by_power(jnp.ones_like(t), cold_is_inf, 1))
    if not isinstance(dt, SymbolicZero):
        d = fill_masked(where, x - constant_max(x, where, rows))
        d = jnp.where(d == -jnp.inf, 0, d)
        parts.append(-_divide_by_power(d, cold_is_inf, 2) * dt)
    return _divide(x, t, where, rows), sum(parts)


def _is_cold(t: Array) -> Array:
    return t < jnp.finfo(t.dtype).tiny


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _divide_by_power(d: Array, t: Array, n: int) -> Array:
    """d / t^n, bounded so that it does not overflow even times the n of its derivative.

    A larger one belongs to an entry without any probability, and 0 times it is 0.
    """
    largest = jnp.finfo(d.dtype).max / 1024
    for _ in range(n):
        d = jnp.clip(d / t, -largest, largest)
    return d


@_divide_by_power.defjvp
def _divide_by_power_jvp(n: int, primals: Any, tangents: Any) -> Any:
    """d (d / t^n) = dd / t^n - n d / t^(n + 1) dt."""
    (d, t), (dd, dt) = primals, tangents
    tangent = dd * _divide_by_power(jnp.ones_like(t), t, n) - n * dt * _divide_by_power(d, t, n + 1)
    return _divide_by_power(d, t, n), tangent
