"""How far a point is from the minimum of the objective: a bound that is proved, or an estimate."""

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxsoftmax.regression._data import Problem


def weights_gap(gradient: Float[Array, "classes features"], scale: Array) -> Float[Array, ""]:
    r"""The duality gap :math:`\sum_{kj} (\partial f / \partial W_{kj})^2 / (2 \lambda_j)`, with
    `scale` from `gap_scale`.

    It bounds f - min f at the optimal bias for the weights: there the residuals p - y, weighted by
    the shares, sum to 0 over the examples, and so are a feasible point of the dual problem. Where
    :math:`\lambda = 0` there is no such bound.

    Reference:
      Boyd, Vandenberghe (2004), Convex Optimization, section 5.1.6.
    """
    return jnp.sum((gradient * scale) ** 2)


def gap_scale(root: Array) -> Array:
    r""":math:`1 / \sqrt{2 \lambda_j}` from :math:`\sqrt{\lambda_j}`, 0 without a penalty."""
    penalised = root > 0
    return jnp.where(penalised, math.sqrt(0.5) / jnp.where(penalised, root, 1), 0)


def newton_gap(decrement: Array, change: Array) -> Array:
    r"""How far f may fall along a Newton step that moves logits apart by `change` = r.

    It is :math:`e^r` times `decrement`, half the squared one of the step, for the second derivative
    falls no faster than :math:`e^{-rt}`. From r = 1 on there is no such bound.

    Reference:
      Bach (2010), Self-concordant analysis for logistic regression, Electronic Journal of
      Statistics 4.
    """
    return jnp.where(change < 1, decrement * jnp.exp(jnp.minimum(change, 1)), jnp.inf)


def separates(value: Float[Array, ""], problem: Problem) -> Bool[Array, ""]:
    r"""Whether an unpenalised objective of this value proves that the classes are separable.

    Below :math:`\log(1 + e^{-r})` times the least share, with the largest range r of an example's
    offsets, every example's own class has the largest of the linear model's logits: a multiple of
    the parameters brings the objective as near to 0 as one likes, and no finite ones attain it.
    Labels that are no classes, but shares of several, are never separated.
    """
    counts = problem.share > 0
    least = jnp.min(jnp.where(counts, problem.share, jnp.inf))
    # Of a single present class the probability is 1 whatever the parameters.
    several = True if problem.classes is None else jnp.sum(problem.classes) > 1
    pure = problem.labels.ndim == 1 or jnp.all((jnp.sum(problem.labels > 0, 0) == 1) | ~counts)
    bound = jnp.log1p(jnp.exp(-_offset_range(problem)))
    return several & pure & ~jnp.any(problem.l2 > 0) & (value < bound * least)


def _offset_range(problem: Problem) -> Array:
    """The largest difference between offsets of one example that counts."""
    if problem.offset is None:
        return jnp.zeros((), problem.share.dtype)
    present = True if problem.classes is None else problem.classes[:, None]
    most = jnp.max(jnp.where(present, problem.offset, -jnp.inf), 0)
    least = jnp.min(jnp.where(present, problem.offset, jnp.inf), 0)
    return jnp.max(jnp.where(problem.share > 0, most - least, 0))
