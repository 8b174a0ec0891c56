"""How a program over arrays is run: its precision, and its arrays sharded or not."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Value = TypeVar("_Value")
_Result = TypeVar("_Result")


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
            return run(*arrays)

    return cast(_Function, whole)


class Lanes(NamedTuple):
    """Problems that are solved side by side, under `jax.vmap` with an axis name; without, one.

    What they have in common has no axis for them: it is computed once, and decided once.
    Preconditioners are, if the problems are `alike`.
    """

    size: int = 1
    axis_name: str | None = None
    alike: bool = True

    @property
    def sharing(self) -> int:
        """How many problems share a preconditioner."""
        return self.size if self.alike else 1

    def any(self, holds: Array) -> Array:
        return self.most(holds.astype(jnp.int32)) > 0

    def all(self, holds: Array) -> Array:
        return ~self.any(~holds)

    def most(self, value: Array) -> Array:
        return value if self.axis_name is None else lax.pmax(value, self.axis_name)

    def pooled(self, value: Array, counts: Array) -> Array:
        """The mean of a value over the problems that count, if they are alike."""
        if self.axis_name is None or not self.alike:
            return value
        total, number = lax.psum(
            (jnp.where(counts, value, 0), counts.astype(value.dtype)), self.axis_name
        )
        return total / jnp.maximum(number, 1)

    def only(self, running: Array, new: _Value, old: _Value) -> _Value:
        """What is new of problems that are `running`; one alone always is."""
        if self.axis_name is None:
            return new
        result: _Value = jax.tree.map(partial(jnp.where, running), new, old)
        return result

    def of_running(self, f: Callable[[_Value], _Result], running: Array, own: _Value) -> _Result:
        """f(own), to be used where a problem is `running`. The last that runs pays for itself
        alone."""
        if self.axis_name is None:
            return f(own)

        def gathered(value: Array) -> Array:
            return lax.all_gather(value, self.axis_name)

        def of_last() -> _Result:
            last = jnp.argmax(run)
            return f(jax.tree.map(lambda value: gathered(value)[last], own))

        run = gathered(running)
        result: _Result = lax.cond(jnp.sum(run) == 1, of_last, lambda: f(own))
        return result


ALONE = Lanes()
