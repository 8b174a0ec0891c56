"""Softmax, log-softmax and the Jacobian, with their derivative rules.

The derivative of softmax, log-softmax and log-sum-exp is the softmax itself, so it is the only
residual that their rules keep, in the input's dtype. Each rule calls the function that it
differentiates, so every higher derivative is analytic too.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _arrays, _checks
from jaxsoftmax._checks import Axis, AxisName
from jaxsoftmax.functional._reductions import Rows, check_rows
from jaxsoftmax.functional._stable import (
    bound_below,
    centre,
    exponentials,
    fill_empty_rows,
    fill_masked,
    mask_and_max,
    shift_rows,
    subtract_max,
    upcast,
)
from jaxsoftmax.functional._temperature import divide_by_temperature


def softmax(
    x: Shaped[ArrayLike, "..."],
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    r"""Softmax: the probabilities that logits define.

    .. math:: \sigma(x)_i = \frac{\exp(x_i)}{\sum_j \exp(x_j)}, \qquad
              \frac{\partial \sigma_i}{\partial x_j} = \sigma_i (\delta_{ij} - \sigma_j)

    or :math:`\sigma(x / T)` at a temperature T.

    Args:
      x: logits, any shape, real.
      axis: the axis or axes over which the result sums to 1; None for all.
      where: entries that take part, boolean, broadcasting to the shape of `x`; None for all.
      temperature: a number or an array that broadcasts to the shape of `x` with size 1 on `axis`,
        at least 0; None for 1. At 0 the result is the limit, equal shares over the largest entries,
        and all derivatives are 0.
      axis_name: the mesh axis or axes over which `axis` is sharded, inside `jax.shard_map`.

    Returns:
      Probabilities, with the shape of `x` and its dtype (the default float for integers). A
      negative temperature that is traced gives NaN.

    Raises:
      TypeError: `x` or `temperature` is not real, `where` is not boolean, `axis` is not an integer,
        or `axis_name` not a string.
      ValueError: `axis` is out of range or repeats, `where` or `temperature` does not broadcast to
        the shape of `x`, or `temperature` is negative or varies along `axis`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import softmax
      >>> softmax(jnp.log(jnp.array([1.0, 2.0, 5.0]))).round(3)
      Array([0.125, 0.25 , 0.625], dtype=float32)
      >>> softmax(jnp.array([1.0, 1.0, jnp.inf]), where=jnp.array([True, True, False]))
      Array([0.5, 0.5, 0. ], dtype=float32)
      >>> softmax(jnp.array([0.0, 1.0, 1.0]), temperature=0)
      Array([0. , 0.5, 0.5], dtype=float32)

    Reference:
      Bridle (1990), Probabilistic interpretation of feedforward classification network outputs, eq.
      1.
    """
    x = _arrays.real_array("x", x)
    z, mask, rows = _check_logits(x, axis, where, temperature, axis_name)
    return _jit_softmax(z, mask, rows).astype(x.dtype)


def log_softmax(
    x: Shaped[ArrayLike, "..."],
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    r"""Logarithm of the softmax, without forming the softmax.

    .. math:: \log\sigma(x)_i = x_i - \log\sum_j \exp(x_j), \qquad
              \frac{\partial \log\sigma_i}{\partial x_j} = \delta_{ij} - \sigma_j

    or :math:`\log\sigma(x / T)` at a temperature T.

    Args:
      x: logits, any shape, real.
      axis: the axis or axes over which the probabilities sum to 1; None for all.
      where: entries that take part, boolean, broadcasting to the shape of `x`; None for all.
      temperature: a number or an array that broadcasts to the shape of `x` with size 1 on `axis`,
        at least 0; None for 1. At 0 the result is the limit, -inf except at the largest entries,
        and all derivatives are 0.
      axis_name: the mesh axis or axes over which `axis` is sharded, inside `jax.shard_map`.

    Returns:
      Log-probabilities in nats, with the shape of `x` and its dtype (the default float for
      integers). A negative temperature that is traced gives NaN.

    Raises:
      TypeError: `x` or `temperature` is not real, `where` is not boolean, `axis` is not an integer,
        or `axis_name` not a string.
      ValueError: `axis` is out of range or repeats, `where` or `temperature` does not broadcast to
        the shape of `x`, or `temperature` is negative or varies along `axis`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import log_softmax
      >>> log_softmax(jnp.array([1e4, 1e4]))
      Array([-0.6931472, -0.6931472], dtype=float32)
      >>> log_softmax(jnp.array([20.0, 0.0]))
      Array([-2.0611537e-09, -2.0000000e+01], dtype=float32)
    """
    x = _arrays.real_array("x", x)
    z, mask, rows = _check_logits(x, axis, where, temperature, axis_name)
    return _jit_log_softmax(z, mask, rows).astype(x.dtype)


def softmax_jacobian(
    x: Shaped[ArrayLike, "..."],
    axis: int = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Jacobian of the softmax, one K x K matrix per row.

    .. math:: J_{ij} = \frac{\partial \sigma_i}{\partial x_j} = \sigma_i (\delta_{ij} - \sigma_j)

    or :math:`\sigma_i (\delta_{ij} - \sigma_j) / T`, with :math:`\sigma` of x / T, at a
    temperature T. The diagonal is computed as :math:`\sigma_i \sum_{j \ne i} \sigma_j`, which is
    the same number but does not cancel where :math:`\sigma_i` is near 1.

    Args:
      x: logits, any shape, real.
      axis: the axis of the K classes.
      where: entries that take part, boolean, broadcasting to the shape of `x`; None for all. Rows
        and columns of masked entries are 0.
      temperature: as in `softmax`; at 0 the Jacobian is 0.

    Returns:
      The Jacobian, of shape (batch axes of `x`, K, K): `axis` is replaced by two axes at the end.

    Raises:
      TypeError: `x` or `temperature` is not real, `where` is not boolean, or `axis` is not an
        integer.
      ValueError: `axis` is out of range, `where` or `temperature` does not broadcast to the shape
        of `x`, or `temperature` is negative or varies along `axis`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import softmax_jacobian
      >>> softmax_jacobian(jnp.zeros(2))
      Array([[ 0.25, -0.25],
             [-0.25,  0.25]], dtype=float32)
    """
    x = _arrays.real_array("x", x)
    index = _checks.axis_index(axis, x.ndim)
    z, mask, rows = _check_logits(upcast(x), index, where, temperature, None)
    p = jnp.moveaxis(_jit_softmax(z, mask, rows), index, -1)
    eye = jnp.eye(p.shape[-1], dtype=bool)
    off_diagonal = jnp.where(eye, 0, p[..., :, None] * p[..., None, :])
    jacobian = jnp.where(eye, off_diagonal.sum(-1, keepdims=True), -off_diagonal)
    if temperature is not None:
        t = _checks.temperature(temperature, x.shape, rows.axes).astype(p.dtype)
        t = jnp.moveaxis(t, index, -1)[..., None]
        jacobian = jnp.where(t == 0, 0, jacobian / jnp.where(t == 0, 1, t))
    return jacobian.astype(x.dtype)


