"""What fits of the same features share: coordinates, copies of the columns, their covariance."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxsoftmax.regression._data import Problem, thinned
from jaxsoftmax.regression._objective import in_blocks
from jaxsoftmax.regression.solver import _coordinates, _preconditioner
from jaxsoftmax.regression.solver._coordinates import RowSpace, View
from jaxsoftmax.regression.solver._preconditioner import Plan

FAST = jnp.float32  # the dtype of products with the Hessian and of the preconditioner


class Frame(NamedTuple):
    """What problems of the same features share.

    Attributes:
      rows: the space of the rows, if there are fewer of them than columns.
      view: the coordinates, and the problem that they are of.
      columns: the features in standard coordinates.
      sample: those of a sample.
      mean: the covariance of the columns, if a preconditioner wants it.
    """

    rows: RowSpace | None
    view: View
    columns: Array
    sample: Array | None
    mean: Array | None


def frame(problem: Problem, classes: int, *, fit_bias: bool, sharing: int = 1) -> Frame:
    """That of a problem and of others with the same features, whatever their penalties."""
    problem = problem._replace(l2=jnp.zeros((), problem.share.dtype))
    rows = None
    if problem.features.shape[1] > problem.features.shape[0]:
        rows, problem = _coordinates.row_space(problem, centre=fit_bias)
    view = _coordinates.view(problem, centre=fit_bias)
    fast = _coordinates.standard(view, _coordinates.standard_columns(view, FAST)).problem
    plan = plan_of(fast, classes, sharing)
    sample = thinned(fast, plan.stride) if plan.stride > 1 else None
    return Frame(
        rows=rows,
        view=view,
        columns=fast.features,
        sample=None if sample is None else sample.features,
        mean=_preconditioner.covariance(sample or fast) if plan.groups else None,
    )


def plan_of(problem: Problem, classes: int, sharing: int = 1) -> Plan:
    """What suits problems of this shape, so many of which share a preconditioner."""
    kept = not in_blocks(classes, problem)
    examples, width = problem.features.shape
    return _preconditioner.plan(examples, width, classes, kept=kept, sharing=sharing)
