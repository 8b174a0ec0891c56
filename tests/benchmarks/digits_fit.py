"""Time and accuracy of `fit` on scikit-learn's digits beside scikit-learn's own solvers.

    python -m tests.benchmarks.digits_fit

Pixels are divided by 16 and C = 1. Each peer has the largest `tol` (a power of ten) that brings it
within about 1e-6 of the minimum; the relative distance from the best objective seen is printed.
"""

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from jaxsoftmax import Params, cross_entropy, fit, linear_logits
from tests.benchmarks._measure import environment, medians

jax.config.update("jax_enable_x64", True)
SKLEARN_TOL = {"lbfgs": 1e-5, "newton-cg": 1e-4, "newton-cholesky": 1e-4}


def main() -> None:
    warnings.simplefilter("ignore")
    images, labels = load_digits(return_X_y=True)
    features = images / 16
    l2 = 1 / len(labels)

    def objective(weights: object, bias: object) -> float:
        params = Params(jnp.asarray(weights, jnp.float64), jnp.asarray(bias, jnp.float64))
        loss = cross_entropy(linear_logits(params, features), labels).mean()
        return float(loss + l2 / 2 * (params.weights**2).sum())

    contenders = {}
    for dtype in (np.float32, np.float64):
        data = features.astype(dtype)

        def ours(data: np.ndarray = data) -> Params:
            return fit(data, labels, num_classes=10, l2=l2, tol=1e-6, max_iter=1000).params

        contenders[f"jaxsoftmax lbfgs {data.dtype}"] = ours
        for solver, tol in SKLEARN_TOL.items():

            def peer(data: np.ndarray = data, solver: str = solver, tol: float = tol) -> Params:
                model = LogisticRegression(C=1.0, solver=solver, tol=tol, max_iter=1000)
                model.fit(data, labels)
                return Params(model.coef_, model.intercept_)

            contenders[f"scikit-learn {solver} {data.dtype}"] = peer

    print(environment("jaxsoftmax", "jax", "jaxlib", "scikit-learn"))
    first = {}
    for name, contender in contenders.items():
        start = time.perf_counter()
        jax.block_until_ready(contender())
        first[name] = time.perf_counter() - start
    objectives = {name: objective(*contender()) for name, contender in contenders.items()}
    best = min(objectives.values())
    seconds = medians(contenders, repeats=7)
    print("solver                                first s  median s  ratio to ours  distance")
    for name, value in objectives.items():
        ours_seconds = seconds[f"jaxsoftmax lbfgs {name.split()[-1]}"]
        print(
            f"{name:37} {first[name]:7.3f}  {seconds[name]:8.4f}  "
            f"{seconds[name] / ours_seconds:13.2f}  {value / best - 1:.1e}"
        )


if __name__ == "__main__":
    main()
