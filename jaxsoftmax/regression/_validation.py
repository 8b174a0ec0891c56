"""Cross-validation: fits judged by examples that they have not seen."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from jaxsoftmax import _arrays, _checks
from jaxsoftmax._runtime import partitioned, precise
from jaxsoftmax.functional._stable import compute_dtype
from jaxsoftmax.regression._data import Arguments, make_problem
from jaxsoftmax.regression._fit import check_arguments
from jaxsoftmax.regression._folds import choose, fold_masks
from jaxsoftmax.regression._objective import as_they_came, losses_and_residuals, sum_over_classes
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._path import l2_grid, solve_path
from jaxsoftmax.regression._result import Fit
from jaxsoftmax.regression._rows import Examples

_LOGITS = 2**20  # of a block of examples that are scored


class CrossValidation(NamedTuple):
    """Fits and scores of a cross-validation, a pytree.

    Attributes:
      l2s: the penalties.
      path: the fits of all examples, a `Fit` with an axis of penalties.
      fold_fits: those without the held-out examples of each fold, with axes (folds, penalties).
      log_loss: mean cross-entropy of the held-out examples, in nats.
      accuracy: the fraction of them whose most probable class is theirs.
      brier: mean of the squared distance between their probabilities and their labels, 0 to 2.
      best: index of the penalty with the least log-loss, averaged over the folds; among equal ones
        the largest penalty. Where a fold holds out a class that it has not seen, that log-loss is
        infinite; here it is the mean of the other examples, and a fold that has none does not
        count.
      one_standard_error: index of the largest penalty whose mean log-loss is within one standard
        error of that.
    """

    l2s: Float[Array, "*problems penalties"]
    path: Fit
    fold_fits: Fit
    log_loss: Float[Array, "*problems folds penalties"]
    accuracy: Float[Array, "*problems folds penalties"]
    brier: Float[Array, "*problems folds penalties"]
    best: Int[Array, "*problems"]
    one_standard_error: Int[Array, "*problems"]

    def fit(self, *, one_standard_error: bool = False) -> Fit:
        """The fit of all examples under the chosen penalty."""
        index = self.one_standard_error if one_standard_error else self.best

        def chosen(values: Array) -> Array:
            axis = index.ndim  # problems come first
            one = jnp.expand_dims(index, range(axis, values.ndim))
            return jnp.take_along_axis(values, one, axis).squeeze(axis)

        result: Fit = jax.tree.map(chosen, self.path)
        return result


def cross_validate(
    features: Shaped[ArrayLike, "examples features"],
    labels: Shaped[ArrayLike, "examples *classes"],
    *,
    num_classes: int,
    l2s: Shaped[ArrayLike, " penalties"] | None = None,
    folds: int | Shaped[ArrayLike, "*folds examples"] = 5,
    sample_weight: Shaped[ArrayLike, " examples"] | None = None,
    fit_bias: bool = True,
    solver: str = "auto",
    tol: Shaped[ArrayLike, ""] = 1e-6,
    max_iter: int = 100,
) -> CrossValidation:
    """Fits under several penalties, each judged by examples that it has not seen.

    The folds are weights of 0 and 1 for the same features, of which no copy is made. They advance
    together along the path of penalties, and so does the fit of all examples: one program of
    (folds + 1) x penalties fits, each certified by itself.

    Args:
      features, labels, num_classes, fit_bias, solver, tol, max_iter: as in `fit`.
      l2s: (penalties,), at least 0, in any order. None for those of `l2_grid`.
      folds: number of folds, as made by `stratified_folds`; or integers (examples,), the fold that
        holds out each example, -1 for none; or masks (folds, examples): 1 for an example that is
        held out, 0 for one that is fitted, -1 for neither.
      sample_weight: (examples,), not negative; counts in fits and scores. None for 1.

    Returns:
      A `CrossValidation`.

    Raises:
      TypeError, ValueError: as in `fit`; or `l2s` has not rank 1 or no entry; or `folds` is below
        2 or above the number of examples, has another shape or other values, are integers that are
        traced, whose number is then unknown, or a fold holds out, or fits, no example of positive
        weight.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import cross_validate
      >>> features = jnp.array([0, 4, 1, 3, 2, 5, 9, 5, 8, 4, 7, 6.0])[:, None]
      >>> labels = jnp.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
      >>> result = cross_validate(
      ...     features, labels, num_classes=2, l2s=jnp.array([10.0, 0.1]), folds=3
      ... )
      >>> result.log_loss.shape
      (3, 2)
      >>> print(result.l2s[result.best])
      0.1
      >>> result.fit().params.weights.shape
      (2, 1)

    Reference:
      Hastie, Tibshirani, Friedman (2009), The Elements of Statistical Learning, section 7.10.
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
        offset=None,
        init=None,
        fit_bias=fit_bias,
        solver=solver,
        tol=tol,
        max_iter=max_iter,
    )
    masks = fold_masks(folds, arguments.labels, arguments.sample_weight)
    return _cross_validated(arguments, masks, **static)