def _check_logits(
    x: Array,
    axis: Axis,
    where: ArrayLike | None,
    temperature: ArrayLike | None,
    axis_name: AxisName,
) -> tuple[Array, Array | None, Rows]:
    """Check the arguments; return the logits divided by the temperature, the mask and the rows."""
    mask, rows = check_rows(x, axis, where, axis_name)
    if temperature is not None:
        t = _checks.temperature(temperature, x.shape, rows.axes)
        x = divide_by_temperature(x, t, mask, rows)
    return x, mask, rows


# The purpose of a softmax: its value, or the derivative of the named function.
Purpose = Literal["value", "log_softmax", "logsumexp"]

# The linear map of each rule works on its residual in the dtype of computation. As a checkpoint it
# saves the residual as it came, in the input's dtype, and converts it again when it is needed.
linear_map = partial(jax.checkpoint, prevent_cse=False)


def softmax_residual(x: Array, where: Array | None, rows: Rows, purpose: Purpose) -> Array:
    """The array that a rule keeps of x: its softmax, or x in float16, where tails underflow."""
    return x if x.dtype == jnp.float16 else row_softmax(x, where, rows, purpose)


def softmax_from_residual(y: Array, where: Array | None, rows: Rows, purpose: Purpose) -> Array:
    """Get the softmax back from its residual, in the dtype to compute in."""
    return row_softmax(upcast(y), where, rows, purpose) if y.dtype == jnp.float16 else upcast(y)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def row_softmax(x: Array, where: Array | None, rows: Rows, purpose: Purpose = "value") -> Array:
    """exp(x_i) / sum_j exp(x_j), 0 in a row that is masked throughout.

    A row whose allowed entries are all -inf is NaN, but 0 as the gradient of log-sum-exp. For the
    derivative of a logarithm the sum is formed as the logarithm forms it, and is computed once.
    """
    d, _ = shift_rows(x, where, rows, sums=1 if purpose == "value" else 2)
    if purpose == "value":
        e = jnp.exp(d)
        (total,) = rows.sums(e)
    else:
        e, total, _ = exponentials(d, rows)
    # A largest entry, if there is one, adds 1 to the total.
    total = (
        jnp.maximum(total, 1)
        if purpose == "logsumexp"
        else fill_empty_rows(total, 1.0, where, rows)
    )
    return rows.select(where, e / total).astype(x.dtype)


