"""Coordinates in which every column of the features has mean 0 and size 1.

Newton's method does not depend on coordinates, but rounding and preconditioners do. A model is held
as a table (classes, problems, features + 1) with the bias in the last column.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax.linalg import ormqr
from jaxtyping import Float, Shaped

from jaxsoftmax._runtime import Array, namespace, read
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._penalty import inner


class RowSpace(NamedTuple):
    """An orthonormal basis Q of the rows of fewer examples than features: W = V Q^T.

    The optimal weights are combinations of the rows: what is orthogonal to them changes no logit,
    and a penalty makes it 0. Q is held as Householder reflections: to form it takes as long again
    as to find them.
    """

    reflectors: Float[Array, "features examples"]
    taus: Float[Array, " examples"]
    mean: Float[Array, " features"]

    @staticmethod
    def of(features: Array, mean: Array) -> tuple["RowSpace", Array]:
        """The space of the rows, and their coordinates (examples, examples) in it."""
        reflectors, taus = jnp.linalg.qr((features - mean).T, mode="raw")
        coordinates = jnp.tril(reflectors[:, : len(taus)])
        # Rows that depend on others, as centred ones do, leave columns of nothing but rounding.
        length = jnp.linalg.norm(coordinates, axis=1, keepdims=True)
        size = features.shape[1] * length + 4 * jnp.linalg.norm(mean)
        rounding = jnp.finfo(features.dtype).eps * size
        noise = jnp.all(jnp.abs(coordinates) <= rounding, 0)
        return RowSpace(reflectors.T, taus, mean), jnp.where(noise, 0, coordinates)

    def inward(self, weights: Array) -> Array:
        """V of weights W (rows, features)."""
        return ormqr(self.reflectors, self.taus, weights.T, transpose=True)[: self.taus.size].T

    def outward(self, weights: Array) -> Array:
        missing = len(self.reflectors) - self.taus.size
        return ormqr(self.reflectors, self.taus, jnp.pad(weights.T, ((0, missing), (0, 0)))).T


class Coordinates(NamedTuple):
    """Weights and bias of a table T: W = T * inverse, b = t - W mean.

    A column without deviation has `inverse` 0: with a bias it says nothing. `intercept` is 1, or 0
    without a bias.
    """

    mean: Float[Array, " features"]
    inverse: Float[Array, " features"]
    intercept: Float[Array, ""]
    rows: RowSpace | None

    @property
    def scale(self) -> Array:
        xp, deviates = namespace(self.inverse), self.inverse > 0
        return xp.where(deviates, 1 / xp.where(deviates, self.inverse, 1), 0)

    def parameters(self, table: Array) -> tuple[Array, Array]:
        """Weights (classes, problems, features) and bias (classes, problems, 1)."""
        weights = table[:, :, :-1] * self.inverse[None, None]
        centre = weights @ self.mean[:, None]
        return weights, (table[:, :, -1:] - centre) * self.intercept

    def pull_back(self, sums: Array, total: Array) -> Array:
        """The adjoint of `parameters`: a gradient with respect to the table."""
        weights = (sums - total * self.mean[None, None]) * self.inverse[None, None]
        return jnp.concatenate([weights, total * self.intercept], 2)

    def standardise(self, features: Shaped[Array, "examples features"]) -> Array:
        """The columns of a table, the last of which belongs to the bias."""
        columns = (features.astype(self.mean.dtype) - self.mean[None]) * self.inverse[None]
        return lax.pad(columns, self.intercept, [(0, 0, 0), (0, 1, 0)])

    def table(self, params: Params) -> Array:
        """The table (classes, problems, columns) of `Params` with leading problems."""
        weights, bias = params.weights, params.bias[:, :, None]
        if self.rows is not None:
            bias = bias + weights @ read(self.rows.mean)[:, None]
            weights = _rotate(_inward, self.rows, weights)
        bias = bias + weights @ self.mean[:, None]
        xp = namespace(weights, bias)
        table = xp.concatenate([weights * self.scale[None, None], bias * self.intercept], 2)
        return xp.moveaxis(table, 1, 0)

    def params(self, table: Array) -> Params:
        """The inverse of `table`, except for columns without deviation."""
        xp = namespace(table)
        weights, bias = (xp.moveaxis(part, 0, 1) for part in self.parameters(table))
        if self.rows is not None:
            weights = _rotate(_outward, self.rows, weights)
            bias = (bias - weights @ read(self.rows.mean)[:, None]) * self.intercept
        return Params(weights, bias[:, :, 0])

    def gradient_norm(self, gradient: Array) -> Array:
        """The 2-norm (problems,) of the gradient with respect to weights and bias, from that with
        respect to a table; columns without deviation count as what the bias has."""
        bias = gradient[:, :, -1:]
        weights = gradient[:, :, :-1] * self.scale[None, None] + bias * self.mean[None, None]
        if self.rows is not None:
            weights = (
                _rotate(_outward, self.rows, weights) + bias * read(self.rows.mean)[None, None]
            )
        return namespace(gradient).sqrt(inner(weights, weights) + inner(bias, bias))


_inward, _outward = jax.jit(RowSpace.inward), jax.jit(RowSpace.outward)


def _rotate(rotation: Callable[[RowSpace, Array], Array], space: RowSpace, weights: Array) -> Array:
    """A rotation of rows (rows, features) of weights (..., ..., features), in their namespace."""
    rows = rotation(space, weights.reshape(-1, weights.shape[2]))
    rows = read(rows) if isinstance(weights, np.ndarray) else rows
    return rows.reshape(*weights.shape[:2], -1)
