"""Arrays as they are brought, made into arrays of JAX, or an error that names the argument."""

import numbers
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray


def known(value: ArrayLike) -> NDArray[Any] | None:
    """The numbers of an array, or None if it is being traced or spread over several hosts.

    Checks of values work on these: inside a trace jax.numpy makes tracers even of known numbers.
    """
    if not isinstance(value, Array) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, Array) and not value.is_fully_addressable:
        return None
    try:
        return np.asarray(value)
    except jax.errors.TracerArrayConversionError:  # a list of tracers
        return None


def described(value: Any) -> str:
    """A value in words for a message: of an array its shape and dtype, and what is no number."""
    if not isinstance(value, Array) and hasattr(value, "__array__"):
        value = np.asarray(value)
    if not isinstance(value, Array | np.ndarray) or not value.ndim:
        return reprlib.repr(value)  # the beginning of a long one
    words = f"an array of shape {value.shape} and dtype {value.dtype}"
    if value.dtype == object:
        entries = np.asarray(value).flat
        other = next((v for v in entries if not isinstance(v, numbers.Number)), None)
        words += f" with the entry {other!r}" if other is not None else ""
    return words


def as_jax_takes_it(name: str, value: Any) -> Any:
    """`value`, of which an array of NumPy has no mask, and the byte order of the machine."""
    if isinstance(value, np.ma.MaskedArray):
        if count := np.sum(value.mask):
            raise ValueError(
                f"{name} must have no masked entry, got {count}: fill them or drop their examples"
            )
        value = value.data
    if isinstance(value, np.ndarray | np.generic):
        if not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
        if value.dtype.kind == "f" and value.dtype.itemsize > 8:
            raise TypeError(f"{name} must have at most 64 bits a number, got dtype {value.dtype}")
    return value


def array(name: str, value: ArrayLike) -> Array:
    """`value` as a JAX array."""
    if isinstance(value, Array):
        return value
    value = as_jax_takes_it(name, value)
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be an array of numbers, got {described(value)}") from error


def own_dtype(value: ArrayLike | None) -> Any:
    """The inexact dtype that a value has, or None: numbers of Python, weakly typed arrays and
    integers take that of another."""
    if not isinstance(value, (Array, np.ndarray, np.generic)):
        return None
    if isinstance(value, Array) and jax.typeof(value).weak_type:
        return None
    dtype = jax.dtypes.canonicalize_dtype(value.dtype.newbyteorder("="))
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else None


def label_array(value: ArrayLike, ignore_label: int | None = None) -> Array:
    """Labels as a JAX array; integers too large for its dtype stay out of range, unwrapped."""
    if isinstance(value, Array):
        return value
    value = as_jax_takes_it("labels", value)
    try:
        labels = known(value)
    except (TypeError, ValueError):  # `array` says it
        labels = None
    if labels is not None and np.issubdtype(labels.dtype, np.integer):
        limits = np.iinfo(jax.dtypes.canonicalize_dtype(labels.dtype))
        beyond = limits.max - (ignore_label == limits.max)
        value = np.where((labels < limits.min) | (labels > limits.max), beyond, labels)
    return array("labels", value)


def real_array(name: str, value: ArrayLike) -> Array:
    """`value` as a floating-point array; integers and booleans become the default float."""
    x = array(name, value)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_:
        return x.astype(jnp.result_type(float))
    raise TypeError(f"{name} must hold real numbers, got dtype {x.dtype}")
