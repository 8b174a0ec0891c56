"""Argument checks on types, dtypes and shapes, made when a function is traced.

Every message names the argument and says what was expected and what came. Values are checked only
where they are known, see `_arrays.known`.
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax import _arrays, _runtime

Axis = int | Sequence[int] | None
AxisName = str | tuple[str, ...] | None


def mask_array(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """`value` as a boolean array that broadcasts to `shape`, made of its rank, or None."""
    if value is None:
        return None
    mask = _arrays.array(name, value)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{name} must be boolean, got dtype {mask.dtype}")
    return broadcastable(name, mask, shape)


def broadcastable(name: str, value: Array, shape: tuple[int, ...], meaning: str = "") -> Array:
    """`value`, if it broadcasts to `shape` without enlarging it, made of its rank."""
    sizes = (1,) * (len(shape) - value.ndim) + value.shape
    if len(sizes) > len(shape) or any(
        size not in (1, most) for size, most in zip(sizes, shape, strict=True)
    ):
        raise ValueError(
            f"{name} must broadcast to shape {shape}{meaning}, got shape {value.shape}"
        )
    return value.reshape(sizes)


def broadcast_together(name: str, a: Array, other: str, b: Array) -> tuple[Array, Array]:
    """Two arrays, broadcast to one shape."""
    try:
        shape = jnp.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise ValueError(
            f"{name} and {other} must broadcast to one shape, got shapes {a.shape} and {b.shape}"
        ) from None
    return jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape)


def has_shape(name: str, value: Array, shape: tuple[int, ...], meaning: str) -> Array:
    """`value`, if its shape is `shape`; `meaning` names the axes in the message."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {meaning} = {shape}, got shape {value.shape}")
    return value


def boolean(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_arrays.described(value)}")
    return value


