"""The data of one objective."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from jaxsoftmax import _checks
from jaxsoftmax._runtime import Array
from jaxsoftmax.functional._stable import compute_dtype
from jaxsoftmax.regression._params import Params


class Arguments(NamedTuple):
    """The array arguments of a fit, checked: a pytree in which problems side by side may have a
    leading axis."""

    features: Shaped[Array, "examples features"]
    labels: Shaped[Array, "examples *classes"]
    l2: Shaped[Array, ""]
    sample_weight: Shaped[Array, " examples"] | None
    offset: Shaped[Array, "examples classes"] | None
    init: Params | None
    tol: Shaped[Array, ""]
    max_iter: Int[Array, ""]


class Problem(NamedTuple):
    """The data of one objective, a pytree; made by `make_problem`.

    Arrays of examples and classes have the classes first: sums over a few classes are then sums of
    long rows.
    """

    features: Float[Array, "examples features"]
    labels: Shaped[Array, "*classes examples"]
    share: Float[Array, " examples"]
    offset: Float[Array, "classes examples"] | None


def make_problem(
    features: Array,
    labels: Array,
    sample_weight: Array | None = None,
    offset: Array | None = None,
    *,
    num_classes: int,
) -> Problem:
    """A problem from checked arrays.

    Values that no one can check under jit make the objective NaN here: a negative weight, or a
    label that is no class of `num_classes`, or as probabilities negative or not of sum 1.
    """
    dtype = compute_dtype(features.dtype)
    # A dropped example may have any label. The label in its place does not depend on the weights,
    # so that problems which differ in weights share their labels.
    if labels.ndim == 2:
        valid = _checks.are_probabilities(labels)
        labels = jnp.where(valid[:, None], labels, 0).astype(dtype).T
    else:
        largest = min(num_classes - 1, jnp.iinfo(labels.dtype).max)  # that the dtype can hold
        valid = (labels >= 0) & (labels <= largest)
        labels = jnp.where(valid, labels, 0).astype(jnp.int32)
    if sample_weight is None:
        share = jnp.where(valid, jnp.asarray(1 / features.shape[0], dtype), jnp.nan)
    else:
        share = jnp.where(sample_weight < 0, jnp.nan, sample_weight)
        wider = max(share.dtype, dtype, key=lambda one: jnp.finfo(one).bits)
        share = share.astype(wider)
        # In units of the largest, or the sum could overflow or underflow.
        share = (share / share.max()).astype(dtype)
        share = jnp.where(valid | (share == 0), share, jnp.nan)
        share = share / share.sum()
    return Problem(
        features=features,
        labels=labels,
        share=share,
        offset=None if offset is None else offset.astype(dtype).T,
    )


def problem_of(arguments: Arguments, *, num_classes: int) -> Problem:
    """The problem that the arguments of a fit describe."""
    return make_problem(
        arguments.features,
        arguments.labels,
        arguments.sample_weight,
        arguments.offset,
        num_classes=num_classes,
    )
