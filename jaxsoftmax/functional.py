"""Softmax, log-softmax and log-sum-exp, with analytic derivatives of every order.

Shapes: an input has any shape; `axis` (an integer, several, or None for all) spans the classes, the
  other axes
are batch axes, and a *row* is one batch entry. `where` is a boolean array that broadcasts to the
input's shape.

The derivative of all three is the softmax itself, so it is the only residual that any rule keeps,
in the input's dtype. Each rule calls the function that it differentiates, so every higher
derivative is analytic too.

Conventions, the same in the whole module:

* A masked entry (`where` False) has softmax 0 and log-softmax -inf. Whatever stands there, NaN and
  inf included, reaches neither a value nor a derivative. A row that is masked throughout has
  log-sum-exp -inf, and all its derivatives are 0.
* A row whose allowed entries are all -inf has softmax NaN and log-sum-exp -inf; one with an allowed
  +inf or NaN has softmax NaN.
* Integers and booleans are converted to the default float. bfloat16 and float16 are computed in
  float32 and returned in their own dtype.
"""

from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _checks
from jaxsoftmax._checks import Axis

Axes = tuple[int, ...]


def softmax(
    x: Shaped[ArrayLike, "..."], axis: Axis = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    r"""Softmax, the probabilities that logits stand for.

    .. math:: \sigma(x)_i = \frac{\exp(x_i)}{\sum_j \exp(x_j)}, \qquad
              \frac{\partial \sigma_i}{\partial x_j} = \sigma_i (\delta_{ij} - \sigma_j)

    Args:
      x: logits, any shape, real.
      axis: the axis or axes over which the result sums to 1; None for all.
      where: entries that take part, boolean, broadcasting to the shape of `x`; None for all.

    Returns:
      Probabilities, with the shape of `x` and its dtype (the default float for integers).

    Raises:
      TypeError: `x` is not real, `where` is not boolean, or `axis` is not an integer.
      ValueError: `axis` is out of range or repeats, or `where` does not broadcast to the shape of
        `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import softmax
      >>> softmax(jnp.log(jnp.array([1.0, 2.0, 5.0]))).round(3)
      Array([0.125, 0.25 , 0.625], dtype=float32)
      >>> softmax(jnp.array([1.0, 1.0, jnp.nan]), where=jnp.array([True, True, False]))
      Array([0.5, 0.5, 0. ], dtype=float32)

    Reference:
      Bridle (1990), Probabilistic interpretation of feedforward classification network outputs, eq.
      1.
    """
    x = _checks.real_array("x", x)
    axes = _checks.axis_indices(axis, x.ndim)
    return _compiled_softmax(x, None, _checks.mask_array("where", where, x.shape), axes, False)


def log_softmax(
    x: Shaped[ArrayLike, "..."], axis: Axis = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    r"""Logarithm of the softmax, without forming the softmax.

    .. math:: \log\sigma(x)_i = x_i - \log\sum_j \exp(x_j), \qquad
              \frac{\partial \log\sigma_i}{\partial x_j} = \delta_{ij} - \sigma_j

    Args:
      x: logits, any shape, real.
      axis: the axis or axes over which the probabilities sum to 1; None for all.
      where: entries that take part, boolean, broadcasting to the shape of `x`; None for all.

    Returns:
      Log-probabilities in nats, with the shape of `x` and its dtype (the default float for
      integers).

    Raises:
      TypeError: `x` is not real, `where` is not boolean, or `axis` is not an integer.
      ValueError: `axis` is out of range or repeats, or `where` does not broadcast to the shape of
        `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import log_softmax
      >>> log_softmax(jnp.array([1e4, 1e4]))
      Array([-0.6931472, -0.6931472], dtype=float32)
    """
    x = _checks.real_array("x", x)
    axes = _checks.axis_indices(axis, x.ndim)
    return _compiled_log_softmax(x, _checks.mask_array("where", where, x.shape), axes)


@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]: ...
@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
    where: Bool[ArrayLike, "..."] | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]: ...
