"""The grid of folds and penalties of `SoftmaxRegressionCV`: its entries, splits and scores."""

import reprlib
from collections.abc import Callable
from inspect import signature
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np
from sklearn.metrics import get_scorer, make_scorer

from jaxsoftmax._progress import progress_bar
from jaxsoftmax.estimator._conversions import Numbers
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._result import Fit
from jaxsoftmax.regression._validation import Scores

_TICKS = 8  # of a progress bar, at most: each begins its part of the path anew


class Grid(NamedTuple):
    """Fits with axes (folds + 1, Cs), the last those of all examples; scores (folds, Cs)."""

    fits: Fit
    scores: Scores


def strengths(Cs: Any) -> Numbers:
    """`Cs` as numbers."""
    if isinstance(Cs, Integral):
        return np.logspace(-4, 4, int(Cs))
    values = np.asarray(Cs, np.float64)
    if values.ndim != 1 or not values.size or not (values > 0).all():
        raise ValueError(
            f"Cs must be a number of values or a sequence of some above 0, got {reprlib.repr(Cs)}"
        )
    return values


def split_masks(splits: list[Any], counts: Numbers, weight: Numbers) -> Numbers:
    """Splits as masks (folds, examples): 1 held out, 0 fitted, -1 neither.

    `counts` are weights in scores, `weight` those in fits.
    """
    rows = np.arange(len(counts))
    masks = np.full((len(splits), len(rows)), -1, np.int8)
    for fold, (mask, (fitted, held_out)) in enumerate(zip(masks, splits, strict=True)):
        mask[fitted], mask[held_out] = 0, 1
        for chosen, value, of, verb in (
            (fitted, 0, weight, "fit"),
            (held_out, 1, counts, "hold out"),
        ):
            if (mask == value).sum() < len(rows[chosen]):
                raise ValueError(
                    f"Fold {fold} of cv must {verb} an example once, and not fit what it holds "
                    "out; for more weight, use sample_weight."
                )
            if not of[mask == value].any():
                raise ValueError(f"Fold {fold} of cv must {verb} an example of positive weight.")
    return masks


def scorer_of(scoring: Any, classes: Numbers) -> Any:
    """A scorer, told of all classes where it asks, since a fold may lack some."""
    scorer = get_scorer(scoring)
    function = getattr(scorer, "_score_func", None)
    takes = signature(function).parameters if function else {}
    if "labels" not in takes:
        return scorer
    known = {"labels": classes}
    if "pos_label" in takes and len(classes) == 2:
        known["pos_label"] = classes[1]
    return make_scorer(
        function,
        greater_is_better=scorer._sign > 0,
        response_method=scorer._response_method,
        **known | scorer._kwargs,
    )


def relative(weights: Numbers) -> Numbers:
    """In units of the largest of each row, so that float32 holds them."""
    return weights / weights.max(1, keepdims=True)


def in_parts(run: Callable[[Numbers], Grid], l2s: Numbers) -> Grid:
    """`run` on parts of the path of one size, from strong to weak penalties, with a bar."""
    order = np.argsort(-l2s[-1])
    size = -(-len(order) // _TICKS)
    whole = np.pad(order, (0, -len(order) % size), mode="edge")
    parts = []
    with progress_bar(len(whole) * len(l2s), "fit", "verbose", 0) as bar:
        for some in np.split(whole, len(whole) // size):
            parts.append(run(l2s[:, some]))
            bar.update(some.size * len(l2s))
    back = np.argsort(order)
    grid: Grid = jax.tree.map(lambda *values: np.concatenate(values, 1)[:, back], *parts)
    return grid


def averaged(folds: Params) -> Params:
    """The mean over folds, for each class over those that have seen it.

    A vector that is added to all classes changes no probability. So that it does not matter where a
    fold lacks a class, each is taken relative to the classes that all have seen.
    """
    seen = folds.bias > -np.inf
    common = seen.all(0)

    def mean(values: Any) -> Any:
        of = seen.reshape(*seen.shape, *[1] * (values.ndim - 2))
        if common.any():
            values = values - values[:, common].mean(1, keepdims=True)
        total = np.where(of, values, 0).sum(0) / np.maximum(of.sum(0), 1)
        present = of.any(0)
        centre = total.sum(0) / present.sum()
        return np.where(present, total - centre, 0)

    weights, bias = mean(folds.weights), mean(folds.bias)
    bias[~seen.any(0)] = -np.inf
    return Params(*(value.astype(folds.bias.dtype) for value in (weights, bias)))
