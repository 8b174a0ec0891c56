"""The numerical core of the softmax family: dtypes, masks, x - max, log-sums, centring.

All functions take checked arrays. A mask `where` is boolean and broadcasts to its array, None for
no mask; `rows` says which axes form a row.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxsoftmax.functional._reductions import Rows


def compute_dtype(*dtypes: DTypeLike) -> DTypeLike:
    """The dtype to compute in with floating `dtypes`: the widest of them, at least float32."""
    return max((jnp.float32, *dtypes), key=lambda dtype: jnp.finfo(dtype).bits)


def upcast(value: Array) -> Array:
    """Convert `value` to the dtype to compute in."""
    return value.astype(compute_dtype(value.dtype))


def fill_masked(where: Array | None, value: Array, fill: float = 0) -> Array:
    """Replace the masked entries of `value` by `fill`."""
    return value if where is None else jnp.where(where, value, fill)


def fill_empty_rows(value: Array, fill: float, where: Array | None, rows: Rows) -> Array:
    """Replace a value per row by `fill` in rows that are masked throughout."""
    return value if where is None else jnp.where(rows.any(where), value, fill)


def nan_unless(condition: Array, value: Array) -> Array:
    """`value` where the condition holds, else NaN with NaN derivatives.

    Where it holds, no NaN occurs on the way.
    """
    one = condition.astype(value.dtype)
    return value * (one / one)


def mask_and_max(x: Array, where: Array | None, rows: Rows, keep_nan: bool) -> tuple[Array, Array]:
    """x in the dtype to compute in, -inf where masked, and its maximum as `Rows.max` gives it."""
    x = rows.select(where, x, -jnp.inf)
    return upcast(x), upcast(rows.max(x, keep_nan))


def subtract_max(x: Array, maximum: Array, in_loop: bool = False) -> Array:
    """x - m for the maximum m, with m kept finite for a row of -inf; NaN in a row with +inf or NaN.

    `in_loop` says that `Rows.sums` adds up what is made of it in one loop.
    """
    # Inside a larger jit XLA may compute x anew and contract x - m into a fused multiply-add, whose
    # x is not the rounded one that m was taken from: near 1e11 exp then overflows (jax#37234).
    # The minimum is m itself for the largest entry and keeps the contraction out. It takes the
    # maximum as it came: of m alone XLA:CPU makes an array of the size of x.
    # In a loop a selection does the same in one instruction instead of four. The library of XLA:CPU
    # has none, so where that may take all of a softmax the minimum is faster.
    x = jnp.where(maximum < x, maximum, x) if in_loop else jnp.minimum(x, maximum)
    return x - bound_below(maximum)


def bound_below(maximum: Array) -> Array:
    """Replace a maximum of -inf by the least finite number."""
    return jnp.maximum(maximum, jnp.finfo(maximum.dtype).min)


def shift_rows(
    x: Array, where: Array | None, rows: Rows, sums: int = 2, keep_nan: bool = False
) -> tuple[Array, Array]:
    """x - m, -inf where masked, and the maximum m of each row, kept finite.

    `sums` is the number of sums over a row that are made of it.
    """
    x, maximum = mask_and_max(x, where, rows, keep_nan)
    return subtract_max(x, maximum, rows.in_loop(x, sums)), bound_below(maximum)


def constant_max(x: Array, where: Array | None, rows: Rows) -> Array:
    """The maximum m of each row, kept finite, as a constant of the derivatives."""
    return bound_below(rows.max(fill_masked(where, lax.stop_gradient(x), -jnp.inf)))


class Exponentials(NamedTuple):
    """exp(x - m), their sum over a row, and its logarithm."""

    e: Array
    total: Array
    log_total: Array


def exponentials(d: Array, rows: Rows) -> Exponentials:
    """Exponentials of d = x - m with their sum and its logarithm.

    Where one entry holds almost everything the sum is 1 + t with a tiny t. The exponential of a
    largest entry is 1 and of all others it is less, so t is the sum of the fractional parts.
    """
    e = jnp.exp(d)
    total, t = rows.sums(e, e - jnp.floor(e))
    log_total = jnp.log1p(jnp.where(jnp.abs(total - 1) < 0.5, t, total - 1))
    # The larger of both sums is the total: XLA would drop a sum that is not used, before it sees
    # that the logarithm uses it.
    return Exponentials(e, jnp.maximum(total, t), log_total)


def centre(t: Array, p: Array, rows: Rows) -> Array:
    """Subtract from t its mean under the weights p, which sum to 1.

    This projection is applied twice: in exact arithmetic the second changes nothing, but it
    restores what the rounding of the first lost, so that a saturated row keeps its tiny derivative
    and a row of the transpose sums to 0.
    """
    # Where t is a product, XLA may contract it and the first subtraction into a fused multiply-add
    # at one place and not at another, which the second can not restore. A selection keeps it out.
    t = jnp.where(p == p, t, 0)
    for _ in range(2):
        t = t + rows.expand(-rows.sum(p * t), t)
    return t
