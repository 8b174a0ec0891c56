"""Integer labels among classes that may be sharded, and the options that all losses share.

With a label c, class weights w, label smoothing s over n classes and a z-loss factor zeta a loss is

    (1 - s) w_c (L - z_c) + s / n sum_k w_k (L - z_k) + zeta L^2

with the log-sum-exp L of the logits z. The losses compute L - z_c, the sum and L, each in its own
way; what they make of them is here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax import _arrays, _checks
from jaxsoftmax.functional._reductions import Rows
from jaxsoftmax.functional._stable import nan_unless


class Options(NamedTuple):
    """Options of a loss as checked arrays, None for one that is left out of the program."""

    label_smoothing: Array | None
    class_weight: Array | None
    z_loss: Array | None


def check_options(
    label_smoothing: ArrayLike, class_weight: ArrayLike | None, z_loss: ArrayLike, classes: int
) -> Options:
    """Check the options of a loss over `classes` classes; the Python number 0 leaves a term out."""
    if class_weight is not None:
        weight = _arrays.real_array("class_weight", class_weight)
        class_weight = _checks.has_shape("class_weight", weight, (classes,), "(classes,)")
    smoothing = _checks.scalar("label_smoothing", label_smoothing, most=1.0)
    factor = _checks.scalar("z_loss", z_loss)
    return Options(
        None if _is_zero(label_smoothing) else smoothing,
        class_weight,
        None if _is_zero(z_loss) else factor,
    )


def _is_zero(value: ArrayLike) -> bool:
    return isinstance(value, (int, float)) and value == 0


def find_counted(labels: Array, ignore_label: int | None) -> tuple[Array, Array | None]:
    """Labels, with class 0 for the ignored ones, and which are counted, None for all."""
    if ignore_label is None:
        return labels, None
    info = jnp.iinfo(labels.dtype)
    if not info.min <= ignore_label <= info.max:
        return labels, None
    counted = labels != ignore_label
    return jnp.where(counted, labels, 0), counted


class Label(NamedTuple):
    """Positions of integer labels in this shard, whether they are here, and whether in any shard.

    The axis of the classes has size 1.
    """

    position: Array
    here: Array
    valid: Array


def locate(labels: Array, shape: tuple[int, ...], rows: Rows) -> Label:
    """Find labels among the classes of logits of this shape."""
    (axis,) = rows.axes
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    labels, count = jnp.expand_dims(labels, axis), shape[axis]
    valid = (labels >= 0) & (labels < count_classes(count, rows))
    position = jnp.where(valid, labels.astype(jnp.int32), 0)
    if rows.axis_name is None:
        return Label(position, valid, valid)
    position = position - count * lax.axis_index(rows.axis_name)
    here = valid & (position >= 0) & (position < count)
    return Label(jnp.where(here, position, 0), here, valid)


def count_classes(count: int, rows: Rows) -> int:
    """The number of classes in all shards, with `count` in each."""
    return count if rows.axis_name is None else count * lax.axis_size(rows.axis_name)


def fetch(value: Array, label: Label, rows: Rows) -> Array:
    """Fetch a value per label from the shard that has the label."""
    if rows.axis_name is None:
        return value
    return lax.psum(jnp.where(label.here, value, 0), rows.axis_name)


def log_total(others: Array, label_term: Array) -> Array:
    """log sum_k exp(z_k - m) from z_c - m and the sum over the other classes.

    It keeps the digits of a logarithm near 0.
    """
    return jnp.where(label_term == 0, jnp.log1p(others), jnp.log(others + jnp.exp(label_term)))


def smoothing_share(label_smoothing: Array, dtype: Any) -> Array:
    """The share of a label that smoothing moves to all classes; NaN if it is out of range."""
    in_range = (label_smoothing >= 0) & (label_smoothing <= 1)
    return nan_unless(in_range, label_smoothing.astype(dtype))


def label_coefficient(
    options: Options, label: Label, counted: Array | None, rows: Rows, dtype: Any
) -> Any:
    """(1 - s) w_c, or None for 1; `counted` has the shape of the label."""
    if options.label_smoothing is None and options.class_weight is None:
        return None
    share: Any = 1.0
    if options.label_smoothing is not None:
        share = 1 - smoothing_share(options.label_smoothing, dtype)
    if options.class_weight is None or not options.class_weight.size:
        return share
    # Sharded as the labels are, which an explicit mesh wants to be told.
    sharding = jax.typeof(label.position).sharding
    weights = options.class_weight.astype(dtype)
    weight = fetch(weights.at[label.position].get(out_sharding=sharding), label, rows)
    return scale(share, weight if counted is None else jnp.where(counted, weight, 0))


def total_loss(
    options: Options, label_loss: Array, coefficient: Any, smoothing_loss: Any, log_z: Any
) -> Array:
    """coefficient * label_loss + smoothing_loss + zeta log_z^2, each term if there is one."""
    loss = label_loss if coefficient is None else scale(coefficient, label_loss)
    if smoothing_loss is not None:
        loss = loss + smoothing_loss
    return loss if options.z_loss is None else loss + z_penalty(log_z, options.z_loss)


def scale(factor: Any, loss: Array) -> Array:
    """factor * loss, with 0 * inf = 0.

    Elsewhere the derivative with respect to a factor of 0 is the loss.
    """
    return factor * jnp.where((factor == 0) & (loss == jnp.inf), 0, loss)


def z_penalty(log_z: Array, z_loss: Array) -> Array:
    """z_loss log_z^2, 0 where no class is possible; NaN if the factor is out of range."""
    factor = nan_unless(z_loss >= 0, z_loss.astype(log_z.dtype))
    log_z = jnp.where(log_z == -jnp.inf, 0, log_z)
    return factor * log_z * log_z  # in this order it overflows only if it is too large
