"""Softmax, log-softmax, log-sum-exp, entropy and divergence, with derivatives of every order.

Shapes: an input has any shape; `axis` (an integer, several, or None for all) spans the classes, the
other axes are batch axes, and a *row* is one batch entry. `where` is a boolean array that
broadcasts to the input's shape. `axis_name` names the mesh axis, or axes, over which a row is
sharded: under `jax.shard_map` each device then holds a part of every row, and only one maximum and
one or two sums per row travel.

Conventions, the same in the whole module:

* A masked entry (`where` False) has softmax 0 and log-softmax -inf. Whatever stands there, NaN and
  inf included, reaches neither a value nor a derivative. A row that is masked throughout has
  log-sum-exp -inf, and all its derivatives are 0.
* A row whose allowed entries are all -inf has softmax NaN and log-sum-exp -inf; one with an allowed
  +inf or NaN has softmax NaN.
* Integers and booleans are converted to the default float. bfloat16 and float16 are computed in
  float32 and returned in their own dtype, `entropy` and `kl_divergence` in float32.
* Values and derivatives keep their relative accuracy in the tails, where one entry holds almost all
  of the mass.
"""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Inexact, Shaped

from jaxsoftmax import _checks
from jaxsoftmax._checks import Axis, AxisName
from jaxsoftmax.functional import _divergence, _stable, _weighted
from jaxsoftmax.functional._reductions import Rows
from jaxsoftmax.functional._stable import compute_dtype, wide


def softmax(
    x: Shaped[ArrayLike, "..."],
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    temperature: Shaped[ArrayLike, "..."] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    r"""Softmax, the probabilities that logits stand for.

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
    x = _checks.real_array("x", x)
    z, mask, rows = _prepared(x, axis, where, temperature, axis_name)
    return _softmax(z, mask, rows).astype(x.dtype)


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
        at least 0; None for 1. At 0 the result is the limit, -inf but for the largest entries, and
        all derivatives are 0.
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
    x = _checks.real_array("x", x)
    z, mask, rows = _prepared(x, axis, where, temperature, axis_name)
    return _log_softmax(z, mask, rows).astype(x.dtype)


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
    dtypes = {_checks.own_dtype(value) for value in (a, b)} - {None}
    a, b = _checks.array("a", a), None if b is None else _checks.array("b", b)
    if jnp.iscomplexobj(a) or (b is not None and jnp.iscomplexobj(b)):
        b = jnp.ones((), a.dtype) if b is None else b
        return _complex_logsumexp(a, b, axis, keepdims, return_sign, where, axis_name, dtypes)
    a = _checks.real_array("a", a)
    dtype = a.dtype
    if b is not None:
        b = _checks.real_array("b", b)
        dtypes = dtypes or {dtype}
        dtype = dtypes.pop() if len(dtypes) == 1 else jnp.dtype(compute_dtype(*dtypes))
        a, b = (v.astype(compute_dtype(dtype)) for v in (a, b))
        a, b = _checks.broadcast_together("a", a, "b", b)
    mask, rows = _mask_and_rows(a, axis, where, axis_name)
    if b is None:
        value = _logsumexp(a, mask, rows)
        sign = jnp.where(jnp.isnan(value), value, jnp.where(value == -jnp.inf, 0, 1))
    else:
        value, sign = _weighted_logsumexp(a, b, mask, rows)
        if not return_sign:
            value = _stable.only_if(sign >= 0, value)
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
    """`logsumexp` of complex numbers, as in jax.nn: the sign is S / |S|."""
    double = {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}
    dtype = jnp.complex128 if (dtypes or {a.dtype}) & double else jnp.complex64
    a, b = _checks.broadcast_together("a", a.astype(dtype), "b", b.astype(dtype))
    mask, rows = _mask_and_rows(a, axis, where, axis_name)
    value, _ = _weighted_logsumexp(a, b, mask, rows)
    if not keepdims:
        value = jnp.squeeze(value, rows.axes)
    if not return_sign:
        return value
    size, angle = value.real, value.imag
    sign = jnp.exp(lax.complex(jnp.zeros_like(angle), angle))
    return size, jnp.where(size == -jnp.inf, 0, sign)


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
    x = _checks.real_array("x", x)
    index = _checks.axis_index(axis, x.ndim)
    z, mask, rows = _prepared(wide(x), index, where, temperature, None)
    p = jnp.moveaxis(_softmax(z, mask, rows), index, -1)
    eye = jnp.eye(p.shape[-1], dtype=bool)
    off_diagonal = jnp.where(eye, 0, p[..., :, None] * p[..., None, :])
    jacobian = jnp.where(eye, off_diagonal.sum(-1, keepdims=True), -off_diagonal)
    if temperature is not None:
        t = _checks.temperature(temperature, x.shape, rows.axes).astype(p.dtype)
        t = jnp.moveaxis(t, index, -1)[..., None]
        jacobian = jnp.where(t == 0, 0, jacobian / jnp.where(t == 0, 1, t))
    return jacobian.astype(x.dtype)


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
    z = wide(_checks.real_array("logits", logits))
    z, mask, rows = _prepared(z, axis, where, None, None)
    return jnp.squeeze(_entropy(z, mask, rows), rows.axes)


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
    z = _checks.real_array("logits", logits)
    t = _checks.real_array("target_logits", target_logits)
    _checks.has_shape("target_logits", t, z.shape, "(shape of logits)")
    dtype = compute_dtype(z.dtype, t.dtype)
    z, mask, rows = _prepared(z.astype(dtype), axis, where, None, None)
    return jnp.squeeze(_kl_divergence(z, t.astype(dtype), mask, rows), rows.axes)


def _prepared(
    x: Array,
    axis: Axis,
    where: ArrayLike | None,
    temperature: ArrayLike | None,
    axis_name: AxisName,
) -> tuple[Array, Array | None, Rows]:
    """Checked arguments: the logits divided by the temperature, the mask, and what a row spans."""
    mask, rows = _mask_and_rows(x, axis, where, axis_name)
    if temperature is not None:
        t = _checks.temperature(temperature, x.shape, rows.axes)
        x = _tempered(x, t, mask, rows)
    return x, mask, rows


def _mask_and_rows(
    x: Array, axis: Axis, where: ArrayLike | None, axis_name: AxisName
) -> tuple[Array | None, Rows]:
    rows = Rows(_checks.axis_indices(axis, x.ndim), _checks.axis_names(axis_name))
    return _checks.mask_array("where", where, x.shape), rows


# Called outside jit, each is one compiled program, as in jax.nn.
_softmax = jax.jit(_stable.softmax, static_argnums=(2, 3))
_log_softmax = jax.jit(_stable.log_softmax, static_argnums=(2,))
_logsumexp = jax.jit(_stable.logsumexp, static_argnums=(2,))
_weighted_logsumexp = jax.jit(_weighted.weighted_logsumexp, static_argnums=(3,))
_tempered = jax.jit(_stable.tempered, static_argnums=(3,))
_entropy = jax.jit(_divergence.entropy, static_argnums=(2,))
_kl_divergence = jax.jit(_divergence.kl_divergence, static_argnums=(3,))