@row_softmax.defjvp
def _softmax_jvp(rows: Rows, purpose: Purpose, primals: Any, tangents: Any) -> Any:
    """d s_i = s_i (dx_i - sum_j s_j dx_j)."""
    (x, where), (dx, _) = primals, tangents

    @linear_map
    def linear(y: Array, where: Array | None, dx: Array) -> Array:
        s = softmax_from_residual(y, where, rows, purpose)
        return (s * centre(fill_masked(where, upcast(dx)), s, rows)).astype(x.dtype)

    y = row_softmax(x, where, rows, purpose)
    return y, linear(x if x.dtype == jnp.float16 else y, where, dx)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def row_log_softmax(x: Array, where: Array | None, rows: Rows) -> Array:
    """x_i - log sum_j exp(x_j), -inf where masked, in the dtype to compute in."""
    x, maximum = mask_and_max(x, where, rows, keep_nan=False)
    in_loop = rows.in_loop(x, sums=2)
    d = subtract_max(x, maximum, in_loop)
    log_total = fill_empty_rows(exponentials(d, rows).log_total, 0.0, where, rows)
    if in_loop and not rows.is_short(x):
        # The same number from negatives: for a broadcast that two loops share XLA:CPU may write out
        # an array of the size of x.
        d = -bound_below(maximum) - jnp.maximum(-x, -maximum)
    return rows.select(where, d - log_total, -jnp.inf)


@row_log_softmax.defjvp
def _log_softmax_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d log s_i = dx_i - sum_j s_j dx_j."""
    (x, where), (dx, _) = primals, tangents

    @linear_map
    def linear(y: Array, where: Array | None, dx: Array) -> Array:
        s = softmax_from_residual(y, where, rows, "log_softmax")
        return fill_masked(where, centre(fill_masked(where, upcast(dx)), s, rows))

    y = softmax_residual(x, where, rows, "log_softmax")
    return row_log_softmax(x, where, rows), linear(y, where, dx)


# Called outside jit, each is one compiled program, as in jax.nn.
_jit_softmax = jax.jit(row_softmax, static_argnums=(2, 3))
_jit_log_softmax = jax.jit(row_log_softmax, static_argnums=(2,))
