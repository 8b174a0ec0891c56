"""The state of problems side by side that Newton's method solves."""

from typing import NamedTuple

import numpy as np

from jaxsoftmax._runtime import Array, namespace, read
from jaxsoftmax.regression._coordinates import Coordinates
from jaxsoftmax.regression._objective import Point
from jaxsoftmax.regression._penalty import Ridge
from jaxsoftmax.regression._rows import Rows
from jaxsoftmax.regression.solver._cg import Memory

CERTIFY, SEARCH, BALANCE, PRECONDITION, AIM, DONE = range(6)  # the phases of a problem

IDLE = 2  # steps without progress after which a fit has stalled


class Model(NamedTuple):
    """Problems side by side in standard coordinates.

    Attributes:
      exact: the examples in the dtype of the problems, for objective, gradient and certificate.
      narrow: the same in float32 for products with the Hessian, if they are not computed exactly.
      coordinates: what a table means.
      penalty: the penalty of each problem.
      penalised: (problems,), whether it is above 0.
      separable: (problems or 1,), the objective below which it proves that the classes of an
        unpenalised problem are separable.
      offset_range: (problems or 1,), the largest difference between offsets of one example.
      free: (classes, problems or 1, columns), 1 for the entries of a table that can vary, else 0.
      centre: (1, problems or 1, 1), 1 / the number of present classes.
      covariance: of the columns, if the preconditioner has factors.
    """

    exact: Rows
    narrow: Rows | None
    coordinates: Coordinates
    penalty: Ridge
    penalised: Array
    separable: Array
    offset_range: Array
    free: Array
    centre: Array
    covariance: Array | None

    @property
    def fast(self) -> Rows:
        return self.exact if self.narrow is None else self.narrow

    @property
    def all_penalised(self) -> bool:
        """Whether all problems are known to be penalised."""
        return isinstance(self.penalised, np.ndarray) and bool(self.penalised.all())

    def project(self, table: Array) -> Array:
        """The part of a table that can vary: with sum 0 over the present classes.

        Adding one vector to all classes changes no probability.
        """
        free = read(self.free)
        mean = (table * free).sum(0, keepdims=True) * read(self.centre)
        return (table - mean) * free


class Limits(NamedTuple):
    """Bound on (objective - minimum) / objective, and the most accepted steps, of each problem."""

    tol: Array
    max_iter: Array


class Numbers(NamedTuple):
    """The numbers known of each problem; every field has shape (problems,).

    Attributes:
      value: the objective.
      weights_gap: the part of the duality gap that the weights have.
      gap: bound on objective - minimum, inf where none is known.
      slope: how fast the objective falls along the direction.
      size: the largest entry of the direction.
      length: the part of the direction that is tried.
      drop: the slope of the last accepted step, relative to the objective.
      idle: steps in a row without progress.
      iterations: accepted steps, -1 before the start is evaluated.
      products: products with the Hessian and evaluations.
      owed: products since the preconditioner was made; -1 before the first, if it may be coarse.
      phase: CERTIFY, SEARCH, BALANCE, AIM or DONE.
      status: a `Status`, meaningful when DONE.
    """

    value: Array
    weights_gap: Array
    gap: Array
    slope: Array
    size: Array
    length: Array
    drop: Array
    idle: Array
    iterations: Array
    products: Array
    owed: Array
    phase: Array
    status: Array

    @staticmethod
    def start(zero: Array, owed: int) -> "Numbers":
        infinite = zero + float("inf")
        known = dict.fromkeys(("value", "weights_gap", "gap", "drop"), infinite)
        known |= {"iterations": zero - 1, "owed": zero + owed, "phase": zero + SEARCH}
        return Numbers(**dict.fromkeys(Numbers._fields, zero) | known)

    def ending(self, limits: Limits) -> Array:
        """Whether the point is the last one."""
        return (self.iterations >= limits.max_iter) | (self.idle >= IDLE)

    def where(self, counts: Array, other: "Numbers") -> "Numbers":
        """These numbers of the problems that count, and others of the rest."""
        if isinstance(counts, np.ndarray):
            if counts.all():
                return self
            if not counts.any():
                return other
        xp = namespace(*self, *other, counts)
        pairs = zip(self, other, strict=True)
        return Numbers(*(xp.where(counts, a.astype(b.dtype), b) for a, b in pairs))


class State(NamedTuple):
    """The last accepted point, the direction from there, and what was learnt of the Hessian.

    In CERTIFY the direction is that of the certificate, and `moves` (classes, problems, 1) what
    `moves_of` gives.
    """

    point: Point
    direction: Array
    moves: Array
    inverse: Array
    memory: Memory
    numbers: Numbers
