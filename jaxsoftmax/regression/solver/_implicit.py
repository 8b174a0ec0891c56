"""Linear systems with the Hessian at given parameters: derivatives of an optimum, Newton steps."""

from dataclasses import replace

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax.regression._objective import (
    Point,
    curvature,
    hessian_product,
    hessian_weight,
    point_at,
)
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._penalty import Ridge
from jaxsoftmax.regression._plan import DEFAULT
from jaxsoftmax.regression._rows import Dense, Examples, Raw
from jaxsoftmax.regression.solver import _preconditioner
from jaxsoftmax.regression.solver._cg import Stop, conjugate_gradient
from jaxsoftmax.regression.solver._model import standard_coordinates

_STEPS = 1000


def solve_hessian(
    table: Array, rows: Examples, penalty: Ridge, right: Array, *, fit_bias: bool
) -> Params:
    """The solution V of H V = `right` with sum 0 over the present classes.

    Table, examples, penalty and right side are of the features as they came. The solution is
    accurate to about the rounding of the dtype, and can be differentiated and transposed.
    """
    dtype = rows.dtype
    assert isinstance(rows.design, Raw)
    features = rows.design.features
    # Any fixed coordinates give the same solution, so they have no derivative.
    coordinates = lax.stop_gradient(
        standard_coordinates(features, rows.share[0, 0], fit_bias=fit_bias, plan=DEFAULT)
    )
    # A column without deviation has a derivative, that with respect to its entries, if a penalty
    # keeps its weights.
    deviates = coordinates.inverse > 0
    inverse = jnp.where(deviates, coordinates.inverse, 1)
    coordinates = coordinates._replace(inverse=inverse)
    point = point_at(rows, table)
    rows = replace(rows, design=Dense(coordinates.standardise(features)))
    weight = penalty.weight * jnp.append(inverse, 0)[None, None] ** 2
    penalty = Ridge(weight, 0 * weight)
    present = rows.present.astype(dtype)
    bias = jnp.asarray(fit_bias, dtype)
    varies = (deviates | (weight[0, 0, :-1] > 0)).astype(dtype)
    free = jnp.append(varies, bias)[None, None]

    def project(table: Array) -> Array:
        mean = jnp.sum(present * table, 0, keepdims=True) / jnp.sum(present)
        return (table - mean) * present * free

    params = Params(table[None, :, 0, :-1], table[None, :, 0, -1])
    point = point._replace(table=coordinates.table(params))

    def product(table: Array) -> Array:
        return project(hessian_product(rows, penalty, point, project(table)))

    # The preconditioner changes the solution by rounding alone, and so has no derivative.
    fixed, fixed_point, ridge = lax.stop_gradient((rows, point, weight))
    inverse_blocks = _inverse(fixed, fixed_point, ridge)

    def precondition(residual: Array) -> Array:
        return project(_preconditioner.apply(inverse_blocks, project(residual)))

    def solve(_: object, b: Array) -> Array:
        b = project(b)  # as a cotangent it comes with parts that no step can reach
        one = jnp.ones(1, dtype)
        accuracy = 10 * jnp.finfo(dtype).eps
        stop = Stop(-one, accuracy**2 * one, 0 * one, 0 * one, jnp.inf * one, _STEPS * one)
        memory = jnp.zeros((2, 0, *b.shape), dtype)
        end = conjugate_gradient(product, precondition, b, stop, one[None, None], memory)
        return project(end.x)

    sums, total = right[:, :, :-1], right[:, :, -1:]
    b = project(coordinates.pull_back(sums, total))
    weights, bias = coordinates.parameters(
        lax.custom_linear_solve(product, b, solve, symmetric=True)
    )
    return Params(weights[:, 0], bias[:, 0, 0])


def _inverse(rows: Examples, point: Point, ridge: Array) -> Array:
    examples, columns = rows.shape
    kept = point.probabilities is not None
    sizes = DEFAULT.preconditioning(examples, columns - 1, len(rows.target), kept=kept)
    if not sizes.groups or columns > examples:
        return _preconditioner.inverse_diagonals(curvature(rows, point), ridge)
    weight = hessian_weight(rows, point)
    if sizes.groups != len(weight):
        weight = jnp.mean(weight, 0, keepdims=True)
    mean = _preconditioner.covariance(rows, rows.share[0, 0], DEFAULT)
    least, first = jnp.zeros((1, 1), ridge.dtype), jnp.asarray(False)
    return _preconditioner.inverse_blocks(
        rows, weight, mean, ridge, least, first, sizes.rows, DEFAULT
    )