def integer(name: str, value: int, *, least: int | None = None) -> int:
    """`value`, if it is an integer, not a bool, of at least `least`."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got the bool {value}")
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be an integer known to the trace, got a tracer; "
            "name it in static_argnames of jax.jit"
        )
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {_arrays.described(value)}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def axis_index(axis: int, ndim: int) -> int:
    """One axis as an index in [0, ndim)."""
    index = integer("axis", axis)
    if ndim == 0:
        raise ValueError(f"axis {index} needs an array of rank 1 or more, got a scalar")
    if not -ndim <= index < ndim:
        raise ValueError(
            f"axis must be in [{-ndim}, {ndim}) for an array of rank {ndim}, got {index}"
        )
    return index % ndim


def axis_indices(axis: Axis, ndim: int) -> tuple[int, ...]:
    """One axis, several, or all (None), as sorted indices in [0, ndim)."""
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, Sequence) else (axis,)
    indices = sorted(axis_index(one, ndim) for one in axes)
    if len(set(indices)) < len(indices):
        raise ValueError(f"axis must not repeat, got {axis!r} for an array of rank {ndim}")
    return tuple(indices)


def axis_names(value: AxisName) -> AxisName:
    """The name of a mesh axis, or a tuple of them, or None."""
    if value is None:
        return None
    names = value if isinstance(value, tuple) else (value,)
    if not (names and all(isinstance(name, str) for name in names)):
        raise TypeError(f"axis_name must be a string or a tuple of strings, got {value!r}")
    try:
        lax.axis_size(value)
    except NameError:
        raise ValueError(
            "axis_name must name axes of the jax.shard_map or jax.vmap that this is called in, "
            f"got {value!r}"
        ) from None
    return value


def temperature(value: ArrayLike, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """A floating-point array with size 1 on `axes` that broadcasts to `shape`, at least 0."""
    one_per_row = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    t = _arrays.real_array("temperature", value)
    t = broadcastable("temperature", t, one_per_row, ", one per row")
    if (x := _arrays.known(value)) is not None and not (x >= 0).all():
        raise ValueError(f"temperature must be at least 0, got {x.min()}")
    return t


def scalar(
    name: str, value: ArrayLike, *, positive: bool = False, most: float | None = None
) -> Array:
    """`value` as a floating-point array of rank 0; if known, it is at least 0, or above 0, and no
    more than `most`."""
    number = _arrays.real_array(name, value)
    if number.ndim != 0:
        raise ValueError(
            f"{name} must be a scalar, got shape {number.shape}; use jax.vmap for several values"
        )
    x = _arrays.known(value)
    if x is not None and not (x > 0 if positive else x >= 0):
        raise ValueError(f"{name} must be {'above' if positive else 'at least'} 0, got {x}")
    if x is not None and most is not None and x > most:
        raise ValueError(f"{name} must be at most {most}, got {x}")
    return number


def known_scalar(name: str, value: ArrayLike, *, positive: bool = False) -> _runtime.Array:
    """`scalar`, but a number of Python stays known inside a trace, as an array of NumPy."""
    largest = float(np.finfo(np.float32).max)  # the rest is for `scalar` to take or to refuse
    if isinstance(value, float | int) and (0 < value <= largest or (value == 0 and not positive)):
        return np.asarray(value, jax.dtypes.canonicalize_dtype(float))
    return scalar(name, value, positive=positive)


def penalties(name: str, value: ArrayLike) -> Array:
    """`value` as a floating-point array of rank 1 with an entry; if known, of at least 0."""
    l2s = _arrays.real_array(name, value)
    if l2s.ndim != 1 or l2s.size == 0:
        raise ValueError(f"{name} must have shape (penalties,), got shape {l2s.shape}")
    if (x := _arrays.known(value)) is not None and not (x >= 0).all():
        raise ValueError(f"{name} must be at least 0, got {x.min()}")
    return l2s


def weights(name: str, value: ArrayLike, count: int) -> Array:
    """`value` as a floating-point array (count,); its numbers are checked if known."""
    weight = has_shape(name, _arrays.real_array(name, value), (count,), "(examples,)")
    if (x := _arrays.known(value)) is not None:
        if not (x >= 0).all():
            raise ValueError(f"{name} must not be negative or NaN, got {x.min()}")
        if not (x > 0).any():
            raise ValueError(f"{name} must have a positive entry, got none")
    return weight


def weights_and_offset(
    sample_weight: ArrayLike | None, offset: ArrayLike | None, shape: tuple[int, int]
) -> tuple[Array | None, Array | None]:
    """Both as floating-point arrays, or None; `shape` is (examples, classes)."""
    if sample_weight is not None:
        sample_weight = weights("sample_weight", sample_weight, shape[0])
    if offset is not None:
        offset = _arrays.real_array("offset", offset)
        has_shape("offset", offset, shape, "(examples, classes)")
    return sample_weight, offset


def parameters(weights: ArrayLike, bias: ArrayLike, prefix: str = "") -> tuple[Array, Array]:
    """Weights of rank 2 and the bias that fits them; `prefix` goes before their names."""
    w, b = (
        _arrays.real_array(prefix + "weights", weights),
        _arrays.real_array(prefix + "bias", bias),
    )
    if w.ndim != 2:
        raise ValueError(
            f"{prefix}weights must have shape (classes, features), got shape {w.shape}"
        )
    return w, has_shape(prefix + "bias", b, w.shape[:1], "(classes,)")


def examples(
    features: ArrayLike, labels: ArrayLike, num_classes: int, width: int | None = None
) -> tuple[Array, Array]:
    """Features (examples, width) and labels (examples,) or (examples, num_classes) that fit.

    Values of the labels are checked where they are known: classes in range, rows that sum to 1.
    """
    x, y = _arrays.real_array("features", features), _arrays.label_array(labels)
    if x.ndim != 2 or x.shape[0] == 0 or width not in (None, x.shape[1]):
        expected = "(examples, features)" if width is None else f"(examples, {width})"
        raise ValueError(f"features must have shape {expected}, got shape {x.shape}")
    values = _arrays.known(labels)
    if class_labels(y, x.shape[:1], "(examples,)"):
        if values is not None and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(
                f"labels must be in [0, {num_classes}) for num_classes={num_classes}, "
                f"got values from {values.min()} to {values.max()}"
            )
    else:
        has_shape("labels", y, (x.shape[0], num_classes), "(examples, classes)")
        if values is not None and not are_probabilities(values).all():
            sums = values.astype(np.float64).sum(-1)
            raise ValueError(
                "labels must be probabilities, not negative and with rows that sum to 1, "
                f"got entries from {values.min()} and rows that sum to {sums.min()} to {sums.max()}"
            )
    return x, y


def class_labels(labels: Array, batch: tuple[int, ...], meaning: str) -> bool:
    """Whether `labels` are integer classes, of shape `batch`, or else floating probabilities."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if labels.ndim == len(batch) + 1 and labels.shape[:-1] == batch:
            raise TypeError(
                f"labels of dtype {labels.dtype} are classes and must have shape {meaning} = "
                f"{batch}, and probabilities must be floating, got shape {labels.shape}"
            )
        has_shape("labels", labels, batch, meaning)
        return True
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        raise TypeError(
            f"labels must be integer classes or floating probabilities, got dtype {labels.dtype}"
        )
    if labels.shape == batch:
        raise TypeError(
            f"labels of shape {labels.shape}, one per example, must have an integer dtype, "
            f"got {labels.dtype}"
        )
    return False


def are_probabilities(labels: Any) -> Any:
    """Whether each row is not negative and sums to 1, up to the square root of the dtype's eps."""
    tolerance = float(jnp.finfo(labels.dtype).eps) ** 0.5
    return (abs(labels.sum(-1) - 1) <= tolerance) & (labels >= 0).all(-1)
