"""What Newton's method knows between two steps."""

from typing import NamedTuple

from jax import Array

from jaxsoftmax.regression.solver._cg import Memory


class Point(NamedTuple):
    """A table, the objective and its gradient there, and the duality gap of the weights."""

    table: Array
    value: Array
    gradient: Array
    weights_gap: Array


class Shared(NamedTuple):
    """What the iteration of problems side by side has in common.

    Attributes:
      inverse: the preconditioner.
      owed: products since it was made, those with a sample's Hessian in proportion; -1 before.
      rough: whether points were evaluated in float32, though the problem has float64.
      sampled: whether steps are taken with the Hessian of a sample of the examples.
      exact: whether products are computed in the dtype of the problem.
    """

    inverse: Array
    owed: Array
    rough: Array
    sampled: Array
    exact: Array


class State(NamedTuple):
    """A point, and what the iteration knows besides.

    Attributes:
      shared: what it shares with other problems.
      at: the point.
      gap: bound on objective - minimum there, if it is known.
      memory: directions of the last step's conjugate gradients, which correct the preconditioner.
      drop: the squared decrement of the last step, relative to the objective.
      idle: steps in a row without progress.
      polished: steps of the bias alone, in a row.
      iterations: Newton steps, -1 before the first point is evaluated.
      products: gradients and products with the Hessian so far, which read the features twice each;
        those with a sample's Hessian in proportion.
      status: a `Status`, or RUNNING.
    """

    shared: Shared
    at: Point
    gap: Array
    memory: Memory
    drop: Array
    idle: Array
    polished: Array
    iterations: Array
    products: Array
    status: Array
