"""What a row of an array spans, and how it is added up: in the form that suits its shape."""

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Rows(NamedTuple):
    """What a row spans, static: axes of the array and, if it is sharded, axes of the mesh.

    Reductions keep the axes with size 1. Only their results travel over the mesh.
    """

    axes: tuple[int, ...]
    axis_name: str | tuple[str, ...] | None = None

    def sum(self, values: Array) -> Array:
        length = self._length(values)
        if self._by_product(values):
            total = _times_ones(values, self.axes[0], 1)
        elif _on_cpu() and values.size == length > 4096:
            # XLA:CPU of jax 0.10 adds the products of one long row in a single accumulator, which
            # for 70000 equal ones is off by 5500 eps. A product with ones has more of them.
            width = next((w for w in range(1024, 127, -1) if length % w == 0), 256)
            blocks = jnp.pad(values.reshape(-1), (0, -length % width)).reshape(-1, width)
            total = jnp.sum(_times_ones(blocks, 1, 1)).reshape((1,) * values.ndim)
        else:
            total = jnp.sum(values, self.axes, keepdims=True)
        return total if self.axis_name is None else lax.psum(total, self.axis_name)

    def spread(self, total: Array, values: Array) -> Array:
        """A total of `values`, one per row, in a shape that broadcasts to theirs.

        Its transpose is a sum in the form that suits `values`.
        """
        if self.axis_name is not None:
            return total  # one number per row, also for the transpose to add up over the mesh
        if self.by_column(values):
            return lax.concatenate([total] * self._length(values), *self.axes)
        if self._by_product(values):
            return _times_ones(total, self.axes[0], self._length(values))
        return total

    def sums(self, f: Callable[..., tuple[Array, ...]], *arrays: Array) -> tuple[Array, ...]:
        """Sums over a row of all that the elementwise f makes of its entries.

        It has no derivative of its own: that of the columns' form would be slow.
        """
        if not self.by_column(arrays[0]):
            return tuple(self.sum(values) for values in f(*arrays))
        columns = zip(*(self._columns(array) for array in arrays), strict=True)
        totals = [reduce(jnp.add, values) for values in zip(*(f(*c) for c in columns), strict=True)]
        if self.axis_name is not None:
            totals = lax.psum(totals, self.axis_name)
        return tuple(totals)

    def max(self, values: Array) -> Array:
        maximum = jnp.max(values, self.axes, keepdims=True, initial=-jnp.inf)
        return maximum if self.axis_name is None else lax.pmax(maximum, self.axis_name)

    def _length(self, values: Array) -> int:
        return math.prod(values.shape[axis] for axis in self.axes)

    def _columns(self, values: Array) -> list[Array]:
        (axis,) = self.axes
        return [lax.slice_in_dim(values, i, i + 1, axis=axis) for i in range(values.shape[axis])]

    def by_column(self, values: Array) -> bool:
        """Whether a row is so short that its entries are best taken one by one.

        XLA:CPU spends some 15 ns on a row beside its entries, and 10 times more if it lies across
        the memory. Column by column it makes one vectorised loop over all rows: of 3 entries in a
        third of the time, of 10 in two thirds (jax 0.10 and 0.12); of 16 there is no gain.
        """
        return self._is_plain(values) and 0 < self._length(values) <= 12

    def _by_product(self, values: Array) -> bool:
        """Whether rows lie across the memory: XLA:CPU of jax 0.10 multiplies them by ones 10 to 100
        times faster than it adds them up; on 0.12 the two are equal."""
        return self._is_plain(values) and self.axes == (0,) and values.shape[0] > 12

    def _is_plain(self, values: Array) -> bool:
        """Whether a row is one axis of several, whole on a device, and that a CPU."""
        if not _on_cpu() or len(self.axes) != 1 or values.ndim == 1:
            return False
        return jax.typeof(values).sharding.spec[self.axes[0]] is None  # of an explicit mesh

    def any(self, where: Array) -> Array:
        """Whether a row has an allowed entry."""
        found = jnp.any(where, self.axes, keepdims=True)
        if self.axis_name is None:
            return found
        return lax.pmax(found.astype(jnp.int32), self.axis_name) > 0


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _times_ones(values: Array, axis: int, length: int) -> Array:
    """The sum over `axis`, the first or the last, `length` times along it."""
    ones = jnp.ones((values.shape[axis], length), values.dtype)
    operands = (ones, values) if axis == 0 else (values, ones)
    contracted = ((0,), (0,)) if axis == 0 else ((axis,), (0,))
    return lax.dot_general(*operands, (contracted, ((), ())), precision=lax.Precision.HIGHEST)
