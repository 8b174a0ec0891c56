"""The softmax toolbox for JAX: exact derivatives, honest losses, certified softmax regression.

The modules, each built on those before it:

* `functional`: `softmax`, `log_softmax`, `logsumexp`, `softmax_jacobian`, `entropy`,
  `kl_divergence`.
* `losses`: `cross_entropy`.
* `linear`: `linear_cross_entropy` and `linear_logsumexp`, the loss of a linear layer without its
  logits.
* `objective`: the model (`Params`, `linear_logits`), its regularised loss, gradient and Hessian.
* `certificate`: the bound on the distance from the optimum.
* `solvers`: the common result of all solvers (`Fit`, `Status`), and L-BFGS.
* `regression`: `fit`, the full-batch softmax regression by Newton's method.
* `separation`: `diverging_weights`, for fits of separable data.
* `training`: the minibatch trainer for any optax optimiser, used as `from jaxsoftmax import
  training`.

Shapes are the same everywhere: logits (..., classes), labels (...) integers or (..., classes)
probabilities, features (examples, features), weights (classes, features), bias (classes,). Losses
are in nats.
"""

from jaxsoftmax.functional import (
    entropy,
    kl_divergence,
    log_softmax,
    logsumexp,
    softmax,
    softmax_jacobian,
)
from jaxsoftmax.linear import linear_cross_entropy, linear_logsumexp
from jaxsoftmax.losses import cross_entropy
from jaxsoftmax.objective import Params, linear_logits
from jaxsoftmax.regression import fit
from jaxsoftmax.separation import diverging_weights
from jaxsoftmax.solvers import Fit, Status

__all__ = [
    "Fit",
    "Params",
    "Status",
    "cross_entropy",
    "diverging_weights",
    "entropy",
    "fit",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_logits",
    "linear_logsumexp",
    "log_softmax",
    "logsumexp",
    "softmax",
    "softmax_jacobian",
]
