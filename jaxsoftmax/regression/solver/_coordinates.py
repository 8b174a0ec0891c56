"""Coordinates in which every column of the features has mean 0 and size 1.

Newton's method does not depend on coordinates, but rounding and preconditioners do. Parameters are
held as a table (classes, features + 1) with the bias in the last column.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.lax.linalg import ormqr
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxsoftmax.regression._data import Problem, sum_over_rows
from jaxsoftmax.regression._objective import Params, sum_zero

_BLOCK = 2**20  # entries of features: 4 MiB in float32


class View(NamedTuple):
    """A problem, and how the table gives its parameters: W = T / scale, b = t - W mean.

    A column without spread has `inverse`, that is 1 / scale, 0: with a bias it says nothing.
    """

    problem: Problem
    mean: Float[Array, " features"]
    inverse: Float[Array, " features"]

    @property
    def scale(self) -> Array:
        spread = self.inverse > 0
        return jnp.where(spread, 1 / jnp.where(spread, self.inverse, 1), 0)

    def params(self, table: Array) -> Params:
        weights = table[:, :-1] * self.inverse
        return Params(weights, table[:, -1] - weights @ self.mean)

    def table(self, gradient: Params) -> Array:
        """The adjoint of `params`: the gradient with respect to the table."""
        weights = (gradient.weights - jnp.outer(gradient.bias, self.mean)) * self.inverse
        return jnp.concatenate([weights, gradient.bias[:, None]], 1)

    def table_of(self, params: Params) -> Array:
        """The table that gives `params`, but for columns without spread."""
        bias = params.bias + params.weights @ self.mean
        return jnp.concatenate([params.weights * self.scale, bias[:, None]], 1)

    def gradient(self, table: Array) -> Params:
        """The inverse of `table`, but for columns without spread, which get what the bias has."""
        bias = table[:, -1]
        return Params(table[:, :-1] * self.scale + jnp.outer(bias, self.mean), bias)


class Standard(NamedTuple):
    """A problem whose parameters are the table itself."""

    problem: Problem

    def params(self, table: Array) -> Params:
        return Params(table[:, :-1], table[:, -1])

    def table(self, gradient: Params) -> Array:
        return jnp.concatenate([gradient.weights, gradient.bias[:, None]], 1)


class RowSpace(NamedTuple):
    """Parameters V, b' of the features' coordinates in an orthonormal basis Q of their rows:
    W = V Q^T, b = b' - W mean. Q is held as Householder reflections: to form it takes as long again
    as to find them."""

    reflectors: Float[Array, "features examples"]
    taus: Float[Array, " examples"]
    mean: Float[Array, " features"]

    def inward(self, params: Params) -> Params:
        all_coordinates = ormqr(self.reflectors, self.taus, params.weights.T, transpose=True)
        weights = all_coordinates[: self.taus.size].T
        return Params(weights, params.bias + params.weights @ self.mean)

    def outward(self, params: Params) -> Params:
        weights = self._rotated(params.weights)
        return Params(weights, params.bias - weights @ self.mean)

    def gradient(self, inner: Params) -> Params:
        """That with respect to the parameters of the features, from the one of V and b'."""
        weights = self._rotated(inner.weights) + jnp.outer(inner.bias, self.mean)
        return Params(weights, inner.bias)

    def _rotated(self, weights: Array) -> Array:
        missing = len(self.reflectors) - self.taus.size
        return ormqr(self.reflectors, self.taus, jnp.pad(weights.T, ((0, missing), (0, 0)))).T


