"""Softmax regression: certified fits, paths of penalties, cross-validation."""

from jaxsoftmax.regression._fit import fit
from jaxsoftmax.regression._folds import stratified_folds
from jaxsoftmax.regression._params import Params, linear_logits
from jaxsoftmax.regression._path import fit_path, l2_grid
from jaxsoftmax.regression._result import Fit, Status
from jaxsoftmax.regression._separation import diverging_weights
from jaxsoftmax.regression._validation import CrossValidation, cross_validate

__all__ = [
    "CrossValidation",
    "Fit",
    "Params",
    "Status",
    "cross_validate",
    "diverging_weights",
    "fit",
    "fit_path",
    "l2_grid",
    "linear_logits",
    "stratified_folds",
]
