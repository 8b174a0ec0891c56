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
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _checks
from jaxsoftmax._checks import AxisName
from jaxsoftmax.functional import _stable
from jaxsoftmax.functional._reductions import Rows
from jaxsoftmax.functional._stable import compute_dtype, keep, wide
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

    with probabilities y as `labels`, or a class c, which stands for y = 1 at c and 0 elsewhere, but
    costs no array of that size. w is `class_weight`, :math:`\zeta` is `z_loss`,
    :math:`\varepsilon` is `label_smoothing`, which goes in equal shares to the n allowed classes.

    Args:
      logits: (..., classes), real, the classes on `axis`.
      labels: integer classes in [0, classes), of the shape of `logits` less `axis`; or
        probabilities, floating, of the shape of `logits`, which need not sum to 1.
      axis: the axis of the classes, or several that are taken as one, numbered in the order given.
      where: classes that are allowed, boolean, broadcasting to the shape of `logits`; None for all.
      label_smoothing: the share of each label that is spread over the allowed classes of its row, a
        number in [0, 1]. Exclude classes that only pad by `where`: at a logit of -inf their share
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
      `logits` or probabilities have it. It is +inf where a label stands on a masked class or on one
      with logit -inf, and NaN, with NaN derivatives, where an integer label is out of range, where
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
    logits = _checks.real_array("logits", logits)
    if ignore_label is not None:
        ignore_label = _checks.integer("ignore_label", ignore_label)
    labels = _checks.label_array(labels, ignore_label)
    if isinstance(axis, Sequence):
        if not axis or axis_name is not None:
            expected = "name an axis" if axis_name is None else "be a single one with axis_name"
            raise ValueError(f"axis must {expected}, got {axis!r}")
        logits, labels, where, axis = _flattened(logits, labels, where, axis)
    axis = _checks.axis_index(axis, logits.ndim)
    rows = Rows((axis,), _checks.axis_names(axis_name))
    mask = _checks.mask_array("where", where, logits.shape)
    batch = logits.shape[:axis] + logits.shape[axis + 1 :]
    if not _checks.class_labels(labels, batch, "(batch axes of logits)"):
        _checks.has_shape("labels", labels, logits.shape, "(shape of logits)")
        if ignore_label is not None:
            raise ValueError("ignore_label needs integer labels, got probabilities")
    if class_weight is not None:
        weight = _checks.real_array("class_weight", class_weight)
        class_weight = _checks.has_shape(
            "class_weight", weight, logits.shape[axis : axis + 1], "(classes,)"
        )
    smoothing = _checks.scalar("label_smoothing", label_smoothing, most=1.0)
    z = _checks.scalar("z_loss", z_loss)
    return _cross_entropy(
        logits,
        labels,
        mask,
        None if _labels.is_zero(label_smoothing) else smoothing,
        class_weight,
        None if _labels.is_zero(z_loss) else z,
        ignore_label,
        rows,
    )


def _flattened(
    logits: Array, labels: Array, where: ArrayLike | None, axes: Sequence[int]
) -> tuple[Array, Array, Array | None, int]:
    """Several axes of classes as one at the end, in the order given, in all arrays that have it."""
    _checks.axis_indices(axes, logits.ndim)
    order = [axis % logits.ndim for axis in axes]
    ends, count = range(-len(order), 0), math.prod(logits.shape[axis] for axis in order)

    def flat(values: Array) -> Array:
        moved = jnp.moveaxis(values, order, ends)
        return moved.reshape(*moved.shape[: moved.ndim - len(order)], count)

    mask = _checks.mask_array("where", where, logits.shape)
    if mask is not None:
        mask = flat(jnp.broadcast_to(mask, logits.shape))
    if jnp.issubdtype(labels.dtype, jnp.floating):
        labels = flat(_checks.has_shape("labels", labels, logits.shape, "(shape of logits)"))
    return flat(logits), labels, mask, -1


