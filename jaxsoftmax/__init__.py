"""The softmax toolbox for JAX: exact derivatives, honest losses, certified softmax regression.

Four wings, each built on those before it:

* `functional`: `softmax`, `log_softmax`, `logsumexp`, `softmax_jacobian`, `entropy`,
  `kl_divergence`.
* `losses`: `cross_entropy`; `linear_cross_entropy` and `linear_logsumexp`, the loss of a linear
  layer without its logits.
* `regression`: the model (`Params`, `linear_logits`); `fit`, its optimum with a certificate (`Fit`,
  `Status`); `fit_path` under many penalties, by default those of `l2_grid`; `cross_validate`, to
  choose one; `diverging_weights`, for separable data.
* `estimator`: `SoftmaxRegression` and `SoftmaxRegressionCV` for scikit-learn, imported as
  `from jaxsoftmax.estimator import SoftmaxRegression`.

Beside them `training`, the minibatch trainer for any optax optimiser, used as
`from jaxsoftmax import training`.

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
from jaxsoftmax.losses import cross_entropy, linear_cross_entropy, linear_logsumexp
from jaxsoftmax.regression import (
    CrossValidation,
    Fit,
    Params,
    Status,
    cross_validate,
    diverging_weights,
    fit,
    fit_path,
    l2_grid,
    linear_logits,
    stratified_folds,
)

__all__ = [
    "CrossValidation",
    "Fit",
    "Params",
    "Status",
    "cross_entropy",
    "cross_validate",
    "diverging_weights",
    "entropy",
    "fit",
    "fit_path",
    "kl_divergence",
    "l2_grid",
    "linear_cross_entropy",
    "linear_logits",
    "linear_logsumexp",
    "log_softmax",
    "logsumexp",
    "softmax",
    "softmax_jacobian",
    "stratified_folds",
]
