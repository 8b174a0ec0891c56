"""The softmax family: values and derivatives of every order that are right in every dtype and tail.

Each public function checks its arguments and calls a rule of this wing on arrays.
"""

from jaxsoftmax.functional._functions import (
    entropy,
    kl_divergence,
    log_softmax,
    logsumexp,
    softmax,
    softmax_jacobian,
)

__all__ = [
    "entropy",
    "kl_divergence",
    "log_softmax",
    "logsumexp",
    "softmax",
    "softmax_jacobian",
]
