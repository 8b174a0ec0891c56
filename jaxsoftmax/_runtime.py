"""The run-time setting of programs: precision, sharding, arrays of JAX or of NumPy."""

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

if TYPE_CHECKING:
    Array: TypeAlias = Any
else:
    # An array of JAX or of NumPy: see `namespace`.
    Array = jax.Array | np.ndarray

_Function = TypeVar("_Function", bound=Callable[..., Any])


def precise(f: _Function) -> _Function:
    """f with products of matrices in the whole precision of their dtype, which on a GPU or a TPU is
    not the default: a certificate needs it."""

    @wraps(f)
    def precisely(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return f(*args, **kwargs)

    return cast(_Function, precisely)


def partitioned(f: _Function) -> _Function:
    """f of arrays that may be explicitly sharded: the compiler shares out the work as it does for
    others, and results are whole."""

    @wraps(f)
    def whole(*arrays: Any, **options: Any) -> Any:
        meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arrays)]
        explicit = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if explicit is None:
            return f(*arrays, **options)
        with jax.sharding.use_abstract_mesh(explicit):
            run = jax.sharding.auto_axes(partial(f, **options), out_sharding=PartitionSpec())
            return jax.jit(run)(*arrays)

    return cast(_Function, whole)


def namespace(*arrays: Any) -> Any:
    """NumPy for its own arrays, else `jax.numpy`: small computations of either are the same code,
    and NumPy has nothing to compile."""
    return np if all(isinstance(array, (np.ndarray, np.generic)) for array in arrays) else jnp


def read(array: Any) -> Any:
    """The numbers of an array, or the array itself where it is traced."""
    return array if isinstance(array, jax.core.Tracer) else np.asarray(array)