@partial(jax.jit, static_argnums=(6, 7))
def _cross_entropy(
    logits: Array,
    labels: Array,
    where: Array | None,
    smoothing: Array | None,
    class_weight: Array | None,
    z_loss: Array | None,
    ignore_label: int | None,
    rows: Rows,
) -> Array:
    """The loss of the formula above, on checked arrays."""
    (axis,), axis_name = rows
    probabilities = jnp.issubdtype(labels.dtype, jnp.floating)
    dtype = compute_dtype(logits.dtype, *([labels.dtype] if probabilities else []))
    if dtype != compute_dtype(logits.dtype):
        logits = logits.astype(dtype)
    ignored = None
    if ignore_label is not None and _labels.holds(labels.dtype, ignore_label):
        ignored = labels == ignore_label
        labels = jnp.where(ignored, 0, labels)
        counted = jnp.expand_dims(~ignored, axis)
        where = counted if where is None else where & counted

    def weighted(shares: Any) -> Any:
        """Shares of the classes times their weights; masked ones and those without a share count
        for nothing, whatever their weight."""
        if class_weight is None:
            return shares
        shape = [1] * axis + [-1] + [1] * (logits.ndim - axis - 1)
        return _labels.product(shares, keep(where, class_weight.astype(dtype).reshape(shape)))

    share: Any = 1.0  # of the label, and of each allowed class
    spread: Any = 0.0
    if smoothing is not None:
        smoothing = _labels.share_to_spread(smoothing, dtype)
        n: Any = logits.shape[axis] * (lax.axis_size(axis_name) if axis_name else 1)
        if where is not None:
            n = rows.sum(jnp.broadcast_to(where, logits.shape).astype(dtype))
        share, spread = 1 - smoothing, keep(where, smoothing / jnp.maximum(n, 1))

    if probabilities:
        shares = weighted(share * labels.astype(dtype) + spread)
        loss = _expectation(shares, logits, where, rows)
    else:
        loss = _integer_cross_entropy(logits, labels, where, rows)
        if ignored is not None:
            loss = jnp.where(jnp.expand_dims(ignored, axis), 0, loss)
        if class_weight is not None and logits.shape[axis]:
            label = _labels.locate(labels, logits.shape, rows)
            own_weight = _labels.own_weight(class_weight.astype(dtype), label, rows)
            if ignored is not None:
                own_weight = jnp.where(jnp.expand_dims(ignored, axis), 0, own_weight)
            share = _labels.product(share, own_weight)
        if class_weight is not None or smoothing is not None:
            loss = _labels.product(share, loss)
        if smoothing is not None:
            loss = loss + _expectation(weighted(spread), logits, where, rows)
    if z_loss is not None:
        loss = loss + _labels.z_penalty(_stable.logsumexp(logits, where, rows), z_loss)
    return jnp.squeeze(loss, axis)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _expectation(shares: Array, logits: Array, where: Array | None, rows: Rows) -> Array:
    """sum_k shares_k (-log p_k)."""
    return rows.sum(_labels.product(shares, -_stable.log_softmax(logits, where, rows)))


