"""Fits along a path of penalties."""

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
from jaxsoftmax.regression._data import Arguments, make_problem
from jaxsoftmax.regression._fit import check_arguments, solve
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._plan import DEFAULT
from jaxsoftmax.regression._result import Fit
from jaxsoftmax.regression._rows import Examples, Raw
from jaxsoftmax.regression.solver._model import standard_coordinates

_MOVE = 1e-2  # of the logits under the strongest penalty of a grid
_DECADES = 8


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
    problem = make_problem(features, labels, sample_weight, num_classes=num_classes)
    tiny, largest = jnp.finfo(dtype).tiny, jnp.finfo(dtype).max
    # In units of the largest deviation, and then of the steepest gradient, or squares overflow.
    standard = standard_coordinates(features, problem.share, fit_bias=fit_bias, plan=DEFAULT)
    unit = jnp.maximum(jnp.max(standard.scale, initial=0), tiny)
    in_units = standard._replace(inverse=jnp.full_like(standard.inverse, 1 / unit))
    block = DEFAULT.block(len(features), features.shape[1], num_classes)
    rows = Examples.of(problem, Raw(features, in_units), num_classes, block)
    p = rows.target
    if not fit_bias:
        present = rows.present.astype(dtype)
        p = present / jnp.sum(present)
    gradient = rows.total(_gradient_at_shares, p)
    steepest = jnp.maximum(jnp.max(jnp.abs(gradient)), tiny)
    squares = jnp.max(rows.total(_mean_squares, gradient / steepest))
    strongest = jnp.sqrt(squares) / _MOVE * steepest * unit * unit
    # Where the features say nothing, any penalty does.
    strongest = jnp.where(squares > 0, jnp.clip(strongest, tiny, largest), 1)
    return strongest * 10 ** -jnp.linspace(0, _DECADES if num > 1 else 0, num, dtype=dtype)


def _gradient_at_shares(rows: Examples, p: Array) -> Array:
    """The gradient where every example has the probabilities p."""
    return rows.transpose(rows.share * (p - rows.targets())).at[:, :, -1].set(0)


def _mean_squares(rows: Examples, table: Array) -> Array:
    return jnp.sum(rows.share * rows.logits(table) ** 2, 2)


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
    arguments, static = check_arguments(
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
    return solve_path(arguments, **static)


def solve_path(arguments: Arguments, **static: Any) -> Fit:
    """Fits under each of the penalties `arguments.l2`."""
    return jax.vmap(lambda l2: solve(arguments._replace(l2=l2), **static))(arguments.l2)
