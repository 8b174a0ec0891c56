"""Examples as the solver sees them: as sums over blocks of them.

Shapes: a table (classes, problems, features + 1) has a model's weights, and its bias in the last
column; logits are (classes, problems, examples). Problems side by side have the same features, and
arrays that they share have size 1 on their axis.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax._runtime import Array, namespace, read
from jaxsoftmax.regression._coordinates import Coordinates
from jaxsoftmax.regression._data import Problem
from jaxsoftmax.regression._plan import DEFAULT

_Sum = TypeVar("_Sum")
_Value = TypeVar("_Value")


class Dense(NamedTuple):
    """Features in standard coordinates; the last column is 1, or 0 without a bias."""

    columns: Float[Array, "examples table"]

    def logits(self, table: Array) -> Array:
        return _logits(table, self.columns)

    def transpose(self, values: Array) -> Array:
        """The table of sums of values (classes, problems, examples) times columns."""
        return _sums(values, self.columns)

    def cut(self, start: Array | int, size: int) -> "Dense":
        return Dense(lax.dynamic_slice_in_dim(self.columns, start, size))


class Raw(NamedTuple):
    """Features as they came, for which a table in standard coordinates is converted."""

    features: Shaped[Array, "examples features"]
    coordinates: Coordinates

    def logits(self, table: Array) -> Array:
        weights, bias = self.coordinates.parameters(table)
        return _logits(weights, self.features.astype(table.dtype)) + bias

    def transpose(self, values: Array) -> Array:
        sums = _sums(values, self.features.astype(values.dtype))
        return self.coordinates.pull_back(sums, jnp.sum(values, 2, keepdims=True))

    def cut(self, start: Array | int, size: int) -> "Raw":
        return self._replace(features=lax.dynamic_slice_in_dim(self.features, start, size))


def _logits(table: Array, columns: Array) -> Array:
    """Products of a table with examples: (classes, problems, examples)."""

    def classes_first(table: Array, columns: Array) -> Array:
        return lax.dot_general(table, columns, (((2,), (1,)), ((), ())))

    def examples_first(table: Array, columns: Array) -> Array:
        products = lax.dot_general(columns, table, (((1,), (2,)), ((), ())))
        # Without the barrier XLA makes the other product of it.
        return jnp.moveaxis(lax.optimization_barrier(products), 0, 2)

    if columns.size < DEFAULT.examples_first:
        return classes_first(table, columns)
    return lax.platform_dependent(table, columns, cpu=examples_first, default=classes_first)


def _sums(values: Array, columns: Array) -> Array:
    """Sums over examples of values (classes, problems, examples) times columns."""
    return lax.dot_general(values, columns, (((2,), (0,)), ((), ())))


@runtime_checkable
class Rows(Protocol):
    """The interface through which the solver sees examples, wherever they are kept.

    Attributes:
      shape: (examples, columns of a table).
      target: (classes, problems or 1, 1), the classes' shares in the data.
      kept: whether the logits of all examples may be kept: then `total` calls f once with all.
      traceable: whether `total` can be traced, so that loops around it can be compiled.
    """

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> DTypeLike: ...
    @property
    def target(self) -> Array: ...
    @property
    def kept(self) -> bool: ...
    def offset_range(self) -> Array:
        """The largest difference (problems or 1,) between offsets of one example."""

    def separable(self, offset_range: Array) -> Array:
        """The objective (problems or 1,) below which an unpenalised one proves that the classes are
        separable."""

    @property
    def traceable(self) -> bool: ...
    def while_loop(self, condition: Any, body: Any, value: _Value) -> _Value: ...
    def total(self, f: Callable[..., _Sum], *arguments: object) -> _Sum:
        """The sum of f(block, *arguments) over blocks of examples; each block is an `Examples`."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["design", "labels", "share", "offset", "target"],
    meta_fields=["block"],
)
@dataclass(frozen=True)
class Examples:
    """Rows in memory, or a block of others.

    Attributes:
      design: the features, as `Dense` or `Raw`.
      labels: (1, problems or 1, examples), integer classes, or with an axis of classes
        probabilities.
      share: (1, problems or 1, examples), of sum 1 over the examples.
      offset: (classes, problems or 1, examples), or None for 0.
      target: (classes, problems or 1, 1), the classes' shares in the data.
      block: how many examples' logits are formed at a time.
    """

    design: Dense | Raw
    labels: Array
    share: Array
    offset: Array | None
    target: Array
    block: int

    @staticmethod
    def of(problem: Problem, design: Dense | Raw, num_classes: int, block: int) -> "Examples":
        """Problems side by side, whose arrays may have a leading axis of them."""

        def lanes(values: Array, rank: int) -> Array:
            """Problems after the classes; `rank` is that of one problem's array."""
            values = values[None] if values.ndim == rank else values
            return values[None] if rank == 1 else jnp.moveaxis(values, 0, 1)

        by_class = jnp.issubdtype(problem.labels.dtype, jnp.floating)
        share = lanes(problem.share, 1)
        labels = lanes(problem.labels, 2 if by_class else 1)
        return Examples(
            design=design,
            labels=labels,
            share=share,
            offset=None if problem.offset is None else lanes(problem.offset, 2),
            target=_class_shares(labels, share, num_classes, block),
            block=block,
        )

    @property
    def shape(self) -> tuple[int, int]:
        if isinstance(self.design, Dense):
            examples, columns = self.design.columns.shape
            return examples, columns
        examples, width = self.design.features.shape
        return examples, width + 1

    @property
    def dtype(self) -> DTypeLike:
        return self.share.dtype

    @property
    def traceable(self) -> bool:
        return True

    def while_loop(self, condition: Any, body: Any, value: _Value) -> _Value:
        return lax.while_loop(condition, body, value)

    @property
    def kept(self) -> bool:
        """Whether the logits of all examples may be kept."""
        return self.block >= self.shape[0]

    @property
    def probability_labels(self) -> bool:
        return jnp.issubdtype(self.labels.dtype, jnp.floating)

    @property
    def present(self) -> Bool[Array, "classes problems 1"]:
        """The classes that some example of positive share has."""
        return self.target > 0

    def targets(self) -> Float[Array, "classes problems examples"]:
        """The labels as probabilities."""
        return _targets(self.labels, len(self.target), self.dtype)

    def logits(self, table: Array) -> Float[Array, "classes problems examples"]:
        """Logits, -inf for absent classes."""
        z = self.design.logits(table)
        z = z if self.offset is None else z + self.offset
        return jnp.where(self.present, z, -jnp.inf)

    def transpose(self, values: Array) -> Array:
        return self.design.transpose(values)

    def total(self, f: Callable[..., _Sum], *arguments: object) -> _Sum:
        examples = self.shape[0]
        if self.kept:
            return f(self, *arguments)
        count = -(-examples // self.block)
        size = -(-examples // count)

        def of_block(i: Array | int) -> _Sum:
            # The last block begins within the one before it, whose examples count no more.
            start = jnp.minimum(i * size, examples - size)
            rows = self._cut(start, size)
            new = start + jnp.arange(size) >= i * size
            return f(replace(rows, share=jnp.where(new, rows.share, 0)), *arguments)

        shapes = jax.eval_shape(lambda: of_block(0))
        zero: _Sum = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
        total: _Sum = lax.fori_loop(
            0, count, lambda i, total: jax.tree.map(jnp.add, total, of_block(i)), zero
        )
        return total

    def offset_range(self) -> Array:
        """The largest difference between offsets of one example that counts."""
        share, target = read(self.share), read(self.target)
        xp = namespace(share)
        if self.offset is None:
            return xp.zeros(1, share.dtype)
        offset, present = read(self.offset), target > 0
        largest = xp.where(present, offset, -float("inf")).max(0, keepdims=True)
        least = xp.where(present, offset, float("inf")).min(0, keepdims=True)
        return xp.where(share > 0, largest - least, 0).max((0, 2))

    def separable(self, offset_range: Array) -> Array:
        r"""The objective below which an unpenalised one proves that the classes are separable.

        Below :math:`\log(1 + e^{-r})` times the least share, with the largest range r of an
        example's offsets, every example's own class has the largest of the linear model's logits: a
        multiple of the parameters brings the objective as near to 0 as one likes, and no finite
        ones attain it. Labels that are no classes, but shares of several, are never separated.
        """
        share, target = read(self.share), read(self.target)
        xp = namespace(share)
        counts = share > 0
        least = xp.where(counts, share, float("inf")).min((0, 2))
        # Of a single present class the probability is 1 whatever the parameters.
        proves = (target > 0).sum((0, 2)) > 1
        if self.probability_labels:
            pure = (read(self.labels) > 0).sum(0, keepdims=True) == 1
            proves = proves & (pure | ~counts).all((0, 2))
        bound = xp.log1p(xp.exp(-offset_range)) * least
        return xp.where(proves, bound, 0).astype(share.dtype)

    def each(self, f: Callable[["Examples"], Array]) -> Array:
        """f(block), one value (1, problems, examples) for each example, of all of them."""
        examples = self.shape[0]
        size = min(self.block, examples)

        def put(i: Array, values: Array) -> Array:
            start = jnp.minimum(i * size, examples - size)
            return lax.dynamic_update_slice_in_dim(values, f(self._cut(start, size)), start, 2)

        shape = jax.eval_shape(lambda: f(self._cut(0, size))).shape
        nothing = jnp.zeros((*shape[:2], examples), self.dtype)
        return lax.fori_loop(0, -(-examples // size), put, nothing)

    def _cut(self, start: Array | int, size: int) -> "Examples":
        def cut(values: Array) -> Array:
            return lax.dynamic_slice_in_dim(values, start, size, values.ndim - 1)

        return replace(
            self,
            design=self.design.cut(start, size),
            labels=cut(self.labels),
            share=cut(self.share),
            offset=None if self.offset is None else cut(self.offset),
            block=size,
        )


def _targets(labels: Array, num_classes: int, dtype: DTypeLike) -> Array:
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return labels
    classes = jnp.arange(num_classes, dtype=labels.dtype)[:, None, None]
    return (classes == labels).astype(dtype)


def _class_shares(labels: Array, share: Array, num_classes: int, block: int) -> Array:
    """The classes' shares (classes, problems or 1, 1) in the data."""
    problems, examples = max(labels.shape[1], share.shape[1]), share.shape[2]
    shares = jnp.broadcast_to(share, (1, problems, examples))
    if labels.shape[0] == 1 and block < examples:  # without an array of classes and examples
        of = jnp.broadcast_to(labels[0], (problems, examples))
        number = jnp.arange(problems, dtype=of.dtype)[:, None]
        total = jnp.zeros((num_classes, problems), share.dtype).at[of, number].add(shares[0])
    else:
        targets = _targets(labels, num_classes, share.dtype)
        targets = jnp.broadcast_to(targets, (num_classes, problems, examples))
        total = jnp.einsum("kln,aln->kl", targets, shares)
    return total[:, :, None]
