"""Softmax regression: multinomial logistic regression fitted to a certified optimum."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Shaped

from jaxsoftmax import _arrays, _checks
from jaxsoftmax._runtime import Array, partitioned, precise
from jaxsoftmax.regression._data import Arguments, problem_of
from jaxsoftmax.regression._objective import as_they_came, evaluate, table_of
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._penalty import Ridge
from jaxsoftmax.regression._result import Fit
from jaxsoftmax.regression._rows import Examples
from jaxsoftmax.regression.solver._implicit import solve_hessian
from jaxsoftmax.regression.solver._lbfgs import lbfgs
from jaxsoftmax.regression.solver._vmapped import is_penalised, minimise

SOLVERS = ("auto", "newton_cg", "lbfgs")


def fit(
    features: Shaped[ArrayLike, "examples features"],
    labels: Shaped[ArrayLike, "examples *classes"],
    *,
    num_classes: int,
    l2: Shaped[ArrayLike, ""] = 1e-4,
    sample_weight: Shaped[ArrayLike, " examples"] | None = None,
    offset: Shaped[ArrayLike, "examples classes"] | None = None,
    init: Params | None = None,
    fit_bias: bool = True,
    solver: str = "auto",
    tol: Shaped[ArrayLike, ""] = 1e-6,
    max_iter: int = 100,
) -> Fit:
    r"""Fit a softmax regression.

    .. math:: \min_{W, b} \sum_i c_i\, \ell(W x_i + b + o_i,\, y_i) + \tfrac{\lambda}{2} \|W\|^2

    with the cross-entropy :math:`\ell`, features x, labels y, offsets o, penalty :math:`\lambda`
    (`l2`) and shares :math:`c_i = w_i / \sum_j w_j` of the weights w (`sample_weight`). The bias is
    not penalised.

    It is a pure function: it works under `jit` (with `num_classes`, `fit_bias`, `solver` and
    `max_iter` static), under `vmap` over any array argument, and inside `scan`. One problem shape
    is compiled once. Examples may be sharded over a mesh; the result is then the same on all of it.

    Concrete arrays are fitted by a Python loop over compiled kernels, which an interrupt ends at
    once; traced arrays by the same steps in one compiled loop.

    Under `vmap` over `l2` alone the problems are a path, in which each fit starts where those under
    stronger penalties point to. Problems of the same features that differ in other arrays advance
    side by side, in groups of up to 16: their products with the features are one product. Where
    `features` differ, they are solved one by one. `vmap` of a `vmap` over `l2` gives paths side by
    side.

    Parameters and objective of the result can be differentiated with respect to `features`, `l2`,
    `sample_weight`, `offset` and probability labels, any number of times and both forward and
    reverse: by the implicit function theorem, :math:`dW = -H^+ d\nabla f`, which is right as far as
    the fit has converged.

    Args:
      features: (examples, features), real; bfloat16 and float16 are computed in float32.
      labels: integer classes (examples,), or probabilities (examples, classes) whose rows sum to 1.
      num_classes: number of classes, at least 2.
      l2: penalty on the weights, at least 0. scikit-learn's `C` is 1 / (l2 * sum(sample_weight)).
      sample_weight: (examples,), not negative; weight 2 equals a repeated example, 0 a dropped one,
        whose features must be finite all the same. None for 1.
      offset: (examples, classes), added to the logits. None for 0.
      init: parameters to start from, for example of a similar fit. None for 0.
      fit_bias: whether to fit the bias; without, it is 0.
      solver: "newton_cg", truncated Newton with a preconditioner, or "lbfgs", optax's, the plain
        reference; "auto" is "newton_cg", which was the faster at every shape that was measured.
      tol: bound on (objective - minimum) / objective at which the fit has converged.
      max_iter: the most iterations of the solver.

    Returns:
      A `Fit`. Its parameters sum to 0 over the classes. A class that no example of positive weight
      has gets bias -inf, which is probability 0, and weights 0. Where the objective is not finite,
      as with NaN or inf in an array, the status is DIVERGED and the parameters are NaN; so it is,
      under jit, where a value is invalid (the list under Raises). Separable data without a penalty
      have no optimum: the status is then SEPARABLE, the parameters are finite and separate the
      classes, and `diverging_weights` says along which columns they grow.

    Raises:
      TypeError: an array is not real, `labels` is boolean or floating without a class axis, or
        `num_classes`, `max_iter`, `fit_bias`, `init` or `solver` has another type.
      ValueError: a shape does not fit; `num_classes` is below 2; `max_iter` is negative; `solver`
        is unknown; or, outside jit, a label is out of range, a row of probability labels is
        negative or does not sum to 1, `l2` is negative, `tol` is not positive, or `sample_weight`
        has a negative entry or no positive one.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import Status, fit, linear_logits, softmax
      >>> features = jnp.array([[0.0], [1.0], [2.0], [3.0]])
      >>> result = fit(features, jnp.array([0, 1, 0, 1]), num_classes=2, l2=0.1)
      >>> Status(int(result.status)).name
      'CONVERGED'
      >>> softmax(linear_logits(result.params, features)).round(2)
      Array([[0.75, 0.25],
             [0.59, 0.41],
             [0.41, 0.59],
             [0.25, 0.75]], dtype=float32)

    Reference:
      Hastie, Tibshirani, Friedman (2009), The Elements of Statistical Learning, section 4.4.
    """
    arguments, static = check_arguments(
        features,
        labels,
        num_classes=num_classes,
        l2=_checks.known_scalar("l2", l2),
        sample_weight=sample_weight,
        offset=offset,
        init=init,
        fit_bias=fit_bias,
        solver=solver,
        tol=tol,
        max_iter=max_iter,
    )
    return solve(arguments, **static)


def check_arguments(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    num_classes: int,
    l2: Array,
    sample_weight: ArrayLike | None,
    offset: ArrayLike | None,
    init: Params | None,
    fit_bias: bool,
    solver: str,
    tol: ArrayLike,
    max_iter: int,
) -> tuple[Arguments, dict[str, Any]]:
    """The arguments of `fit` as arrays and static ones, or an error."""
    num_classes = _checks.integer("num_classes", num_classes, least=2)
    max_iter = _checks.integer("max_iter", max_iter, least=0)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
    solver = "newton_cg" if solver == "auto" else solver
    fit_bias = _checks.boolean("fit_bias", fit_bias)
    features, labels = _checks.examples(features, labels, num_classes)
    examples, width = features.shape
    shape = (examples, num_classes)
    sample_weight, offset = _checks.weights_and_offset(sample_weight, offset, shape)
    if init is not None:
        if not isinstance(init, Params):
            raise TypeError(f"init must be a Params, got a {type(init).__name__}")
        init = Params(
            weights=_arrays.real_array("init.weights", init.weights),
            bias=_arrays.real_array("init.bias", init.bias),
        )
        _checks.has_shape("init.weights", init.weights, (num_classes, width), "(classes, features)")
        _checks.has_shape("init.bias", init.bias, (num_classes,), "(classes,)")
    arguments = Arguments(
        features=features,
        labels=labels,
        l2=l2,
        sample_weight=sample_weight,
        offset=offset,
        init=init,
        tol=_checks.known_scalar("tol", tol, positive=True),
        max_iter=np.int32(min(max_iter, np.iinfo(np.int32).max)),
    )
    return arguments, {"num_classes": num_classes, "fit_bias": fit_bias, "solver": solver}


@partitioned
def solve(arguments: Arguments, *, num_classes: int, fit_bias: bool, solver: str) -> Fit:
    """`fit` of checked arguments."""
    # Here l2 may be known, though the other arguments are traced.
    return _optimum(num_classes, fit_bias, solver, is_penalised(arguments.l2), arguments)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _optimum(
    num_classes: int, fit_bias: bool, solver: str, penalised: bool, arguments: Arguments
) -> Fit:
    if solver == "lbfgs":
        return lbfgs(arguments, num_classes=num_classes, fit_bias=fit_bias)
    return minimise(arguments, num_classes=num_classes, fit_bias=fit_bias, penalised=penalised)


@_optimum.defjvp
def _optimum_jvp(
    num_classes: int, fit_bias: bool, solver: str, penalised: bool, primals: Any, tangents: Any
) -> tuple[Fit, Fit]:
    (arguments,), (tangent,) = primals, tangents
    fit = _optimum(num_classes, fit_bias, solver, penalised, arguments)
    objective, params = _tangents(fit.params, arguments, tangent, num_classes, fit_bias)
    nothing = jax.tree.map(lambda v: np.zeros(v.shape, jax.dtypes.float0), fit)
    return fit, nothing._replace(
        params=params,
        objective=objective,
        gap=jnp.zeros_like(fit.gap),
        gradient_norm=jnp.zeros_like(fit.gradient_norm),
    )


@partial(jax.jit, static_argnums=(3, 4))
@precise
def _tangents(
    params: Params, arguments: Arguments, tangent: Arguments, num_classes: int, fit_bias: bool
) -> tuple[Array, Params]:
    """At the optimum the gradient g is 0 whatever the problem: H dW = -dg, with dg at fixed W."""

    def rows_and_penalty(arguments: Arguments) -> tuple[Examples, Ridge]:
        problem = problem_of(arguments, num_classes=num_classes)
        return as_they_came(problem, num_classes, arguments.l2)

    rows, penalty = rows_and_penalty(arguments)
    # A class that is absent has bias -inf, and no derivative.
    bias = jnp.where(rows.present[:, 0, 0], params.bias, 0)
    table = table_of(params._replace(bias=bias))

    def at_fixed_params(arguments: Arguments) -> tuple[Array, Array]:
        value, point = evaluate(*rows_and_penalty(arguments), table)
        return value[0], point.gradient

    _, (change, gradient) = jax.jvp(at_fixed_params, (arguments,), (tangent,))
    return change, solve_hessian(table, rows, penalty, -gradient, fit_bias=fit_bias)
