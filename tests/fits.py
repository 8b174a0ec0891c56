"""Examples to fit, and the fit of them, that several tests share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoftmax import Fit, Params, Status, fit
from jaxsoftmax.regression import _data, _objective
from jaxsoftmax.regression._fit import check_arguments
from jaxsoftmax.regression._plan import Plan
from jaxsoftmax.regression.solver._vmapped import minimise
from tests.helpers import WIDE

EXAMPLES, WIDTH, CLASSES = 60, 4, 3
TOL = 1e-10 if jnp.float64 == WIDE else 1e-6
L2 = 1e-2

# As one program each, not one for every operation.
make_problem = jax.jit(_data.make_problem, static_argnames="num_classes")
objective = jax.jit(_objective.objective, static_argnames="fit_bias")


def data(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(EXAMPLES, WIDTH))
    scores = features @ rng.normal(size=(WIDTH, CLASSES)) + rng.gumbel(size=(EXAMPLES, CLASSES))
    return jnp.asarray(features, WIDE), jnp.asarray(scores.argmax(-1))


def small_fit(features: jax.Array, labels: jax.Array, **kwargs: Any) -> Fit:
    """A fit that passes every array, so that most tests share one compilation."""
    classes = kwargs.setdefault("num_classes", CLASSES)
    defaults: dict[str, Any] = {
        "l2": L2,
        "tol": TOL,
        "max_iter": 500,
        "sample_weight": jnp.ones(len(features), WIDE),
        "offset": jnp.zeros((len(features), classes), WIDE),
        "init": Params(jnp.zeros((classes, WIDTH), WIDE), jnp.zeros(classes, WIDE)),
    }
    return fit(features, labels, **(defaults | kwargs))


def planned_fit(plan: Plan, features: jax.Array, labels: jax.Array, **kwargs: Any) -> Fit:
    """A fit with thresholds of its own."""
    defaults: dict[str, Any] = {
        "num_classes": CLASSES,
        "l2": L2,
        "tol": TOL,
        "max_iter": 500,
        "sample_weight": None,
        "offset": None,
        "init": None,
        "fit_bias": True,
        "solver": "auto",
    }
    options = defaults | kwargs
    options["l2"] = jnp.asarray(options["l2"], WIDE)
    arguments, static = check_arguments(features, labels, **options)
    del static["solver"]
    return minimise(arguments, plan=plan, **static)


def status(result: Fit) -> Status:
    return Status(int(result.status))
