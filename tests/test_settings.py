"""Every public function under each setting of JAX that makes it stricter."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoftmax as js
from jaxsoftmax import training
from jaxsoftmax.estimator import SoftmaxRegression, SoftmaxRegressionCV

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3)).astype(np.float32)
Y = np.arange(12) % 3
P = RNG.dirichlet(np.ones(3), 12).astype(np.float32)
WHERE = np.array([True, True, False])
T = np.array([2.0], np.float32)
LAYER, BIAS = RNG.normal(size=(3, 3)).astype(np.float32), np.zeros(3, np.float32)
WEIGHT, OFFSET = np.ones(12, np.float32), np.zeros((12, 3), np.float32)
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "class_weight": np.ones(3)}
FIT: dict[str, Any] = {"num_classes": 3, "sample_weight": WEIGHT}


def trained(x: Any) -> Any:
    optimizer = optax.adam(0.1)
    state = training.init(3, 3, optimizer=optimizer)
    state, _ = training.train(
        state, x, Y, optimizer=optimizer, key=jax.random.key(0), epochs=1, batch_size=5, l2=0.1
    )
    return training.evaluate(state.params, x, Y)


CALLS: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda x: js.softmax(x, where=WHERE, temperature=T),
    "log_softmax": lambda x: js.log_softmax(x, temperature=T),
    "softmax_jacobian": lambda x: js.softmax_jacobian(x, where=WHERE, temperature=T),
    "logsumexp": lambda x: js.logsumexp(x, -1, BIAS + 1, where=WHERE),
    "entropy": lambda x: js.entropy(x, where=WHERE),
    "kl_divergence": lambda x: js.kl_divergence(x, x[::-1], where=WHERE),
    "cross_entropy": lambda x: js.cross_entropy(x, Y % 2, where=WHERE, ignore_label=1, **OPTIONS),
    "cross_entropy of probabilities": lambda x: js.cross_entropy(x, P, **OPTIONS),
    "linear_cross_entropy": lambda x: js.linear_cross_entropy(
        x, LAYER, Y, BIAS, softcap=30.0, block_size=2, ignore_label=1, **OPTIONS
    ),
    "linear_logsumexp": lambda x: js.linear_logsumexp(x, LAYER, BIAS),
    "linear_logits": lambda x: js.linear_logits(js.Params(LAYER, BIAS), x),
    "fit": lambda x: js.fit(x, Y, offset=OFFSET, **FIT),
    "fit by lbfgs": lambda x: js.fit(x, P, solver="lbfgs", **FIT),
    "fit without penalty": lambda x: js.fit(x, P, l2=0.0, **FIT),
    "fit_path": lambda x: js.fit_path(x, Y, l2s=np.array([1.0, 0.1]), **FIT),
    "cross_validate": lambda x: js.cross_validate(x, Y, l2s=np.ones(1), folds=2, **FIT),
    "l2_grid": lambda x: js.l2_grid(x, Y, **FIT),
    "stratified_folds": lambda x: js.stratified_folds(Y, 2, key=jax.random.key(0)),
    "diverging_weights": lambda x: js.diverging_weights(js.Params(LAYER, BIAS), x, Y),
    "training": trained,
    "SoftmaxRegression": lambda x: SoftmaxRegression().fit(x, Y).predict_proba(x),
    "partial_fit": lambda x: SoftmaxRegression().partial_fit(x, Y, np.arange(3)).predict(x),
    "SoftmaxRegressionCV": lambda x: SoftmaxRegressionCV(2, cv=2).fit(x, Y).score(x, Y),
}
# Those of which a derivative with respect to the features makes sense.
SMOOTH = ["softmax", "log_softmax", "softmax_jacobian", "logsumexp", "entropy", "kl_divergence"]
SMOOTH += [name for name in CALLS if "cross_entropy" in name or name.startswith("linear")]
SMOOTH += ["fit", "fit_path"]


@pytest.fixture
def strict() -> Iterator[None]:
    settings = {
        "jax_numpy_rank_promotion": "raise",
        "jax_numpy_dtype_promotion": "strict",
        "jax_check_tracer_leaks": True,
        "jax_debug_infs": True,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", CALLS)
def test_a_call(name: str) -> None:
    if "lbfgs" in name:
        jax.config.update("jax_debug_infs", False)  # optax's line search begins with one
    jax.block_until_ready(CALLS[name](X))


def total(values: Any) -> Any:
    leaves = jax.tree.leaves(values)
    return sum(jnp.sum(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", SMOOTH)
def test_a_gradient(name: str) -> None:
    gradient = jax.jit(jax.grad(lambda x: total(CALLS[name](x))))(X)
    assert np.isfinite(gradient).all()
