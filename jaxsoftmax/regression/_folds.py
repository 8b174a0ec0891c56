"""Folds of cross-validation, and the choice of a penalty by what they say."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int, Shaped

from jaxsoftmax import _arrays, _checks
from jaxsoftmax._runtime import Array, namespace

_TIE = 64  # units of rounding within which means are equal


def stratified_folds(
    labels: Shaped[ArrayLike, "examples *classes"],
    num_folds: int,
    *,
    key: jax.Array | None = None,
) -> Int[jax.Array, " examples"]:
    """Folds of nearly equal size, overall and within each class.

    Args:
      labels: integer classes (examples,), or probabilities (examples, classes), of which the
        largest counts.
      num_folds: how many folds, at least 2.
      key: a `jax.random.key` to shuffle the examples; without one, each fold holds out examples of
        a class that follow each other.

    Returns:
      Integers (examples,) from 0 to `num_folds` - 1, the fold that holds out each example.

    Raises:
      TypeError: `labels` are no classes and no probabilities, or `num_folds` is no integer.
      ValueError: `num_folds` is below 2, or `labels` have another rank.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import stratified_folds
      >>> print(stratified_folds(jnp.array([0, 0, 0, 0, 1, 1, 1, 1]), 2))
      [0 0 1 1 0 0 1 1]
    """
    num_folds = _checks.integer("num_folds", num_folds, least=2)
    classes = _arrays.label_array(labels)
    if classes.ndim not in (1, 2):
        raise ValueError(
            f"labels must have shape (examples,) or (examples, classes), got shape {classes.shape}"
        )
    if not _checks.class_labels(classes, classes.shape[:1], "(examples,)"):
        classes = jnp.argmax(classes, 1)
    count = len(classes)
    known = _arrays.known(classes) if key is None else None
    xp: Any = jnp if known is None else np  # of which NumPy has nothing to compile
    of: Any = classes if known is None else known
    shuffled = xp.arange(count) if key is None else jax.random.permutation(key, count)
    of = of[shuffled]
    # Sorted by class, every num_folds-th example is of the same fold; within a class the same
    # folds are then given out in order.
    by_class = xp.argsort(of, stable=True)
    turns = xp.arange(count, dtype=np.int32) % num_folds
    ordered = turns[xp.lexsort((turns, of[by_class]))]
    return jnp.asarray(ordered[xp.argsort(shuffled[by_class])])


def fold_masks(
    folds: int | ArrayLike, labels: Array, sample_weight: Array | None
) -> Shaped[Array, "folds examples"]:
    """1 for examples that a fold holds out, 0 for those that it fits, -1 for neither."""
    examples = labels.shape[0]
    folds = _arrays.as_jax_takes_it("folds", folds)
    rank = np.ndim(folds)
    if rank == 0:
        count = _checks.integer("folds", cast(int, folds), least=2)
        if count > examples:
            raise ValueError(f"folds must be at most the {examples} examples, got {count}")
        masks = _members(stratified_folds(labels, count), count)
    elif rank == 1:
        ids = _arrays.known(folds)
        if ids is None:
            raise TypeError(
                "folds as integers (examples,) must be known to the trace, since their number is a "
                "shape; give masks (folds, examples)"
            )
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"folds of rank 1 must be integers, got dtype {ids.dtype}")
        _checks.has_shape("folds", jnp.asarray(ids), (examples,), "(examples,)")
        if ids.min() < -1 or ids.max() < 1:
            raise ValueError(
                "folds must be -1 or a fold from 0 on, of which there are at least 2, "
                f"got values from {ids.min()} to {ids.max()}"
            )
        masks = _members(jnp.asarray(ids), int(ids.max()) + 1)
    else:
        masks = _arrays.array("folds", folds)
        if masks.dtype == jnp.bool_:
            masks = masks.astype(jnp.int8)
        if masks.ndim != 2 or masks.shape[0] == 0 or masks.shape[1] != examples:
            raise ValueError(
                f"folds must have shape (folds, examples) = (folds, {examples}), "
                f"got shape {masks.shape}"
            )
    if (values := _arrays.known(masks)) is not None:
        if not np.isin(values, (-1, 0, 1)).all():
            raise ValueError("folds as masks must be 1 (held out), 0 (fitted) or -1 (neither)")
        counts = _arrays.known(jnp.ones(examples) if sample_weight is None else sample_weight)
        for value, verb in ((1, "holds out"), (0, "fits")):
            if counts is None or (some := ((values == value) & (counts > 0)).any(1)).all():
                continue
            raise ValueError(
                f"every fold must hold out and fit examples of positive weight; fold "
                f"{some.argmin()} {verb} none"
            )
    return masks


def _members(ids: Array, count: int) -> Array:
    known = _arrays.known(ids)
    ids = ids if known is None else known  # of which NumPy has nothing to compile
    xp = namespace(ids)
    return jnp.asarray((ids == xp.arange(count, dtype=ids.dtype)[:, None]).astype("int8"))


@np.errstate(invalid="ignore")  # of infinite losses
def choose(losses: Array, strengths: Array, eps: float) -> tuple[Any, Any]:
    """The penalty of the least mean loss, and the strongest one within a standard error of it.

    Among equal means the strongest penalty is chosen. A mean of NaN is the largest, and a fold
    whose losses are all infinite does not count.

    Args:
      losses: (folds, penalties).
      strengths: (penalties,), not negative.
      eps: of the dtype in which the losses were computed.

    Returns:
      The indices of both.
    """
    xp = namespace(losses, strengths)
    counts = (losses != float("inf")).any(1, keepdims=True)
    count = xp.maximum(counts.sum(), 1).astype(losses.dtype)
    mean = xp.where(counts, losses, 0).sum(0) / count
    mean = xp.where(xp.isnan(mean), float("inf"), mean)
    best = mean.argmin()
    variance = xp.where(counts[:, 0], (losses[:, best] - mean[best]) ** 2, 0).sum()
    error = xp.sqrt(variance / xp.maximum(count - 1, 1) / count)
    finite = xp.isfinite(mean[best])
    equal = mean[best] + xp.where(finite, _TIE * eps * abs(mean[best]), 0)
    error = xp.where(finite, error, 0)

    def strongest(most: Any) -> Any:
        return xp.where(mean <= most, strengths, -1).argmax()

    return strongest(equal), strongest(equal + error)
