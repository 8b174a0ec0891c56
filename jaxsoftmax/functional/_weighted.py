"""Log-sum-exp with factors, real or complex, and its derivative rules, on checked arrays."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax.functional._reductions import Rows
from jaxsoftmax.functional._stable import centred, keep


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
    # The guards of `less` on both sides of c, which is +inf if an x is.
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
