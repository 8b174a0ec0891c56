r"""The objective of softmax regression: its value, gradient and Hessian.

.. math:: f(W, b) = \sum_i c_i\, \ell(W x_i + b + o_i,\; y_i) + \tfrac{\lambda}{2} \|W\|^2,
          \qquad \sum_i c_i = 1

with the cross-entropy :math:`\ell`, examples x (rows of `features`), labels y, shares c (normalised
`sample_weight`), offsets o and the penalty :math:`\lambda` (`l2`). The bias is not penalised.

Shapes: `features` (examples, features), `weights` (classes, features), `bias` (classes,), `labels`
(examples,) integers or (examples, classes) probabilities, `sample_weight` (examples,), `offset`
(examples, classes).

Values and derivatives of the loss stand only here.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _checks
from jaxsoftmax.functional import softmax
from jaxsoftmax.losses import cross_entropy
from jaxsoftmax.regression._data import Problem, map_rows, sum_over_rows


class Params(NamedTuple):
    """Parameters of a linear softmax model, a pytree."""

    weights: Float[Array, "*problems classes features"]
    bias: Float[Array, "*problems classes"]


def linear_logits(
    params: Params, features: Shaped[ArrayLike, "*batch features"]
) -> Float[Array, "*batch classes"]:
    r"""Logits of a linear model, :math:`z = W x + b`.

    Args:
      params: weights (classes, features) and bias (classes,), real.
      features: (..., features), real; cast to the dtype of the weights.

    Returns:
      Logits (..., classes) in the dtype of the weights; `softmax` of them gives the class
      probabilities.

    Raises:
      TypeError: `features`, the weights or the bias are not real.
      ValueError: the weights have not rank 2, or the bias or `features` do not fit them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import Params, linear_logits
      >>> params = Params(weights=jnp.array([[1.0, 0.0], [0.0, 2.0]]), bias=jnp.array([0.5, 0.0]))
      >>> linear_logits(params, jnp.array([[3.0, 1.0]]))
      Array([[3.5, 2. ]], dtype=float32)
    """
    weights, bias = _checks.parameters(*params)
    width = weights.shape[1]
    x = _checks.real_array("features", features)
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"features must have shape (..., {width}) to fit weights of shape {weights.shape}, "
            f"got shape {x.shape}"
        )
    return x.astype(weights.dtype) @ weights.T + bias


def objective(params: Params, problem: Problem, *, fit_bias: bool = True) -> Float[Array, ""]:
    """The objective f(W, b) of the module's formula, in nats; constant in b without `fit_bias`."""
    if not fit_bias:
        params = params._replace(bias=lax.stop_gradient(params.bias))
    return _mean_loss(params, problem) + _penalty(params, problem)


def value_and_gradient(params: Params, problem: Problem) -> tuple[Float[Array, ""], Params]:
    """The objective and its gradient, summed over blocks of rows if there are many logits."""

    def block(rows: Problem) -> tuple[Array, Params]:
        value: tuple[Array, Params] = jax.value_and_grad(_mean_loss)(params, rows)
        return value

    loss, gradient = sum_over_rows(block, problem, _block_size(params, problem))
    weights = gradient.weights + problem.l2 * params.weights
    return loss + _penalty(params, problem), Params(weights, gradient.bias)


class Curvature(NamedTuple):
    r"""The Hessian of the objective at a point.

    `probabilities` (classes, examples) are those of the point, if they are not too many to be kept.
    """

    params: Params
    problem: Problem
    probabilities: Array | None

    def product(self, v: Params) -> Params:
        r"""That with a vector, for the change dz = V x of the logits

        .. math:: H V = \sum_i c_i\, (\mathrm{diag}(p_i) - p_i p_i^T)\, V x_i x_i^T + \lambda V.
        """

        def of(rows: Problem, p: Array) -> Params:
            dz = _linear(v, rows.features)
            # Twice, as in softmax's own derivative: the second restores what the first one rounded.
            for _ in range(2):
                dz -= _sum_over_classes(p, dz)
            u = rows.share * (p * dz)
            return Params(u @ rows.features.astype(u.dtype), jnp.sum(u, 1))

        problem, p = self.problem, self.probabilities
        if p is None:
            size = _block_size(self.params, problem)
            data = sum_over_rows(
                lambda rows: of(rows, _probabilities(self.params, rows)), problem, size
            )
        else:
            data = of(problem, p)
        return data._replace(weights=data.weights + problem.l2 * v.weights)

    def spread(self) -> Array:
        """c_i p_ik (1 - p_ik), the factor of x_i x_i^T in the Hessian's diagonal blocks, with shape
        (classes, examples); where the logits are too many to be kept, the mean of it over the
        classes, with shape (1, examples)."""
        problem, p = self.problem, self.probabilities
        if p is not None:
            return problem.share * p * (1 - p)

        def block(rows: Problem) -> Array:
            p = _probabilities(self.params, rows)
            return rows.share * jnp.mean(p * (1 - p), 0)

        return map_rows(block, problem, _block_size(self.params, problem))[None]


