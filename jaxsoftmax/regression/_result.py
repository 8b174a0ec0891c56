"""The result that all solvers of softmax regression share."""

import enum
from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Int

from jaxsoftmax.regression._params import Params


class Status(enum.IntEnum):
    """The end of a fit: `Status(int(fit.status)).name`."""

    CONVERGED = 0  # the gap is at most tol
    STALLED = 1  # the precision of the dtype allows no more progress; the gap says how far it came
    MAX_ITER = 2  # max_iter iterations did not bring the gap to tol
    DIVERGED = 3  # the objective is not finite; the parameters are NaN
    SEPARABLE = 4  # l2 is 0 and the classes are separated: no finite parameters are optimal


class Fit(NamedTuple):
    """Result of a fit, a pytree; under vmap every field has the leading axes of the problems.

    Attributes:
      params: weights (classes, features) and bias (classes,).
      objective: mean loss plus penalty, in nats per example.
      gap: bound on (objective - minimum) / objective, the duality gap of the parameters; inf where
        none is known. Where l2 = 0 it holds if an optimum lies within 100 of the parameters, plus
        the range of the offsets and twice the largest coefficient, in columns of mean 0 and mean
        deviation 1.
      gradient_norm: 2-norm of the objective's gradient.
      iterations: iterations of the solver.
      status: a `Status`.
    """

    params: Params
    objective: Float[Array, "*problems"]
    gap: Float[Array, "*problems"]
    gradient_norm: Float[Array, "*problems"]
    iterations: Int[Array, "*problems"]
    status: Int[Array, "*problems"]
