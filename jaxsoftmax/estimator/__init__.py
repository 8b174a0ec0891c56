"""Softmax regression as a scikit-learn classifier.

    from jaxsoftmax.estimator import SoftmaxRegression

    model = make_pipeline(StandardScaler(), SoftmaxRegression(C=10.0)).fit(X, y)

It checks and converts, and `jaxsoftmax.fit` computes. scikit-learn is optional for the package, so
this module is not imported with it: `pip install "jaxsoftmax[sklearn]"`.
"""

try:
    import sklearn  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        'jaxsoftmax.estimator needs scikit-learn: pip install "jaxsoftmax[sklearn]"'
    ) from error

from jaxsoftmax.estimator._cross_validated import SoftmaxRegressionCV
from jaxsoftmax.estimator._regression import SoftmaxRegression

__all__ = ["SoftmaxRegression", "SoftmaxRegressionCV"]
