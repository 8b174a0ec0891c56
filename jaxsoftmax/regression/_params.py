"""The parameters of a linear softmax model, and its logits."""

from typing import NamedTuple

from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from jaxsoftmax import _arrays, _checks
from jaxsoftmax._runtime import Array


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
    x = _arrays.real_array("features", features)
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"features must have shape (..., {width}) to fit weights of shape {weights.shape}, "
            f"got shape {x.shape}"
        )
    return x.astype(weights.dtype) @ weights.T + bias.reshape((1,) * (x.ndim - 1) + bias.shape)
