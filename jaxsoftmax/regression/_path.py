"""Fits along a path of penalties."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from jaxsoftmax import _checks
from jaxsoftmax._runtime import partitioned, precise
from jaxsoftmax.functional._stable import compute_dtype
from jaxsoftmax.regression._data import Problem, make_problem, probabilities, sum_over_rows
from jaxsoftmax.regression._fit import checked, solved
from jaxsoftmax.regression._objective import Params
from jaxsoftmax.regression.solver._lbfgs import Fit

_MOVE = 1e-2  # of the logits under the strongest penalty of a grid
_DECADES = 8
_LOGITS = 2**20  # of a block of examples


def l2_grid(
    features: Shaped[ArrayLike, "examples features"],
    labels: Shaped[ArrayLike, "examples *classes"],
    *,
    num_classes: int,
    num: int = 25,
    sample_weight: Shaped[ArrayLike, " examples"] | None = None,
    fit_bias: bool = True,
) -> Float[Array, " penalties"]:
    r"""Penalties from one that leaves little but the bias down to a hundred-millionth of it.

    Under a large penalty :math:`\lambda` the weights are :math:`-\nabla f / \lambda` with the
    gradient at weights 0 and the optimal bias, or without one at 0. The first penalty is the one
    under which they move no class' logits by more than 0.01 in root mean square. The others follow
    in equal steps of :math:`\log \lambda`, three to the decade by default.

    Args:
      features: (examples, features), real.
      labels: integer classes (examples,), or probabilities (examples, classes).
      num_classes: number of classes, at least 2.
      num: how many penalties, at least 1.
      sample_weight: (examples,), not negative. None for 1.
      fit_bias: whether the fits have a bias.

    Returns:
      The penalties, decreasing.

    Raises:
      TypeError, ValueError: as in `fit`; or `num` is no integer of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import l2_grid
      >>> features = jnp.array([[0.0], [1.0], [2.0], [3.0]])
      >>> l2s = l2_grid(features, jnp.array([0, 1, 0, 1]), num_classes=2, num=3)
      >>> print([f"{l2:.1e}" for l2 in l2s])
      ['2.8e+01', '2.8e-03', '2.8e-07']
    """
    num = _checks.integer("num", num, least=1)
    num_classes = _checks.integer("num_classes", num_classes, least=2)
    fit_bias = _checks.boolean("fit_bias", fit_bias)
    features, labels = _checks.examples(features, labels, num_classes)
    shape = (features.shape[0], num_classes)
    sample_weight, _ = _checks.weights_and_offset(sample_weight, None, shape)
    return _l2_grid(
        features, labels, sample_weight, num_classes=num_classes, num=num, fit_bias=fit_bias
    )


@partial(jax.jit, static_argnames=("num_classes", "num", "fit_bias"))
@precise
@partitioned
def _l2_grid(
    features: Array,
    labels: Array,
    sample_weight: Array | None,
    *,
    num_classes: int,
    num: int,
    fit_bias: bool,
) -> Array:
    dtype = compute_dtype(features.dtype)
    problem = make_problem(
        features,
        labels,
        l2=jnp.zeros((), dtype),
        sample_weight=sample_weight,
        num_classes=num_classes,
    )
    size = max(_LOGITS // num_classes, 1)
    tiny, most = jnp.finfo(dtype).tiny, jnp.finfo(dtype).max

    def summed(of_rows: Callable[[Problem], Array]) -> Array:
        return sum_over_rows(of_rows, problem, size)

    if fit_bias:
        p = summed(lambda rows: probabilities(rows, num_classes) @ rows.share)
        mean = problem.share @ features.astype(dtype)
    else:
        assert problem.classes is not None
        present = problem.classes.astype(dtype)
        p = present / jnp.sum(present)
        mean = jnp.zeros(features.shape[1], dtype)
    # In units of the largest entry, and then of the largest gradient, lest squares overflow.
    unit = jnp.maximum(jnp.max(jnp.abs(features.astype(dtype) - mean), initial=0), tiny)

    def columns(rows: Problem) -> Array:
        return (rows.features.astype(dtype) - mean) / unit

    def of_weights(rows: Problem) -> Array:
        residuals = rows.share * (probabilities(rows, num_classes) - p[:, None])
        return residuals @ columns(rows)

    gradient = summed(of_weights)
    steepest = jnp.maximum(jnp.max(jnp.abs(gradient), initial=0), tiny)
    squares = summed(lambda rows: (gradient / steepest @ columns(rows).T) ** 2 @ rows.share)
    largest = jnp.sqrt(jnp.max(squares)) / _MOVE * steepest * unit * unit
    # Where the features say nothing, any penalty does.
    largest = jnp.where(jnp.max(squares) > 0, jnp.clip(largest, tiny, most), 1)
    return largest * 10 ** -jnp.linspace(0, _DECADES if num > 1 else 0, num, dtype=dtype)


def fit_path(
    features: Shaped[ArrayLike, "examples features"],
    labels: Shaped[ArrayLike, "examples *classes"],
    *,
    num_classes: int,
    l2s: Shaped[ArrayLike, " penalties"] | None = None,
    sample_weight: Shaped[ArrayLike, " examples"] | None = None,
    offset: Shaped[ArrayLike, "examples classes"] | None = None,
    init: Params | None = None,
    fit_bias: bool = True,
    solver: str = "auto",
    tol: Shaped[ArrayLike, ""] = 1e-6,
    max_iter: int = 100,
) -> Fit:
    """Softmax regressions under several penalties.

    It is `jax.vmap` of `fit` over `l2`: one compiled program, in which each fit starts where the
    fits under stronger penalties point to, and is certified by itself. As `fit` it works under
    `jit` and `vmap`, and can be differentiated.

    Args:
      features, labels, num_classes, sample_weight, offset, init, fit_bias, solver, tol, max_iter:
        as in `fit`.
      l2s: (penalties,), at least 0, in any order. None for those of `l2_grid`.

    Returns:
      A `Fit` whose every field has a leading axis of penalties, in the order of `l2s`.

    Raises:
      TypeError, ValueError: as in `fit`; or `l2s` has not rank 1 or no entry.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import fit_path
      >>> features = jnp.array([[0.0], [1.0], [2.0], [3.0]])
      >>> path = fit_path(
      ...     features, jnp.array([0, 1, 0, 1]), num_classes=2, l2s=jnp.array([1.0, 0.1, 0.01])
      ... )
      >>> path.params.weights.shape
      (3, 2, 1)
      >>> print([f"{objective:.3f}" for objective in path.objective])
      ['0.655', '0.604', '0.589']

    Reference:
      Friedman, Hastie, Tibshirani (2010), Regularization paths for generalized linear models via
      coordinate descent, Journal of Statistical Software 33, section 2.5.
    """
    if l2s is None:
        l2s = l2_grid(
            features,
            labels,
            num_classes=num_classes,
            sample_weight=sample_weight,
            fit_bias=fit_bias,
        )
    arrays, static = checked(
        features,
        labels,
        num_classes=num_classes,
        l2=_checks.penalties("l2s", l2s),
        sample_weight=sample_weight,
        offset=offset,
        init=init,
        fit_bias=fit_bias,
        solver=solver,
        tol=tol,
        max_iter=max_iter,
    )
    return _fit_path(*arrays, **static)


@partial(jax.jit, static_argnames=("num_classes", "fit_bias", "solver"))
@partitioned
def _fit_path(features: Array, labels: Array, l2s: Array, *others: Any, **static: Any) -> Fit:
    return jax.vmap(lambda l2: solved(features, labels, l2, *others, **static))(l2s)
