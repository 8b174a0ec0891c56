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
* `paths`: `fit_path`, fits under many penalties in one program, by default those of `l2_grid`.
* `validation`: `cross_validate`, paths of all folds in one program, to choose the penalty.
* `separation`: `diverging_weights`, for fits of separable data.
* `estimator`: `SoftmaxRegression` and `SoftmaxRegressionCV` for scikit-learn, imported as
  `from jaxsoftmax.estimator import SoftmaxRegression`.
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
from jaxsoftmax.paths import fit_path, l2_grid
from jaxsoftmax.regression import fit
from jaxsoftmax.separation import diverging_weights
from jaxsoftmax.solvers import Fit, Status
from jaxsoftmax.validation import CrossValidation, cross_validate, stratified_folds

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
