"""What the losses of integer labels and of probabilities share: where a label stands among classes
that may be sharded, its weight, and factors that may be 0 or out of range."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax.functional._reductions import Rows
from jaxsoftmax.functional._stable import only_if


class Label(NamedTuple):
    """Where integer labels stand: position in this shard, whether it is here, and whether it is in
    any shard."""

    position: Array
    here: Array
    valid: Array


def locate(labels: Array, shape: tuple[int, ...], rows: Rows) -> Label:
    (axis,) = rows.axes
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    labels, count = jnp.expand_dims(labels, axis), shape[axis]
    shards = 1 if rows.axis_name is None else lax.axis_size(rows.axis_name)
    valid = (labels >= 0) & (labels < shards * count)
    position = jnp.where(valid, labels.astype(jnp.int32), 0)
    if rows.axis_name is None:
        return Label(position, valid, valid)
    position = position - count * lax.axis_index(rows.axis_name)
    here = valid & (position >= 0) & (position < count)
    return Label(jnp.where(here, position, 0), here, valid)


def from_owner(value: Array, label: Label, rows: Rows) -> Array:
    """The value that the shard with the label has."""
    if rows.axis_name is None:
        return value
    return lax.psum(jnp.where(label.here, value, 0), rows.axis_name)


def log_total(others: Array, own: Array) -> Array:
    """log sum_k exp(z_k - m) from the label's own z_c - m and the sum over the other classes, which
    keeps the digits of a logarithm near 0."""
    return jnp.where(own == 0, jnp.log1p(others), jnp.log(others + jnp.exp(own)))


def own_weight(class_weight: Array, label: Label, rows: Rows) -> Array:
    """The weight of each label's class."""
    # Sharded as the labels are, which an explicit mesh wants to be told.
    sharding = jax.typeof(label.position).sharding
    return from_owner(class_weight.at[label.position].get(out_sharding=sharding), label, rows)


def holds(dtype: Any, value: int) -> bool:
    """Whether labels of this dtype may have the value."""
    return bool(jnp.iinfo(dtype).min <= value <= jnp.iinfo(dtype).max)


def is_zero(value: ArrayLike) -> bool:
    """Whether a term is left out of the program: its factor is the Python number 0."""
    return isinstance(value, (int, float)) and value == 0


def product(factor: Any, loss: Array) -> Array:
    """factor * loss, with 0 * inf = 0; elsewhere the derivative with respect to a factor of 0 is
    the loss."""
    return factor * jnp.where((factor == 0) & (loss == jnp.inf), 0, loss)


def share_to_spread(label_smoothing: Array, dtype: Any) -> Array:
    """The share of a label that label smoothing spreads over the classes; NaN out of range."""
    in_range = (label_smoothing >= 0) & (label_smoothing <= 1)
    return only_if(in_range, label_smoothing.astype(dtype))


def z_penalty(log_z: Array, z_loss: Array) -> Array:
    """z_loss log_z^2, 0 where no class is possible; NaN if the factor is out of range."""
    factor = only_if(z_loss >= 0, z_loss.astype(log_z.dtype))
    log_z = jnp.where(log_z == -jnp.inf, 0, log_z)
    return factor * log_z * log_z  # in this order it overflows only if it is too large
