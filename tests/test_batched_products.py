"""Losses of a vmapped linear layer of many rows and few classes.

XLA:CPU of jax 0.10.2 gets the last row of such products wrong where a reduction follows
(jax#39103), from 16385 rows on in float64 and 32769 in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from jaxsoftmax import cross_entropy, logsumexp
from tests.helpers import WIDE, eps

FEATURES = 3


def layer(rows: int, classes: int) -> tuple[NDArray[Any], ...]:
    """Features, weights and bias that are exact in every dtype, and labels."""
    random = np.random.default_rng(classes)
    x, w, b = (
        random.integers(-16, 17, size) / 16.0
        for size in ((rows, FEATURES), (classes, FEATURES), classes)
    )
    return x, w, b, random.integers(classes, size=rows)


def close(ours: Any, theirs: NDArray[Any], scale: NDArray[Any] | float = 1.0) -> None:
    off = np.abs(np.asarray(ours, np.float64) - theirs) / scale
    assert off.max() <= 40 * eps(WIDE)


@pytest.mark.parametrize(("rows", "classes"), [(32769, 2), (100003, 3), (16385, 7), (32769, 10)])
def test_losses_of_a_vmapped_layer_equal_numpy(rows: int, classes: int) -> None:
    x, w, b, labels = layer(rows, classes)
    z = x @ w.T + b
    log_z = np.log(np.exp(z).sum(1))
    p = np.exp(z - log_z[:, None])
    residuals = p - (np.arange(classes) == labels[:, None])
    features, weights, bias = (jnp.asarray(v, WIDE) for v in (x, w, b))

    def loss(x: Any, label: Any, w: Any = weights) -> Any:
        return cross_entropy(w @ x + bias, label)

    def total(x: Any, _: Any, w: Any = weights) -> Any:
        return logsumexp(w @ x + bias)

    for f, values, slopes in (
        (loss, log_z - z[np.arange(rows), labels], residuals),
        (total, log_z, p),
    ):
        close(jax.jit(jax.vmap(f))(features, labels), values)
        close(jax.jit(jax.vmap(jax.grad(f)))(features, labels), slopes @ w)
        each = jax.vmap(f, (0, 0, None))
        by_weights = jax.jit(jax.grad(lambda w, *v, each=each: jnp.sum(each(*v, w))))
        scale = np.abs(slopes).T @ np.abs(x)
        close(by_weights(weights, features, labels), slopes.T @ x, scale)


def test_squares_of_a_vmapped_product_equal_numpy() -> None:
    x, *_ = layer(32769, 3)
    squares = jax.jit(jax.vmap(lambda x: jnp.sum((jnp.eye(3, dtype=WIDE) @ x) ** 2)))
    close(squares(jnp.asarray(x, WIDE)), (x**2).sum(1))