def curvature(params: Params, problem: Problem, wanted: Array | None = None) -> Curvature:
    """The Hessian at `params`. Where not `wanted`, it costs little and means nothing."""
    if in_blocks(params.bias.size, problem):
        return Curvature(params, problem, None)
    return Curvature(params, problem, _probabilities(params, problem, wanted))


def _probabilities(params: Params, problem: Problem, wanted: Array | None = None) -> Array:
    def logits() -> Array:
        return _logits(params, problem)

    if wanted is None:
        z = logits()
    else:
        nothing = jnp.zeros((params.bias.size, len(problem.share)), params.bias.dtype)
        z = lax.cond(wanted, logits, lambda: nothing)
    return softmax(z, 0, where=_column(problem.classes))


def _sum_over_classes(p: Array, values: Array) -> Array:
    """The sum of p_k v_k over the classes, which come first.

    XLA:CPU's own reduction over them takes 2 to 8 times as long.
    """

    def by_class(p: Array, values: Array) -> Array:
        def add(k: Array | int, total: Array) -> Array:
            return total + p[k] * values[k]

        if len(p) <= _FEW:
            return functools.reduce(
                lambda total, k: add(k, total), range(1, len(p)), p[0] * values[0]
            )
        return lax.fori_loop(0, len(p), add, jnp.zeros_like(values[0]))

    return lax.platform_dependent(
        p, values, cpu=by_class, default=lambda p, values: jnp.sum(p * values, 0)
    )


_FEW = 12  # classes whose rows are read side by side
_LOGITS = 2**22  # the most that are formed at once, if it is more than an eighth of the features
_BLOCK = 2**20  # logits of a block, of those that are not


def in_blocks(classes: int, problem: Problem) -> bool:
    """Whether the logits are too many to be formed at once."""
    examples, width = problem.features.shape
    return examples * classes > max(_LOGITS, examples * width // 8)


def _block_size(params: Params, problem: Problem) -> int:
    """How many rows' logits are formed at a time."""
    classes = params.bias.size
    return max(_BLOCK // classes, 1) if in_blocks(classes, problem) else len(problem.share)


def _linear(params: Params, features: Array) -> Array:
    weights, bias = params
    return weights @ features.astype(weights.dtype).T + bias[:, None]


def _logits(params: Params, problem: Problem) -> Float[Array, "classes examples"]:
    logits = _linear(params, problem.features)
    return logits if problem.offset is None else logits + problem.offset


def _column(classes: Array | None) -> Array | None:
    return None if classes is None else classes[:, None]


def _mean_loss(params: Params, problem: Problem) -> Array:
    where = _column(problem.classes)
    losses = cross_entropy(_logits(params, problem), problem.labels, axis=0, where=where)
    # An example of share 0 is dropped, be its loss finite or not.
    return jnp.sum(problem.share * jnp.where(problem.share == 0, 0, losses))


def _penalty(params: Params, problem: Problem) -> Array:
    return jnp.sum(problem.l2 / 2 * params.weights**2)


def centred(params: Params, classes: Bool[Array, " classes"]) -> Params:
    """The representative with sum 0 over the present classes, and 0 for the absent ones.

    It has the same probabilities, and of all such it has the least norm.
    """
    return Params(*(sum_zero(value, classes) for value in params))


def sum_zero(value: Array, classes: Bool[Array, " classes"]) -> Array:
    """`value` (classes, ...) less its mean over the present classes; 0 for the absent ones."""
    mask = classes.reshape(-1, *[1] * (value.ndim - 1))
    count = jnp.sum(classes).astype(value.dtype)
    return jnp.where(mask, value - jnp.sum(jnp.where(mask, value, 0), 0) / count, 0)