class Scores(NamedTuple):
    """Means over held-out examples; `known_log_loss` is that of those with a finite one, and
    infinite if there are none."""

    log_loss: Array
    known_log_loss: Array
    accuracy: Array
    brier: Array


@partitioned
def validate(
    arguments: Arguments, l2s: Array, fitted: Array, held_out: Array, **static: Any
) -> tuple[Fit, Scores]:
    """Fits with weights `fitted` (fits, examples) under `l2s` (fits, penalties), and scores of the
    first of them with weights `held_out` (folds, examples)."""

    def fit(weight: Array, l2: Array) -> Fit:
        return solve_path(arguments._replace(sample_weight=weight, l2=l2), **static)

    fits = jax.vmap(fit)(fitted, l2s)
    scores = _score_folds(
        arguments.features, arguments.labels, held_out, fits.params, static["num_classes"]
    )
    return fits, scores


@partitioned
def _cross_validated(arguments: Arguments, masks: Array, **static: Any) -> CrossValidation:
    """`cross_validate` of checked arguments. The last of the fits is that of all examples."""
    fitted, held_out, l2s = _fold_weights(arguments, masks)
    fits, scores = validate(arguments, l2s, fitted, held_out, **static)
    arrays = l2s, fits, scores
    known = jax.tree.map(_arrays.known, arrays)
    if len(jax.tree.leaves(known)) < len(jax.tree.leaves(arrays)):
        return jax.jit(_chosen_and_packed)(*arrays)
    return jax.device_put(_chosen_and_packed(*known))


@jax.jit
def _fold_weights(arguments: Arguments, masks: Array) -> tuple[Array, Array, Array]:
    """Weights in fits and in scores, and the penalties of each fit."""
    dtype = compute_dtype(arguments.features.dtype)
    weight = arguments.sample_weight
    weight = jnp.ones(masks.shape[1], dtype) if weight is None else weight
    fitted = jnp.concatenate([jnp.where(masks == 0, weight[None], 0), weight[None]])
    held_out = jnp.where(masks == 1, weight[None], 0)
    l2s = arguments.l2.astype(dtype)
    return fitted, held_out, jnp.broadcast_to(l2s[None], (len(fitted), l2s.size))


def _chosen_and_packed(l2s: Any, fits: Fit, scores: Scores) -> CrossValidation:
    losses = scores.known_log_loss
    best, one_standard_error = choose(losses, l2s[0], float(jnp.finfo(losses.dtype).eps))
    return CrossValidation(
        l2s=l2s[0],
        path=jax.tree.map(lambda values: values[-1], fits),
        fold_fits=jax.tree.map(lambda values: values[:-1], fits),
        log_loss=scores.log_loss,
        accuracy=scores.accuracy,
        brier=scores.brier,
        best=best,
        one_standard_error=one_standard_error,
    )


@partial(jax.jit, static_argnums=4)
@precise
def _score_folds(
    features: Array, labels: Array, held_out: Array, params: Params, num_classes: int
) -> Scores:
    """Scores (folds, penalties) of parameters (folds or more, penalties, ...)."""
    dtype = params.bias.dtype
    count = params.bias.shape[1]

    def of_fold(fold: tuple[Array, Params]) -> Scores:
        weight, params = fold
        problem = make_problem(features, labels, weight, num_classes=num_classes)
        rows, _ = as_they_came(problem, num_classes, jnp.zeros((), dtype))
        # A class without examples in this fold has a probability all the same.
        block = max(_LOGITS // (num_classes * count), 1)
        rows = replace(rows, block=block, target=jnp.ones_like(rows.target))
        table = jnp.concatenate([params.weights, params.bias[..., None]], 2)
        scores, share = rows.total(_score_sums, jnp.moveaxis(table, 1, 0))
        known = scores.known_log_loss / jnp.where(share > 0, share, 1)
        return scores._replace(known_log_loss=jnp.where(share > 0, known, jnp.inf))

    folds = jax.tree.map(lambda values: values[: len(held_out)], params)
    return lax.map(of_fold, (held_out, folds))


def _score_sums(rows: Examples, table: Array) -> tuple[Scores, Array]:
    """Sums (problems,) over the examples, and the share of those with a finite loss."""
    logits = rows.logits(table)
    losses, residuals, _ = losses_and_residuals(logits, rows.labels)
    known = losses != jnp.inf
    labels = jnp.argmax(rows.labels, 0)[None] if rows.probability_labels else rows.labels
    right = (jnp.argmax(logits, 0)[None].astype(labels.dtype) == labels).astype(losses.dtype)
    values = jnp.stack(
        (
            losses,
            jnp.where(known, losses, 0),
            # The largest of NaN is the first, which is no answer.
            jnp.where(jnp.isnan(losses), losses, right),
            sum_over_classes(residuals, residuals)[None],
            known.astype(losses.dtype),
        )
    )
    *sums, share = jnp.sum(jnp.where(rows.share == 0, 0, rows.share[None] * values), (1, 3))
    return Scores(*sums), share