@overload
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: Axis,
    b: Shaped[ArrayLike, "..."] | None,
    keepdims: bool,
    return_sign: Literal[True],
    where: Bool[ArrayLike, "..."] | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]: ...
def logsumexp(
    a: Shaped[ArrayLike, "..."],
    axis: Axis = None,
    b: Shaped[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Float[Array, "..."]]:
    r"""Logarithm of a sum of exponentials, weighted by `b` if given.

    .. math:: L(a, b) = \log\Bigl|\sum_i b_i \exp(a_i)\Bigr|, \qquad
              \frac{\partial L}{\partial a_j} = \frac{b_j \exp(a_j)}{\sum_i b_i \exp(a_i)}, \qquad
              \frac{\partial L}{\partial b_j} = \frac{\exp(a_j)}{\sum_i b_i \exp(a_i)}

    Args:
      a: exponents, any shape, real.
      axis: the axis or axes to sum over; None, as in `jax.nn.logsumexp`, for all.
      b: factors of the exponentials, real, broadcasting to the shape of `a`; None for 1.
      keepdims: keep the summed axes with size 1.
      return_sign: return also the sign of the sum.
      where: entries that take part, boolean, broadcasting to the shape of `a`; None for all.

    Returns:
      The logarithm, with the shape of `a` less `axis`, in the dtype of `a` and `b`; with
      `return_sign` the pair (logarithm of the absolute sum, sign: -1, 0 or 1). Without it the
      logarithm of a negative sum is NaN. A sum over nothing is -inf.

    Raises:
      TypeError: `a` or `b` is not real, `where` is not boolean, or `axis` is not an integer.
      ValueError: `axis` is out of range or repeats, or `b` or `where` does not broadcast to the
        shape of `a`.

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
    a = _checks.real_array("a", a)
    axes = _checks.axis_indices(axis, a.ndim)
    if b is not None:
        b = jnp.asarray(b, a.dtype) if isinstance(b, (int, float)) else b
        b = _checks.broadcastable("b", _checks.real_array("b", b), a.shape)
        dtype = a.dtype if a.dtype == b.dtype else compute_dtype(a.dtype, b.dtype)
        a, b = a.astype(dtype), b.astype(dtype)
    mask = _checks.mask_array("where", where, a.shape)
    if b is not None and mask is not None:
        b = jnp.where(mask, b, 0)
    value, sign = _compiled_logsumexp(a, b, mask, axes)
    if b is not None and not return_sign:
        value = value * jnp.where(sign < 0, jnp.nan, 1.0).astype(value.dtype)
    if not keepdims:
        value, sign = jnp.squeeze(value, axes), jnp.squeeze(sign, axes)
    return (value, sign) if return_sign else value


def softmax_jacobian(
    x: Shaped[ArrayLike, "..."], axis: int = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    r"""Jacobian of the softmax, one K x K matrix per row.

    .. math:: J_{ij} = \frac{\partial \sigma_i}{\partial x_j} = \sigma_i (\delta_{ij} - \sigma_j)

    The diagonal is computed as :math:`\sigma_i \sum_{j \ne i} \sigma_j`, which is the same number
    but does not cancel where :math:`\sigma_i` is near 1.

    Args:
      x: logits, any shape, real.
      axis: the axis of the K classes.
      where: entries that take part, boolean, broadcasting to the shape of `x`; None for all. Rows
        and columns of masked entries are 0.

    Returns:
      The Jacobian, of shape (batch axes of `x`, K, K): `axis` is replaced by two axes at the end.

    Raises:
      TypeError: `x` is not real, `where` is not boolean, or `axis` is not an integer.
      ValueError: `axis` is out of range, or `where` does not broadcast to the shape of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import softmax_jacobian
      >>> softmax_jacobian(jnp.zeros(2))
      Array([[ 0.25, -0.25],
             [-0.25,  0.25]], dtype=float32)
    """
    x = _checks.real_array("x", x)
    index = _checks.axis_index(axis, x.ndim)
    p = softmax(x.astype(compute_dtype(x.dtype)), index, where)
    p = jnp.moveaxis(p, index, -1)
    products = p[..., :, None] * p[..., None, :]
    off_diagonal = jnp.where(jnp.eye(p.shape[-1], dtype=bool), 0, products)
    diagonal = off_diagonal.sum(-1, keepdims=True) * jnp.eye(p.shape[-1], dtype=p.dtype)
    return (diagonal - off_diagonal).astype(x.dtype)


def compute_dtype(*dtypes: DTypeLike) -> DTypeLike:
    """The dtype to compute in with floating `dtypes`: the widest of them, at least float32."""
    return max((jnp.float32, *dtypes), key=lambda dtype: jnp.finfo(dtype).bits)


def _keep(where: Array | None, value: Array, otherwise: float = 0) -> Array:
    """`value` where allowed, `otherwise` where masked."""
    return value if where is None else jnp.where(where, value, otherwise)


def _shifted(x: Array, b: Array | None, where: Array | None, axes: Axes) -> tuple[Array, Array]:
    """x - m, -inf where masked, and m: the maximum over entries with b != 0, or 0 if infinite."""
    x = _keep(where, x.astype(compute_dtype(x.dtype)), -jnp.inf)
    counted = x if b is None else jnp.where(b == 0, -jnp.inf, x)
    maximum = jnp.max(counted, axes, keepdims=True, initial=-jnp.inf)
    # Inside a larger jit XLA may compute x anew and contract x - m into a fused multiply-add, whose
    # x is not the rounded one that m was taken from: near 1e11 exp then overflows (jax#37234).
    # minimum(x, m) is m itself for the largest entry and keeps the contraction out. An entry of
    # factor 0 may exceed m.
    bounded = jnp.minimum(x, maximum)
    if b is not None:
        bounded = jnp.where(b == 0, x, bounded)
    m = jnp.where(jnp.isfinite(maximum), maximum, 0)
    return bounded - m, m


def _total(e: Array, b: Array | None, axes: Axes) -> Array:
    """sum_j b_j e_j, the axes kept; a factor 0 drops its entry even where e overflows."""
    terms = e if b is None else jnp.where(b == 0, 0, b.astype(e.dtype) * e)
    return jnp.sum(terms, axes, keepdims=True)


def _normaliser(e: Array, b: Array | None, where: Array | None, axes: Axes) -> Array:
    """The total as a divisor: 1 for a row masked throughout, NaN for one with +inf."""
    total = _total(e, b, axes)
    total = jnp.where(jnp.isinf(total), jnp.nan, total)
    if where is None:
        return total
    return jnp.where(jnp.any(jnp.broadcast_to(where, e.shape), axes, keepdims=True), total, 1)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _softmax(
    x: Array, b: Array | None, where: Array | None, axes: Axes, empty_is_zero: bool
) -> Array:
    """exp(x_i) / sum_j b_j exp(x_j): the softmax if b is None, else derivatives of log-sum-exp.

    A row with no entry above -inf is NaN, or 0 if `empty_is_zero`, as the gradient of log-sum-exp
    needs it.
    """
    e = jnp.exp(_shifted(x, b, where, axes)[0])
    total = _normaliser(e, b, where, axes)
    if empty_is_zero:
        total = jnp.where(_total(e, None, axes) == 0, 1, total)
    return _keep(where, e / total).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _log_softmax(x: Array, where: Array | None, axes: Axes) -> Array:
    shifted, _ = _shifted(x, None, where, axes)
    log_total = jnp.log(_normaliser(jnp.exp(shifted), None, where, axes))
    return _keep(where, shifted - log_total, -jnp.inf).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _logsumexp(a: Array, b: Array | None, where: Array | None, axes: Axes) -> tuple[Array, Array]:
    """log|S| and the sign of S = sum_i b_i exp(a_i), the axes kept."""
    shifted, m = _shifted(a, b, where, axes)
    total = _total(jnp.exp(shifted), b, axes)
    return (jnp.log(jnp.abs(total)) + m).astype(a.dtype), jnp.sign(total).astype(a.dtype)


def _centred(t: Array, p: Array, axes: Axes) -> Array:
    """t less its mean under the weights p, which sum to 1.

    This projection is applied twice: in exact arithmetic the second changes nothing, but it
    restores what the rounding of the first lost, so that a saturated row keeps its tiny derivative
    and a row of the transpose sums to 0.
    """
    for _ in range(2):
        t = t - jnp.sum(p * t, axes, keepdims=True)
    return t


# The linear map of each rule works on its residual in the dtype of computation. As a checkpoint it
# saves the residual as it came, in the input's dtype, and converts it again when it is needed.
_linear_map = partial(jax.checkpoint, prevent_cse=False)


def _wide(value: Array, where: Array | None) -> Array:
    """A value of the tangent's computation, 0 where masked."""
    return _keep(where, value.astype(compute_dtype(value.dtype)))


@_softmax.defjvp
def _softmax_jvp(axes: Axes, empty_is_zero: bool, primals: Any, tangents: Any) -> Any:
    """d s_i = s_i (dx_i - sum_j s_j (b_j dx_j + db_j))."""
    (x, b, where), (dx, db, _) = primals, tangents
    y = _softmax(x, b, where, axes, empty_is_zero)

    @_linear_map
    def linear(y: Array, b: Array | None, where: Array | None, dx: Array, db: Any) -> Array:
        s, dlog = _wide(y, where), _wide(dx, where)
        if b is None:
            dlog = _centred(dlog, s, axes)
        else:
            dlog = _centred(dlog, s * _wide(b, where), axes)
            dlog = dlog - jnp.sum(s * _wide(db, where), axes, keepdims=True)
        return _keep(where, s * dlog).astype(y.dtype)

    return y, linear(y, b, where, dx, db)


@_log_softmax.defjvp
def _log_softmax_jvp(axes: Axes, primals: Any, tangents: Any) -> Any:
    """d log s_i = dx_i - sum_j s_j dx_j."""
    (x, where), (dx, _) = primals, tangents

    @_linear_map
    def linear(s: Array, where: Array | None, dx: Array) -> Array:
        dlog = _centred(_wide(dx, where), _wide(s, where), axes)
        return _keep(where, dlog).astype(s.dtype)

    return _log_softmax(x, where, axes), linear(_softmax(x, None, where, axes, False), where, dx)


@_logsumexp.defjvp
def _logsumexp_jvp(axes: Axes, primals: Any, tangents: Any) -> Any:
    """d log|S| = sum_j s_j (b_j da_j + db_j); the sign is constant."""
    (a, b, where), (da, db, _) = primals, tangents
    value, sign = _logsumexp(a, b, where, axes)

    @_linear_map
    def linear(s: Array, b: Array | None, where: Array | None, da: Array, db: Any) -> Array:
        terms = _wide(da, where)
        if b is not None:
            terms = _wide(b, where) * terms + _wide(db, where)
        return jnp.sum(_wide(s, where) * terms, axes, keepdims=True).astype(s.dtype)

    dvalue = linear(_softmax(a, b, where, axes, True), b, where, da, db)
    return (value, sign), (dvalue, jnp.zeros_like(sign))


# Called outside jit, each is one compiled program, as in jax.nn.
_compiled_softmax = jax.jit(_softmax, static_argnums=(3, 4))
_compiled_log_softmax = jax.jit(_log_softmax, static_argnums=(2,))
_compiled_logsumexp = jax.jit(_logsumexp, static_argnums=(3,))
