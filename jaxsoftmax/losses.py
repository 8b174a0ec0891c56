"""Classification losses on logits, one value per example.

Shapes: `logits` is (..., classes) with the classes on `axis`; `labels` is (...) for integer
classes, or has the shape of `logits` for probabilities. Losses are in nats, never below float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _checks, functional
from jaxsoftmax.functional import compute_dtype, log_softmax


def cross_entropy(
    logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    *,
    axis: int = -1,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Cross-entropy of labels under the softmax of logits.

    .. math:: \ell(z, y) = -\sum_k y_k \log\sigma(z)_k, \qquad \ell(z, c) = -\log\sigma(z)_c

    with probabilities y or a class c as `labels`.

    Args:
      logits: (..., classes), real, the classes on `axis`.
      labels: integer classes in [0, classes), of the shape of `logits` less `axis`; or
        probabilities, floating, of the shape of `logits`.
      axis: the axis of the classes.
      where: classes that are allowed, boolean, broadcasting to the shape of `logits`; None for all.

    Returns:
      Loss per example in nats, with the shape of `logits` less `axis`, in float32 or in float64 if
      an argument has it. It is +inf where a label stands on a masked class or on one with logit
      -inf, and NaN, with NaN gradient, where an integer label is out of range. A probability of 0
      contributes 0 everywhere.

    Raises:
      TypeError: `logits` or `labels` is not real, `labels` is boolean, `where` is not boolean, or
        `axis` is not an integer.
      ValueError: `axis` is out of range, the shape of `labels` does not fit, or `where` does not
        broadcast to the shape of `logits`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import cross_entropy
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
      >>> cross_entropy(logits, jnp.array([0, 2]))
      Array([0.6931472, 1.3862944], dtype=float32)
      >>> cross_entropy(logits, jnp.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
      Array([1.0397208, 1.3862944], dtype=float32)

    Reference:
      Bishop (2006), Pattern Recognition and Machine Learning, eq. 4.108.
    """
    logits, labels = _checks.real_array("logits", logits), _checks.label_array(labels)
    axis = _checks.axis_index(axis, logits.ndim)
    batch = logits.shape[:axis] + logits.shape[axis + 1 :]
    if _checks.class_labels(labels, batch, "(batch axes of logits)"):
        mask = _checks.mask_array("where", where, logits.shape)
        return _compiled_integer_cross_entropy(logits, labels, mask, axis)
    _checks.has_shape("labels", labels, logits.shape, "(shape of logits)")
    dtype = compute_dtype(logits.dtype, labels.dtype)
    log_p = log_softmax(logits.astype(dtype), axis, where)
    return _probability_cross_entropy(log_p, labels.astype(dtype), axis)


def _terms(
    logits: Array, labels: Array, where: Array | None, axis: int
) -> tuple[Array, Array, Array, Array]:
    """With c the label and m the largest logit: exp(z_k - m) without c, its sum, z_c - m, c.

    The label's own term is kept apart from the rest of the sum. So the tiny loss of a confident
    label, and the tiny p_c - 1 of its gradient, keep their digits.
    """
    index, valid = _index(labels, logits.shape, axis)
    shifted, m = functional._shifted(logits, None, where, (axis,))
    own = jnp.take_along_axis(logits, index, axis).astype(m.dtype)
    finite = own != jnp.inf
    own = jnp.minimum(own, m) - m  # as in _shifted
    if where is not None:
        allowed = jnp.take_along_axis(jnp.broadcast_to(where, logits.shape), index, axis)
        own, finite = jnp.where(allowed, own, -jnp.inf), finite | ~allowed
    e = _put(jnp.exp(shifted), index, 0, axis)
    others = jnp.sum(e, axis, keepdims=True)
    # NaN for a label out of range, and for a row with +inf as in softmax.
    return e, jnp.where(valid & finite & ~jnp.isinf(others), others, jnp.nan), own, index


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _integer_cross_entropy(logits: Array, labels: Array, where: Array | None, axis: int) -> Array:
    """log sum_k exp(z_k - m) - (z_c - m)."""
    _, others, own, _ = _terms(logits, labels, where, axis)
    loss = jnp.log1p(others + jnp.expm1(own)) - own
    impossible = (own == -jnp.inf) & ~jnp.isnan(others)
    return jnp.squeeze(jnp.where(impossible, jnp.inf, loss), axis)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _residuals(logits: Array, labels: Array, where: Array | None, axis: int) -> Array:
    """p - e_c, the gradient of the loss; p_c - 1 is minus the sum of the other probabilities."""
    e, others, own, index = _terms(logits, labels, where, axis)
    total = others + jnp.exp(own)
    total = jnp.where(total == 0, 1, total)
    return _put(e / total, index, -others / total, axis).astype(logits.dtype)


@_integer_cross_entropy.defjvp
def _integer_cross_entropy_jvp(axis: int, primals: Any, tangents: Any) -> Any:
    """d l = sum_k (p - e_c)_k dz_k."""
    (logits, labels, where), (dlogits, _, _) = primals, tangents

    @functional._linear_map
    def linear(g: Array, where: Array | None, dlogits: Array) -> Array:
        return jnp.sum(functional._wide(g, where) * functional._wide(dlogits, where), axis)

    dloss = linear(_residuals(logits, labels, where, axis), where, dlogits)
    return _integer_cross_entropy(logits, labels, where, axis), dloss


@_residuals.defjvp
def _residuals_jvp(axis: int, primals: Any, tangents: Any) -> Any:
    """d (p - e_c) = d p."""
    (logits, labels, where), (dlogits, _, _) = primals, tangents
    _, dp = jax.jvp(
        lambda z: functional._softmax(z, None, where, (axis,), True), (logits,), (dlogits,)
    )
    return _residuals(logits, labels, where, axis), dp


def _index(labels: Array, shape: tuple[int, ...], axis: int) -> tuple[Array, Array]:
    """The labels as indices along `axis`, 0 if out of range, and whether they are in range."""
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    labels = jnp.expand_dims(labels, axis)
    valid = (labels >= 0) & (labels < shape[axis])
    return jnp.where(valid, labels.astype(jnp.int32), 0), valid


def _put(values: Array, index: Array, new: ArrayLike, axis: int) -> Array:
    return jnp.put_along_axis(values, index, new, axis, inplace=False)


def _probability_cross_entropy(log_p: Array, labels: Array, axis: int) -> Array:
    # 0 * -inf counts as 0; a finite log_p stays, so that the gradient with respect to the label is
    # right.
    impossible = (labels == 0) & (log_p == -jnp.inf)
    return jnp.sum(labels * jnp.where(impossible, 0, -log_p), axis)


_compiled_integer_cross_entropy = jax.jit(_integer_cross_entropy, static_argnums=(3,))
