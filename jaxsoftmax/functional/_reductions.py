"""Rows of an array and their reductions, each in the form that suits its shape and device."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax import _checks
from jaxsoftmax._checks import Axis, AxisName


class Rows(NamedTuple):
    """The axes that a row spans, static: of the array and, if it is sharded, of the mesh.

    Reductions keep the axes with size 1. Only their results travel over the mesh.
    """

    axes: tuple[int, ...]
    axis_name: str | tuple[str, ...] | None = None

    def sum(self, values: Array) -> Array:
        length = self._length(values)
        if self._leads(values):
            total = _sum_of_leading(values)
        elif _on_cpu() and _is_known(values) and values.size == length > 4096:
            # XLA:CPU of jax 0.10 adds the products of one long row in a single accumulator, which
            # for 70000 equal ones is off by 5500 eps. A product with ones has more of them.
            width = next((w for w in range(1024, 127, -1) if length % w == 0), 256)
            blocks = jnp.pad(values.reshape(-1), (0, -length % width)).reshape(-1, width)
            total = jnp.sum(_times_ones(blocks, 1, 1)).reshape((1,) * values.ndim)
        else:
            total = jnp.sum(values, self.axes, keepdims=True)
        return total if self.axis_name is None else lax.psum(total, self.axis_name)

    def expand(self, total: Array, values: Array) -> Array:
        """Give a total of `values`, one per row, a shape that broadcasts to theirs.

        Its transpose is a sum in the form that suits `values`.
        """
        if self.axis_name is not None:
            return total  # one number per row, also for the transpose to add up over the mesh
        if self.is_short(values):
            return lax.concatenate([total] * self._length(values), *self.axes)
        if self._leads(values) and self._length(values) <= _ACCUMULATED:
            return _times_ones(total, self.axes[0], self._length(values))
        return total

    def sums(self, *values: Array, reused: bool = False) -> tuple[Array, ...]:
        """Sums over a row of several arrays. They have no derivative of their own.

        `reused` says that what `values` are made of is needed again, and kept in memory.

        On a CPU one loop computes and adds up all of them: log-sum-exp takes two fifths (rows of
        26) to seven tenths (of 100 and 1024) of the time that it takes with XLA:CPU's own sums, one
        by one, in float32 with jax 0.10 and 0.12. A single sum is faster in XLA's form, but for
        short rows, on which it spends some 15 ns beside their entries: of 3 the loop takes an
        eighth of the time. Where rows lie along the memory the loop also spares writing out what is
        made of an array that is kept: gradients of integer cross-entropy take half (rows of 1000)
        to nine tenths (of 26) of the time.
        """
        if self.in_loop(values[0], len(values), reused):
            totals = _blockwise(values, self.axes[0], _SUM)
            return tuple(lax.psum(totals, self.axis_name) if self.axis_name else totals)
        return tuple(self.sum(value) for value in values)

    def in_loop(self, values: Array, sums: int, reused: bool = False) -> bool:
        """Whether `sums` sums of arrays like `values` are added up in one loop."""
        in_memory_order = reused and not self._leads(values)
        return self._is_plain(values) and (sums > 1 or self.is_short(values) or in_memory_order)

    def max(self, values: Array, keep_nan: bool = True) -> Array:
        """The maximum over a row.

        With a NaN in the row it is NaN; without `keep_nan`, which is faster, it may be the maximum
        of the others.
        """
        dtype = values.dtype
        small = _is_known(values) and values.size < 4096
        if dtype.itemsize < 4 and (self._leads(values) or small):
            # XLA:CPU's library, to which it gives larger arrays, is as fast in bfloat16 as in
            # float32, and spares a wide copy. A loop is slow in bfloat16.
            values = values.astype(jnp.float32)
        if self.is_short(values) or self._leads(values):
            fold = _MAX if keep_nan else _MAX_OF_NUMBERS
            (maximum,) = _blockwise([values], self.axes[0], fold)
        else:
            maximum = jnp.max(values, self.axes, keepdims=True, initial=-jnp.inf)
        maximum = maximum.astype(dtype)
        return maximum if self.axis_name is None else lax.pmax(maximum, self.axis_name)

    def _length(self, values: Array) -> int:
        return math.prod(values.shape[axis] for axis in self.axes)

    def is_short(self, values: Array) -> bool:
        """Whether a row is so short that XLA:CPU spends more on the row than on its entries."""
        return self._is_plain(values) and self._length(values) <= 12

    def _leads(self, values: Array) -> bool:
        """Whether rows lie across the memory."""
        return self._is_plain(values) and self.axes == (0,) and values.ndim > 1 and len(values) > 12

    def _is_plain(self, values: Array) -> bool:
        """Whether a row is one axis, not empty, of an array on a CPU, not on an explicit mesh."""
        if not (_on_cpu() and len(self.axes) == 1 and _is_known(values) and self._length(values)):
            return False
        return not any(jax.typeof(values).sharding.spec)

    def select(self, where: Array | None, values: Array, otherwise: float = 0) -> Array:
        """`values` where allowed, `otherwise` where masked. It has no derivative of its own."""
        if where is None:
            return values
        if not self._is_plain(values) or self.axes != (values.ndim - 1,) or values.shape[-1] > 40:
            return jnp.where(where, values, otherwise)
        # Bit by bit: of a selection along short rows XLA:CPU makes branches. At 65384 x 26 that is
        # 2.2 ms, this 1.0; from rows of 64 on the two are equal.
        integer = jnp.dtype(f"int{8 * values.dtype.itemsize}")
        allowed = -where.astype(integer)
        bits, other_bits = (
            lax.bitcast_convert_type(v, integer)
            for v in (values, jnp.asarray(otherwise, values.dtype))
        )
        return lax.bitcast_convert_type((bits & allowed) | (other_bits & ~allowed), values.dtype)

    def any(self, where: Array) -> Array:
        """Whether a row has an allowed entry."""
        found = jnp.any(where, self.axes, keepdims=True)
        if self.axis_name is None:
            return found
        return lax.pmax(found.astype(jnp.int32), self.axis_name) > 0


def check_rows(
    x: Array, axis: Axis, where: ArrayLike | None, axis_name: AxisName = None
) -> tuple[Array | None, Rows]:
    """Check the arguments that say what a row of x is; return the mask and the rows."""
    rows = Rows(_checks.axis_indices(axis, x.ndim), _checks.axis_names(axis_name))
    return _checks.mask_array("where", where, x.shape), rows


class _Fold(NamedTuple):
    """A reduction: of two entries to one, from a start, and as XLA knows it."""

    combine: Callable[[Array, Array], Array]
    start: float
    library: Callable[..., Array]


# a - (-b) is a + b in a form that XLA:CPU doesn't take for a sum: that it would give to a library,
# after writing out what is to be added.
_SUM = _Fold(lambda a, b: a - (-b), 0.0, jnp.sum)
# What keeps every NaN takes four instructions, the selection one.
_MAX = _Fold(lax.max, -math.inf, jnp.max)
_MAX_OF_NUMBERS = _Fold(lambda a, b: lax.select(a < b, b, a), -math.inf, jnp.max)


def _blockwise(values: Sequence[Array], axis: int, fold: _Fold) -> list[Array]:
    """Reductions of several arrays over an axis, which keeps size 1, all in one loop.

    The loop takes blocks of at most 20 entries, which XLA:CPU unrolls and vectorises. Then it takes
    what it made of them.
    """
    shape, length = values[0].shape, values[0].shape[axis]
    before, after = shape[:axis], shape[axis + 1 :]
    if length <= 20:
        return [total.reshape(*before, 1, *after) for total in _one_loop(values, axis, fold)]
    widths = [width for width in range(8, 21) if length % width == 0] or [16]
    along_memory = bool(after) or length >= 8192  # what the loop vectorises, else the block
    width = widths[-1 if along_memory else 0]
    count = length // width
    split, at = ((*before, width, count, *after), axis) if along_memory else ((-1, width), 1)
    whole = [lax.slice_in_dim(value, 0, count * width, axis=axis) for value in values]
    blocks = _one_loop([value.reshape(split) for value in whole], at, fold)
    blocks = [block.reshape(*before, count, *after) for block in blocks]
    if count * width < length:
        rest = [lax.slice_in_dim(value, count * width, length, axis=axis) for value in values]
        blocks = [
            lax.concatenate(parts, axis)
            for parts in zip(blocks, _blockwise(rest, axis, fold), strict=True)
        ]
    if not after and count > 400:  # as fast, and compiled sooner
        return [fold.library(block, axis, keepdims=True) for block in blocks]
    return _blockwise(blocks, axis, fold)


def _one_loop(values: Sequence[Array], axis: int, fold: _Fold) -> Sequence[Array]:
    def combine(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
        return [fold.combine(x, y) for x, y in zip(a, b, strict=True)]

    starts = [jnp.array(fold.start, value.dtype) for value in values]
    return lax.reduce(list(values), starts, combine, [axis])


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _is_known(values: Array) -> bool:
    """Whether the sizes are numbers: `jax.export` has programs for any size."""
    return all(isinstance(size, int) for size in values.shape)


# The most products that XLA:CPU may add up in one accumulator.
_ACCUMULATED = 2048


def _sum_of_leading(values: Array) -> Array:
    """The sum over the first axis, which keeps size 1."""
    length, width = len(values), 256
    if length <= _ACCUMULATED:
        return _times_ones(values, 0, 1)
    # 256 long rows, each a block of as many rows as the last one.
    count, rest = divmod(length, width)
    blocks = values[: count * width].reshape(width, count, *values.shape[1:])
    totals = _times_ones(blocks, 0, 1)[0]
    if rest:
        totals = jnp.concatenate([totals, _times_ones(values[count * width :], 0, 1)])
    return _sum_of_leading(totals)


def _times_ones(values: Array, axis: int, length: int) -> Array:
    """The sum over `axis`, the first or the last, `length` times along it."""
    ones = jnp.ones((values.shape[axis], length), values.dtype)
    operands = (ones, values) if axis == 0 else (values, ones)
    contracted = ((0,), (0,)) if axis == 0 else ((axis,), (0,))
    return lax.dot_general(*operands, (contracted, ((), ())), precision=lax.Precision.HIGHEST)