@partial(_expectation.defjvp, symbolic_zeros=True)
def _expectation_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d l = sum_k (-log p_k) dshares_k - shares_k (dz_k - sum_j p_j dz_j)."""
    (shares, logits, where), (dshares, dlogits, _) = primals, tangents
    parts = []
    if not isinstance(dshares, SymbolicZero):
        log_p = _stable.log_softmax(logits, where, rows)
        counted = (shares != 0) | (log_p > -jnp.inf)
        parts.append(rows.sum(jnp.where(counted, -log_p, 0) * dshares))
    if not isinstance(dlogits, SymbolicZero):

        @_stable.linear_map
        def linear(p: Array, shares: Array, where: Array | None, dlogits: Array) -> Array:
            p = _stable.restored(p, where, rows, "log_softmax")
            dlog = _stable.centred(keep(where, wide(dlogits)), p, rows)
            return -rows.sum(shares * keep(where, dlog))

        p = _stable.saved(logits, where, rows, "log_softmax")
        parts.append(linear(p, shares, where, dlogits))
    return _expectation(shares, logits, where, rows), sum(parts)


class _Terms(NamedTuple):
    """Of a row with the label c and the largest logit m: z_k - m, which entry is c, z_c - m, c."""

    d: Array
    is_label: Array
    own: Array
    label: _labels.Label


def _terms(logits: Array, labels: Array, where: Array | None, rows: Rows) -> _Terms:
    (axis,) = rows.axes
    label = _labels.locate(labels, logits.shape, rows)
    d, m = _stable.shifted(logits, where, rows)
    # By a comparison: unlike a scatter it is elementwise under every sharding.
    sizes = [1] * axis + [-1] + [1] * (logits.ndim - axis - 1)
    classes = jnp.arange(logits.shape[axis], dtype=jnp.int32).reshape(sizes)
    is_label = classes == jnp.where(label.here, label.position, -1)
    if rows.is_short(logits):
        (own,) = rows.sums(jnp.where(is_label, d, 0))
        return _Terms(d, is_label, own, label)
    own = jnp.minimum(wide(jnp.take_along_axis(logits, label.position, axis)), m) - m
    if where is not None:
        allowed = jnp.take_along_axis(jnp.broadcast_to(where, logits.shape), label.position, axis)
        own = jnp.where(allowed, own, -jnp.inf)
    return _Terms(d, is_label, _labels.from_owner(own, label, rows), label)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _integer_cross_entropy(logits: Array, labels: Array, where: Array | None, rows: Rows) -> Array:
    """log sum_k exp(z_k - m) - (z_c - m). Of the two parts one is 0, or neither is small."""
    d, _, own, label = _terms(logits, labels, where, rows)
    log_total = _stable.exponentials(d, rows).log_total
    loss = _stable.or_empty(log_total, 0.0, where, rows) - own
    return _stable.only_if(label.valid, loss)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def loss_and_residuals(
    logits: Array, labels: Array, where: Array | None, rows: Rows
) -> tuple[Array, Array]:
    """The same loss, and p - e_c, its gradient, for its rule.

    The label's own term is kept apart from the rest of the sum, of which p_c - 1 is the negative
    share. So it keeps its digits for a confident label, as the loss does.
    """
    d, is_label, own, label = _terms(logits, labels, where, rows)
    e = jnp.exp(d)
    rest = jnp.where(is_label, 0, e)
    (others,) = rows.sums(rest, reused=True)
    if not rows.in_loop(e, sums=1, reused=True):
        e = rest  # is written out anyway
    loss = _stable.or_empty(_labels.log_total(others, own), 0.0, where, rows) - own
    total = _stable.or_empty(others + jnp.exp(own), 1.0, where, rows)
    total = _stable.only_if(label.valid, total)
    residuals = jnp.where(is_label, -others / total, e / total)
    return _stable.only_if(label.valid, loss), residuals.astype(logits.dtype)


@_integer_cross_entropy.defjvp
def _integer_cross_entropy_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d l = sum_k (p - e_c)_k dz_k."""
    (logits, labels, where), (dlogits, _, _) = primals, tangents
    loss, residuals = loss_and_residuals(logits, labels, where, rows)
    recomputed = logits.dtype == jnp.float16  # as in _stable.saved

    @_stable.linear_map
    def linear(r: Array, labels: Any, where: Array | None, dlogits: Array) -> Array:
        if recomputed:
            _, r = loss_and_residuals(wide(r), labels, where, rows)
        return rows.sum(wide(r) * keep(where, wide(dlogits)))

    kept = (logits, labels) if recomputed else (residuals, None)
    return loss, linear(*kept, where, dlogits)


@loss_and_residuals.defjvp
def _loss_and_residuals_jvp(rows: Rows, primals: Any, tangents: Any) -> Any:
    """d (p - e_c) = d p."""
    (logits, labels, where), (dlogits, _, _) = primals, tangents

    def loss_and_softmax(z: Array) -> tuple[Array, Array]:
        return _integer_cross_entropy(z, labels, where, rows), _stable.softmax(z, where, rows)

    _, (dloss, dp) = jax.jvp(loss_and_softmax, (logits,), (dlogits,))
    label = _labels.locate(labels, logits.shape, rows)
    valid = _stable.only_if(label.valid, jnp.ones((), dp.dtype))
    return loss_and_residuals(logits, labels, where, rows), (dloss, valid * dp)
