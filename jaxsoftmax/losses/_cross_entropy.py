"""Classification losses on logits, one value per example.

Shapes: `logits` is (..., classes) with the classes on `axis`; `labels` is (...) for integer
classes, or has the shape of `logits` for probabilities. Losses are in nats, never below float32.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _arrays, _checks
from jaxsoftmax._checks import AxisName
from jaxsoftmax.functional._logsumexp import row_logsumexp
from jaxsoftmax.functional._reductions import Rows, check_rows
from jaxsoftmax.functional._softmax import (
    linear_map,
    row_log_softmax,
    row_softmax,
    softmax_from_residual,
    softmax_residual,
)
from jaxsoftmax.functional._stable import (
    centre,
    compute_dtype,
    exponentials,
    fill_empty_rows,
    fill_masked,
    nan_unless,
    shift_rows,
    subtract_max,
    upcast,
)
from jaxsoftmax.losses import _labels


def cross_entropy(
    logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    *,
    axis: int | Sequence[int] = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    label_smoothing: Shaped[ArrayLike, ""] = 0.0,
    class_weight: Shaped[ArrayLike, " classes"] | None = None,
    z_loss: Shaped[ArrayLike, ""] = 0.0,
    ignore_label: int | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    r"""Cross-entropy of labels under the softmax of logits.

    .. math:: \ell(z, y) = -\sum_k w_k y'_k \log\sigma(z)_k
              + \zeta \Bigl(\log\sum_k \exp(z_k)\Bigr)^2, \qquad
              y'_k = (1 - \varepsilon) y_k + \frac{\varepsilon}{n}

    with probabilities y as `labels`, or a class c, which means y = 1 at c and 0 elsewhere but needs
    no array of that size. w is `class_weight`, :math:`\zeta` is `z_loss`,
    :math:`\varepsilon` is `label_smoothing`, which goes in equal shares to the n allowed classes.

    Args:
      logits: (..., classes), real, the classes on `axis`.
      labels: integer classes in [0, classes), of the shape of `logits` less `axis`; or
        probabilities, floating, of the shape of `logits`, which need not sum to 1.
      axis: the axis of the classes, or several that are taken as one, numbered in the order given.
      where: classes that are allowed, boolean, broadcasting to the shape of `logits`; None for all.
      label_smoothing: the share of each label that goes to the allowed classes of its row, a number
        in [0, 1]. Exclude classes that only pad by `where`: at a logit of -inf their share
        makes the loss +inf.
      class_weight: (classes,), real; None for 1. The weighted losses are not normalised.
      z_loss: the factor of the squared log-sum-exp, a number of at least 0.
      ignore_label: the integer label of examples that do not count: their loss and all its
        derivatives are 0, whatever their logits. For a mean divide the sum by the number of the
        others.
      axis_name: the mesh axis or axes over which the classes, on a single `axis`, are sharded
        inside `jax.shard_map`. Integer labels then count over all shards, and each shard has them
        all; `class_weight` and probabilities are sharded as `logits` are.

    Returns:
      Loss per example in nats, with the shape of `logits` less `axis`, in float32 or in float64 if
      `logits` or probabilities have it. It is +inf where a label names a masked class or one with
      logit -inf, and NaN, with NaN derivatives, where an integer label is out of range, where
      there are allowed classes and all their logits are -inf, or where `label_smoothing` or
      `z_loss` is traced and out of range. A probability or a weight of 0 contributes 0 everywhere.

    Raises:
      TypeError: an array argument is not real, `labels` is boolean, or of an integer dtype where
        its shape says probabilities or the other way round, `where` is not boolean, `axis` or
        `ignore_label` is not an integer, or `axis_name` not a string.
      ValueError: `axis` is out of range, the shape of `labels` or `class_weight` does not fit,
        `where` does not broadcast to the shape of `logits`, `label_smoothing` is not in [0, 1],
        `z_loss` is negative, or `ignore_label` is given with probabilities.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import cross_entropy
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
      >>> cross_entropy(logits, jnp.array([0, 2]))
      Array([0.6931472, 1.3862944], dtype=float32)
      >>> cross_entropy(logits, jnp.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
      Array([1.0397208, 1.3862944], dtype=float32)
      >>> cross_entropy(logits, jnp.array([0, -100]), ignore_label=-100, label_smoothing=0.3)
      Array([0.8317766, 0.       ], dtype=float32)

    References:
      Bishop (2006), Pattern Recognition and Machine Learning, eq. 4.108. Szegedy et al. (2016),
      Rethinking the Inception architecture for computer vision, section 7 (label smoothing).
      Chowdhery et al. (2022), PaLM, section 5 (z-loss).
    """
    logits = _arrays.real_array("logits", logits)
    if ignore_label is not None:
        ignore_label = _checks.integer("ignore_label", ignore_label)
    labels = _arrays.label_array(labels, ignore_label)
    if isinstance(axis, Sequence):
        if not axis or axis_name is not None:
            expected = "name an axis" if axis_name is None else "be a single one with axis_name"
            raise ValueError(f"axis must {expected}, got {axis!r}")
        logits, labels, where, axis = _flatten_classes(logits, labels, where, axis)
    axis = _checks.axis_index(axis, logits.ndim)
    mask, rows = check_rows(logits, axis, where, axis_name)
    batch = logits.shape[:axis] + logits.shape[axis + 1 :]
    if not _checks.class_labels(labels, batch, "(batch axes of logits)"):
        _checks.has_shape("labels", labels, logits.shape, "(shape of logits)")
        if ignore_label is not None:
            raise ValueError("ignore_label needs integer labels, got probabilities")
    options = _labels.check_options(label_smoothing, class_weight, z_loss, logits.shape[axis])
    return _cross_entropy(logits, labels, mask, options, ignore_label, rows)


def _flatten_classes(
    logits: Array, labels: Array, where: ArrayLike | None, axes: Sequence[int]
) -> tuple[Array, Array, Array | None, int]:
    """Make several axes of classes one at the end, in the order given, in all arrays."""
    _checks.axis_indices(axes, logits.ndim)
    order = [axis % logits.ndim for axis in axes]
    ends, count = range(-len(order), 0), math.prod(logits.shape[axis] for axis in order)

    def flatten(values: Array) -> Array:
        moved = jnp.moveaxis(values, order, ends)
        return moved.reshape(*moved.shape[: moved.ndim - len(order)], count)

    mask = _checks.mask_array("where", where, logits.shape)
    if mask is not None:
        mask = flatten(jnp.broadcast_to(mask, logits.shape))
    if jnp.issubdtype(labels.dtype, jnp.floating):
        labels = flatten(_checks.has_shape("labels", labels, logits.shape, "(shape of logits)"))
    return flatten(logits), labels, mask, -1


@partial(jax.jit, static_argnums=(4, 5))
def _cross_entropy(
    logits: Array,
    labels: Array,
    where: Array | None,
    options: _labels.Options,
    ignore_label: int | None,
    rows: Rows,
) -> Array:
    """Evaluate the formula above on checked arrays."""
    (axis,) = rows.axes
    probabilities = jnp.issubdtype(labels.dtype, jnp.floating)
    dtype = compute_dtype(logits.dtype, *([labels.dtype] if probabilities else []))
    if dtype != compute_dtype(logits.dtype):
        logits = logits.astype(dtype)
    counted = None
    if not probabilities:
        labels, counted = _labels.find_counted(labels, ignore_label)
    if counted is not None:
        counted = jnp.expand_dims(counted, axis)
        where = counted if where is None else where & counted

    smoothing: Any = None  # the share of the label that moves
    uniform: Any = None  # the share of each class
    if options.label_smoothing is not None:
        smoothing = _labels.smoothing_share(options.label_smoothing, dtype)
        n: Any = _labels.count_classes(logits.shape[axis], rows)
        if where is not None:
            n = rows.sum(jnp.broadcast_to(where, logits.shape).astype(dtype))
        uniform = fill_masked(where, smoothing / jnp.maximum(n, 1))

    def expect(coefficients: Array) -> Array:
        if options.class_weight is not None:
            weights = options.class_weight.astype(dtype).reshape(_along(axis, logits.ndim))
            if where is not None:
                # A masked class counts only if a label names it, whatever its weight but 0.
                weights = jnp.where(where, weights, (weights != 0).astype(dtype))
            coefficients = _labels.scale(coefficients, weights)
        return _expectation(coefficients, logits, where, rows)

    label_coefficient = smoothing_loss = None
    if probabilities:
        y = labels.astype(dtype)
        label_loss = expect(y if uniform is None else (1 - smoothing) * y + uniform)
    else:
        label_loss = _integer_cross_entropy(logits, labels, where, rows)
        if counted is not None:
            label_loss = jnp.where(counted, label_loss, 0)
        label = _labels.locate(labels, logits.shape, rows)
        label_coefficient = _labels.label_coefficient(options, label, counted, rows, dtype)
        smoothing_loss = None if uniform is None else expect(uniform)
    log_z = None if options.z_loss is None else row_logsumexp(logits, where, rows)
    loss = _labels.total_loss(options, label_loss, label_coefficient, smoothing_loss, log_z)
    return jnp.squeeze(loss, axis)


def _along(axis: int, ndim: int) -> list[int]:
    """The shape that lays a vector along an axis."""
    return [1] * axis + [-1] + [1] * (ndim - axis - 1)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _expectation(coefficients: Array, logits: Array, where: Array | None, rows: Rows) -> Array:
    """sum_k a_k (-log p_k) with coefficients a."""
    return rows.sum(_labels.scale(coefficients, -row_log_softmax(logits, where, rows)))


@partial(_expectation.defjvp, symbolic_zeros=True)
def _expectation_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d l = sum_k (-log p_k) da_k - a_k (dz_k - sum_j p_j dz_j)."""
    (a, logits, where), (da, dlogits, _) = primals, tangents
    parts = []
    if not isinstance(da, SymbolicZero):
        log_p = row_log_softmax(logits, where, rows)
        parts.append(rows.sum(jnp.where((a != 0) | (log_p > -jnp.inf), -log_p, 0) * da))
    if not isinstance(dlogits, SymbolicZero):

        @linear_map
        def linear(p: Array, a: Array, where: Array | None, dlogits: Array) -> Array:
            p = softmax_from_residual(p, where, rows, "log_softmax")
            dlog_p = centre(fill_masked(where, upcast(dlogits)), p, rows)
            return -rows.sum(a * fill_masked(where, dlog_p))

        p = softmax_residual(logits, where, rows, "log_softmax")
        parts.append(linear(p, a, where, dlogits))
    return _expectation(a, logits, where, rows), sum(parts)


class _ShiftedLogits(NamedTuple):
    """Logits z of a row less their maximum m, and the label c among them."""

    d: Array  # z_k - m
    is_label: Array  # whether k = c
    d_label: Array  # z_c - m
    label: _labels.Label


def _shift_logits(logits: Array, labels: Array, where: Array | None, rows: Rows) -> _ShiftedLogits:
    """Subtract the maximum of each row and find the label."""
    (axis,) = rows.axes
    label = _labels.locate(labels, logits.shape, rows)
    d, m = shift_rows(logits, where, rows)
    # By a comparison: unlike a scatter it is elementwise under every sharding.
    classes = jnp.arange(logits.shape[axis], dtype=jnp.int32).reshape(_along(axis, logits.ndim))
    is_label = classes == jnp.where(label.here, label.position, -1)
    if rows.is_short(logits):
        (d_label,) = rows.sums(jnp.where(is_label, d, 0))
        return _ShiftedLogits(d, is_label, d_label, label)
    d_label = subtract_max(upcast(jnp.take_along_axis(logits, label.position, axis)), m)
    if where is not None:
        allowed = jnp.take_along_axis(jnp.broadcast_to(where, logits.shape), label.position, axis)
        d_label = jnp.where(allowed, d_label, -jnp.inf)
    return _ShiftedLogits(d, is_label, _labels.fetch(d_label, label, rows), label)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _integer_cross_entropy(logits: Array, labels: Array, where: Array | None, rows: Rows) -> Array:
    """log sum_k exp(z_k - m) - (z_c - m), of which one is 0, or neither is small."""
    d, _, d_label, label = _shift_logits(logits, labels, where, rows)
    log_total = exponentials(d, rows).log_total
    loss = fill_empty_rows(log_total, 0.0, where, rows) - d_label
    return nan_unless(label.valid, loss)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def loss_and_residuals(
    logits: Array, labels: Array, where: Array | None, rows: Rows
) -> tuple[Array, Array]:
    """The loss of integer labels and its gradient p - e_c.

    The label's term is not part of the sum over the others, of which p_c - 1 is the negative share.
    So it keeps its digits for a confident label, as the loss does.
    """
    d, is_label, d_label, label = _shift_logits(logits, labels, where, rows)
    e = jnp.exp(d)
    rest = jnp.where(is_label, 0, e)
    (others,) = rows.sums(rest, reused=True)
    if not rows.in_loop(e, sums=1, reused=True):
        e = rest  # is written out anyway
    loss = fill_empty_rows(_labels.log_total(others, d_label), 0.0, where, rows) - d_label
    total = fill_empty_rows(others + jnp.exp(d_label), 1.0, where, rows)
    total = nan_unless(label.valid, total)
    residuals = jnp.where(is_label, -others / total, e / total)
    return nan_unless(label.valid, loss), residuals.astype(logits.dtype)


@_integer_cross_entropy.defjvp
def _integer_cross_entropy_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d l = sum_k (p - e_c)_k dz_k."""
    (logits, labels, where), (dlogits, _, _) = primals, tangents
    loss, residuals = loss_and_residuals(logits, labels, where, rows)
    recomputed = logits.dtype == jnp.float16  # as in `softmax_residual`

    @linear_map
    def linear(r: Array, labels: Any, where: Array | None, dlogits: Array) -> Array:
        if recomputed:
            _, r = loss_and_residuals(upcast(r), labels, where, rows)
        return rows.sum(upcast(r) * fill_masked(where, upcast(dlogits)))

    saved = (logits, labels) if recomputed else (residuals, None)
    return loss, linear(*saved, where, dlogits)


@loss_and_residuals.defjvp
def _loss_and_residuals_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d (p - e_c) = dp."""
    (logits, labels, where), (dlogits, _, _) = primals, tangents

    def loss_and_softmax(z: Array) -> tuple[Array, Array]:
        return _integer_cross_entropy(z, labels, where, rows), row_softmax(z, where, rows)

    _, (dloss, dp) = jax.jvp(loss_and_softmax, (logits,), (dlogits,))
    label = _labels.locate(labels, logits.shape, rows)
    valid = nan_unless(label.valid, jnp.ones((), dp.dtype))
    return loss_and_residuals(logits, labels, where, rows), (dloss, valid * dp)