def row_space(problem: Problem, *, centre: bool) -> tuple[RowSpace, Problem]:
    """The same problem with no more features than examples.

    The optimal weights are combinations of the rows: what is orthogonal to them changes no logit,
    and a penalty makes it 0.
    """
    features = problem.features.astype(problem.share.dtype)
    mean = jnp.zeros_like(features[0])
    if centre:
        # Twice, so that what rounding leaves is small beside the deviations.
        for _ in range(2):
            mean += problem.share @ (features - mean)
    reflectors, taus = jnp.linalg.qr((features - mean).T, mode="raw")
    coordinates = jnp.tril(reflectors[:, : len(taus)])
    # Rows that depend on others, as centred ones do, leave columns of nothing but rounding.
    length = jnp.linalg.norm(coordinates, axis=1, keepdims=True)
    rounding = features.shape[1] * jnp.finfo(features.dtype).eps * length
    noise = jnp.all(jnp.abs(coordinates) <= rounding, 0)
    coordinates = jnp.where(noise, 0, coordinates)
    return RowSpace(reflectors.T, taus, mean), problem._replace(features=coordinates)


def view(problem: Problem, *, centre: bool) -> View:
    """The problem in its own coordinates; without `centre`, for want of a bias, with means 0."""
    dtype = problem.share.dtype
    width = problem.features.shape[1]
    size = max(_BLOCK // max(width, 1), 1)
    first = shift = jnp.zeros(width, dtype)
    if centre:
        # Beside an example that counts, so that the mean of a constant column is exact. Without the
        # barrier XLA would look for the largest of equal shares as it compiles, for seconds.
        counts = jnp.argmax(lax.optimization_barrier(problem.share))
        first = problem.features[counts].astype(dtype)
        shift = sum_over_rows(
            lambda rows: rows.share @ (rows.features.astype(dtype) - first), problem, size
        )
    mean = first + shift

    def deviation(rows: Problem) -> Array:
        return rows.share @ jnp.abs(rows.features.astype(dtype) - mean)

    scale = sum_over_rows(deviation, problem, size)
    spread = scale > 0
    return View(problem, mean, jnp.where(spread, 1 / jnp.where(spread, scale, 1), 0))


def varied(problem: Problem, *, centre: bool) -> Array:
    """Which columns differ between examples that count; without `centre`, from 0."""
    counts = jnp.argmax(lax.optimization_barrier(problem.share))
    one = jnp.where(centre, problem.features[counts], 0)

    def differences(rows: Problem) -> Array:
        apart = rows.features != one
        return jnp.sum((apart & (rows.share > 0)[:, None]).astype(problem.share.dtype), 0)

    width = problem.features.shape[1]
    return sum_over_rows(differences, problem, max(_BLOCK // max(width, 1), 1)) > 0


def standard_columns(of: View, dtype: DTypeLike) -> Array:
    """A copy of the features in these coordinates, in `dtype`."""
    features = of.problem.features.astype(of.mean.dtype)
    return ((features - of.mean) * of.inverse).astype(dtype)


def standard(of: View, columns: Array) -> Standard:
    """The same problem in the coordinates of its `standard_columns`, and in their dtype.

    Each column has its own penalty there.
    """
    problem, dtype = of.problem, columns.dtype
    # A column of size 1e-20 has a penalty that float32 can't hold; its weight is 0 all the same.
    root = jnp.sqrt(problem.l2) * jnp.where(of.inverse > 0, of.inverse, 1)
    l2 = jnp.minimum(root, 1e15) ** 2
    return Standard(
        problem._replace(
            features=columns,
            labels=problem.labels.astype(dtype) if problem.labels.ndim == 2 else problem.labels,
            share=problem.share.astype(dtype),
            offset=None if problem.offset is None else problem.offset.astype(dtype),
            l2=l2.astype(dtype),
        )
    )


def projection(
    problem: Problem, classes: int, *, fit_bias: bool, columns: Array | None = None
) -> Callable[[Array], Array]:
    """Of a table, the part that can vary: with sum 0 over the present classes, and 0 in others than
    the `columns`.

    Adding one vector to all classes changes no probability, and 0 over absent classes is theirs.
    """
    present = jnp.ones(classes, bool) if problem.classes is None else problem.classes

    def project(table: Array) -> Array:
        table = sum_zero(table, present)
        if columns is not None:
            table = jnp.where(jnp.append(columns, True), table, 0)
        return table if fit_bias else table.at[:, -1].set(0)

    return project
