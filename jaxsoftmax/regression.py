"""Softmax regression: multinomial logistic regression fitted to a certified optimum."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Shaped

from jaxsoftmax import _checks
from jaxsoftmax._implicit import solve_hessian
from jaxsoftmax._newton import newton_cg
from jaxsoftmax._rows import compute_dtype
from jaxsoftmax.certificate import certify, separates
from jaxsoftmax.objective import (
    Params,
    Problem,
    centred,
    make_problem,
    objective,
    present_classes,
    value_and_gradient,
)
from jaxsoftmax.solvers import Fit, Status, lbfgs

SOLVERS = ("auto", "newton_cg", "lbfgs")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _precise(f: _Function) -> _Function:
    """f with products of matrices in the whole precision of their dtype, which on a GPU or a TPU is
    not the default: a certificate needs it."""

    @wraps(f)
    def precise(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return f(*args, **kwargs)

    return cast(_Function, precise)


def _partitioned(f: _Function) -> _Function:
    """f of arrays that may be explicitly sharded: the compiler shares out the work as it does for
    others, and results are whole."""

    @wraps(f)
    def partitioned(*arrays: Any, **options: Any) -> Any:
        meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arrays)]
        explicit = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if explicit is None:
            return f(*arrays, **options)
        with jax.sharding.use_abstract_mesh(explicit):
            whole = jax.sharding.auto_axes(partial(f, **options), out_sharding=PartitionSpec())
            return whole(*arrays)

    return cast(_Function, partitioned)


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

    Parameters and objective of the result can be differentiated with respect to `features`, `l2`,
    `sample_weight`, `offset` and probability labels, any number of times and both forward and
    reverse: by the implicit function theorem, :math:`dW = -H^+ d\nabla f`, which is right as far as
    the fit has converged.

    Args:
      features: (examples, features), real; bfloat16 and float16 are computed in float32.
      labels: integer classes (examples,), or probabilities (examples, classes) whose rows sum to 1.
      num_classes: number of classes, at least 2.
      l2: penalty on the weights, at least 0. scikit-learn's `C` is 1 / (l2 * sum(sample_weight)).
      sample_weight: (examples,), not negative; weight 2 equals a repeated example, 0 a dropped one.
        None for 1.
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
    num_classes = _checks.integer("num_classes", num_classes, least=2)
    max_iter = _checks.integer("max_iter", max_iter, least=0)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
    if not isinstance(fit_bias, bool):
        raise TypeError(f"fit_bias must be True or False, got {fit_bias!r}")
    features, labels = _checks.examples(features, labels, num_classes)
    examples, width = features.shape
    dtype = compute_dtype(features.dtype)
    l2 = _checks.scalar("l2", l2).astype(dtype)
    tol = _checks.scalar("tol", tol, positive=True).astype(dtype)
    sample_weight, offset = _weights_and_offset(
        sample_weight, offset, (examples, num_classes), dtype
    )
    if init is not None:
        if not isinstance(init, Params):
            raise TypeError(f"init must be a Params, got a {type(init).__name__}")
        init = Params(
            weights=_checks.real_array("init.weights", init.weights).astype(dtype),
            bias=_checks.real_array("init.bias", init.bias).astype(dtype),
        )
        _checks.has_shape("init.weights", init.weights, (num_classes, width), "(classes, features)")
        _checks.has_shape("init.bias", init.bias, (num_classes,), "(classes,)")
    limit = jnp.asarray(min(max_iter, jnp.iinfo(jnp.int32).max), jnp.int32)
    arrays = features, labels, l2, sample_weight, offset, init, tol, limit
    return _fit(*arrays, num_classes=num_classes, fit_bias=fit_bias, solver=solver)


def _weights_and_offset(
    sample_weight: ArrayLike | None,
    offset: ArrayLike | None,
    shape: tuple[int, int],
    dtype: DTypeLike,
) -> tuple[Array | None, Array | None]:
    """Both checked and in `dtype`, or None; `shape` is (examples, classes)."""
    if sample_weight is not None:
        sample_weight = _checks.weights("sample_weight", sample_weight, shape[0]).astype(dtype)
    if offset is not None:
        offset = _checks.real_array("offset", offset).astype(dtype)
        _checks.has_shape("offset", offset, shape, "(examples, classes)")
    return sample_weight, offset


@partial(jax.jit, static_argnames=("num_classes", "fit_bias", "solver"))
@_precise
@_partitioned
def _fit(
    features: Array,
    labels: Array,
    l2: Array,
    sample_weight: Array | None,
    offset: Array | None,
    init: Params | None,
    tol: Array,
    max_iter: Array,
    *,
    num_classes: int,
    fit_bias: bool,
    solver: str,
) -> Fit:
    classes = present_classes(labels, sample_weight, num_classes)
    problem = make_problem(
        features, labels, l2=l2, sample_weight=sample_weight, offset=offset, classes=classes
    )
    dtype = problem.share.dtype
    if init is None:
        init = Params(
            weights=jnp.zeros((num_classes, features.shape[1]), dtype),
            bias=jnp.zeros(num_classes, dtype),
        )
    else:
        # A class absent from the fit that gave `init` has bias -inf there, and may be present here.
        finite = jnp.where(init.bias == -jnp.inf, 0, init.bias)
        init = init._replace(bias=finite if fit_bias else jnp.zeros_like(finite))
        init = centred(init, classes)
    result = _optimum(fit_bias, solver, problem, init, tol, max_iter)
    weights, bias = centred(result.params, classes) if solver == "lbfgs" else result.params
    poison = jnp.where(result.status == Status.DIVERGED, jnp.nan, 0).astype(dtype)
    params = Params(weights + poison, jnp.where(classes, bias, -jnp.inf) + poison)
    return result._replace(params=params, gap=result.gap + poison)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _optimum(
    fit_bias: bool, solver: str, problem: Problem, init: Params, tol: Array, max_iter: Array
) -> Fit:
    if solver == "lbfgs":
        fit = lbfgs(
            lambda params: objective(params, problem, fit_bias=fit_bias),
            lambda params: certify(params, problem, fit_bias=fit_bias, tol=tol),
            init,
            tol=tol,
            max_iter=max_iter,
        )
        separable = separates(fit.objective, problem)
        return fit._replace(status=jnp.where(separable, Status.SEPARABLE, fit.status))
    return newton_cg(problem, init, fit_bias=fit_bias, tol=tol, max_iter=max_iter)[0]


@_optimum.defjvp
@_precise
def _optimum_jvp(fit_bias: bool, solver: str, primals: Any, tangents: Any) -> tuple[Fit, Fit]:
    """At the optimum the gradient g is 0 whatever the problem: H dW = -dg, with dg at fixed W."""
    problem = primals[0]
    fit = _optimum(fit_bias, solver, *primals)

    def at_fixed_params(problem: Problem) -> tuple[Array, Params]:
        return value_and_gradient(fit.params, problem)

    _, (change, gradient) = jax.jvp(at_fixed_params, (problem,), (tangents[0],))
    right = jax.tree.map(jnp.negative, gradient)
    nothing = jax.tree.map(lambda v: np.zeros(v.shape, jax.dtypes.float0), fit)
    return fit, nothing._replace(
        params=solve_hessian(fit.params, problem, right, fit_bias=fit_bias),
        objective=change,
        gap=jnp.zeros_like(fit.gap),
        gradient_norm=jnp.zeros_like(fit.gradient_norm),
    )


def diverging_weights(
    params: Params,
    features: Shaped[ArrayLike, "examples features"],
    labels: Shaped[ArrayLike, "examples *classes"],
    *,
    sample_weight: Shaped[ArrayLike, " examples"] | None = None,
    offset: Shaped[ArrayLike, "examples classes"] | None = None,
    fit_bias: bool = True,
) -> Params:
    r"""Which parameters of a fit without penalty have no finite optimum.

    Where some columns separate classes, wholly or for a part of the examples, the loss falls for
    ever as their weights grow: like :math:`e^{-t}`, so that every Newton step is the same again,
    while the steps of all other weights vanish. This takes one Newton step from a fit, and names
    what moves.

    Args:
      params: of a fit with `l2=0`.
      features: (examples, features), those of the fit.
      labels: those of the fit.
      sample_weight: that of the fit.
      offset: that of the fit.
      fit_bias: as in the fit.

    Returns:
      `Params` of booleans: weights (classes, features) and bias (classes,), True where they
      diverge. `.weights.any(0)` names the columns and `.weights.any(1)` the classes.

    Raises:
      TypeError: `params` is no `Params`, an array is not real, or `labels` is boolean or floating
        without a class axis.
      ValueError: a shape does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import Status, diverging_weights, fit
      >>> features = jnp.array([[1.0, 1.0], [1.0, -1.0], [3.0, 1.0], [3.0, -1.0]])
      >>> labels = jnp.array([0, 0, 1, 1])
      >>> result = fit(features, labels, num_classes=2, l2=0.0)
      >>> Status(int(result.status)).name
      'SEPARABLE'
      >>> print(diverging_weights(result.params, features, labels).weights.any(0))
      [ True False]

    Reference:
      Albert, Anderson (1984), On the existence of maximum likelihood estimates in logistic
      regression models.
    """
    if not isinstance(params, Params):
        raise TypeError(f"params must be a Params, got a {type(params).__name__}")
    num_classes, width = params.weights.shape
    features, labels = _checks.examples(features, labels, num_classes, width)
    dtype = params.weights.dtype
    sample_weight, offset = _weights_and_offset(
        sample_weight, offset, (features.shape[0], num_classes), dtype
    )
    problem = make_problem(
        features.astype(dtype),
        labels,
        l2=jnp.zeros((), dtype),
        sample_weight=sample_weight,
        offset=offset,
        classes=present_classes(labels, sample_weight, num_classes),
    )
    return _diverging(params, problem, fit_bias=fit_bias)


@partial(jax.jit, static_argnames="fit_bias")
@_precise
@_partitioned
def _diverging(params: Params, problem: Problem, *, fit_bias: bool) -> Params:
    params = params._replace(bias=jnp.where(params.bias == -jnp.inf, 0, params.bias))
    _, gradient = value_and_gradient(params, problem)
    right = jax.tree.map(jnp.negative, gradient)
    step = solve_hessian(params, problem, right, fit_bias=fit_bias)
    mean = problem.share @ problem.features
    spread = problem.share @ jnp.abs(problem.features - mean)
    # Of the logits, which of a separated example move by about 1.
    moves = Params(jnp.abs(step.weights) * spread, jnp.abs(step.bias + step.weights @ mean))
    largest = jnp.maximum(moves.weights.max(), moves.bias.max())
    return jax.tree.map(lambda move: (move > 0.1 * largest) & (largest > 0.1), moves)
