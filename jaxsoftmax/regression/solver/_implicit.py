"""Linear systems with the Hessian at given parameters: derivatives of an optimum, Newton steps."""

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax.regression._data import Problem
from jaxsoftmax.regression._objective import Params, curvature
from jaxsoftmax.regression.solver import _coordinates, _preconditioner
from jaxsoftmax.regression.solver._cg import Progress, conjugate_gradient
from jaxsoftmax.regression.solver._frame import plan_of

_STEPS = 1000


def solve_hessian(params: Params, problem: Problem, right: Params, *, fit_bias: bool) -> Params:
    """The solution V of H V = `right` with sum 0 over the present classes.

    It is accurate to about the rounding of the dtype, and can be differentiated and transposed.
    """
    dtype = problem.share.dtype
    examples, width = problem.features.shape
    classes = params.bias.size
    view = _coordinates.view(problem, centre=fit_bias)
    # A column without spread has a derivative: that with respect to its entries.
    view = view._replace(inverse=jnp.where(view.inverse > 0, view.inverse, 1))
    fast = _coordinates.standard(view, _coordinates.standard_columns(view, dtype))
    free = _coordinates.projection(problem, classes, fit_bias=fit_bias)
    at = curvature(fast.params(view.table_of(params)), fast.problem)
    plan = plan_of(problem, classes)
    # The preconditioner changes the solution by rounding alone, and so has no derivative.
    data, spread = lax.stop_gradient((fast.problem, at.spread()))
    ridge = jnp.append(data.l2, 0 if fit_bias else 1)
    mean = _preconditioner.covariance(data) if plan.groups and width <= examples else None
    inverse = _preconditioner.inverse(data, spread, mean, ridge, plan)

    def product(table: Array) -> Array:
        return free(fast.table(at.product(fast.params(free(table)))))

    def precondition(residual: Array) -> Array:
        return free(_preconditioner.apply(inverse, free(residual)))

    def proceed(cg: Progress) -> Array:
        accuracy = 10 * jnp.finfo(dtype).eps
        return (cg.squared > accuracy**2 * cg.first) & (cg.steps < _STEPS)

    def solve(_: object, b: Array) -> Array:
        return free(conjugate_gradient(lambda table, _: product(table), precondition, b, proceed).x)

    table = lax.custom_linear_solve(product, free(view.table(right)), solve, symmetric=True)
    return view.params(table)
