"""Classification losses on logits, one value per example.

Shapes: `logits` is (..., classes) with the classes on `axis`; `labels` is (...) for integer
  classes, or has the
shape of `logits` for probabilities. Losses are in nats and never below float32.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _checks
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
    logits, labels = _checks.real_array("logits", logits), _checks.array("labels", labels)
    axis = _checks.axis_index(axis, logits.ndim)
    batch = logits.shape[:axis] + logits.shape[axis + 1 :]
    if _checks.class_labels(labels, batch, "(batch axes of logits)"):
        log_p = log_softmax(logits.astype(compute_dtype(logits.dtype)), axis, where)
        return _integer_cross_entropy(log_p, labels, axis)
    _checks.has_shape("labels", labels, logits.shape, "(shape of logits)")
    dtype = compute_dtype(logits.dtype, labels.dtype)
    log_p = log_softmax(logits.astype(dtype), axis, where)
    return _probability_cross_entropy(log_p, labels.astype(dtype), axis)


def _integer_cross_entropy(log_p: Array, labels: Array, axis: int) -> Array:
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < log_p.shape[axis])
    # A comparison rather than a gather: its transpose is a select where the gather's is a scatter.
    classes = lax.broadcasted_iota(jnp.int32, log_p.shape, axis)
    chosen = classes == jnp.expand_dims(labels.astype(jnp.int32), axis)
    # An invalid label chooses all classes, so that NaN reaches the whole row of the gradient.
    chosen |= ~jnp.expand_dims(valid, axis)
    loss = jnp.sum(jnp.where(chosen, -log_p, 0), axis)
    return loss * jnp.where(valid, 1, jnp.nan).astype(loss.dtype)


def _probability_cross_entropy(log_p: Array, labels: Array, axis: int) -> Array:
    # 0 * -inf counts as 0; a finite log_p stays, so that the gradient with respect to the label is
    # right.
    impossible = (labels == 0) & (log_p == -jnp.inf)
    return jnp.sum(labels * jnp.where(impossible, 0, -log_p), axis)
