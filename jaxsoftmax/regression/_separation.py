"""Parameters of an unpenalised fit without a finite optimum."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Shaped

from jaxsoftmax import _checks
from jaxsoftmax._runtime import partitioned, precise
from jaxsoftmax.regression._data import Problem, make_problem
from jaxsoftmax.regression._objective import as_they_came, evaluate, table_of
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression.solver._implicit import solve_hessian


def diverging_weights(
    params: Params,
    features: Shaped[ArrayLike, "examples features"],
    labels: Shaped[ArrayLike, "examples *classes"],
    *,
    sample_weight: Shaped[ArrayLike, " examples"] | None = None,
    offset: Shaped[ArrayLike, "examples classes"] | None = None,
    fit_bias: bool = True,
) -> Params:
    r"""Find the parameters of a fit without penalty that have no finite optimum.

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
    weights, bias = _checks.parameters(*params, prefix="params.")
    num_classes, width = weights.shape
    features, labels = _checks.examples(features, labels, num_classes, width)
    dtype = weights.dtype
    shape = (features.shape[0], num_classes)
    sample_weight, offset = _checks.weights_and_offset(sample_weight, offset, shape)
    problem = make_problem(
        features.astype(dtype), labels, sample_weight, offset, num_classes=num_classes
    )
    return _diverging(Params(weights, bias.astype(dtype)), problem, fit_bias=fit_bias)


@partial(jax.jit, static_argnames="fit_bias")
@precise
@partitioned
def _diverging(params: Params, problem: Problem, *, fit_bias: bool) -> Params:
    params = params._replace(bias=jnp.where(params.bias == -jnp.inf, 0, params.bias))
    rows, penalty = as_they_came(problem, params.bias.size, jnp.zeros((), params.bias.dtype))
    table = table_of(params)
    _, point = evaluate(rows, penalty, table)
    step = solve_hessian(table, rows, penalty, -point.gradient, fit_bias=fit_bias)
    mean = problem.share @ problem.features
    deviation = problem.share @ jnp.abs(problem.features - mean[None])
    # Of the logits, which of a separated example move by about 1.
    moves = Params(
        jnp.abs(step.weights) * deviation[None], jnp.abs(step.bias + step.weights @ mean)
    )
    largest = jnp.maximum(moves.weights.max(), moves.bias.max())
    return jax.tree.map(lambda move: (move > 0.1 * largest) & (largest > 0.1), moves)
