"""Programs for any number of examples, written and read again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxsoftmax import (
    Params,
    cross_entropy,
    entropy,
    kl_divergence,
    linear_cross_entropy,
    linear_logits,
    linear_logsumexp,
    log_softmax,
    logsumexp,
    softmax,
    softmax_jacobian,
)

pytestmark = [
    pytest.mark.single,
    pytest.mark.usefixtures("no_jaxtyping", "no_debug_nans"),  # sizes are no numbers
]

CLASSES = 20
LAYER = np.random.default_rng(0).normal(size=(CLASSES, 3)).astype(np.float32)

# The function, and the shapes of its arguments for b examples; `labels` are integers.
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "softmax over the last axis": (softmax, ("b, 20",)),
    "softmax over the first": (partial(softmax, axis=0), ("b, 20",)),
    "softmax over b entries": (softmax, ("4, b",)),
    "softmax at a temperature": (partial(softmax, temperature=0.5), ("b, 20",)),
    "log_softmax": (log_softmax, ("b, 20",)),
    "log_softmax over the first": (partial(log_softmax, axis=0), ("b, 20",)),
    "logsumexp": (partial(logsumexp, axis=-1), ("b, 20",)),
    "logsumexp of all": (logsumexp, ("b, 20",)),
    "logsumexp with factors": (lambda a, b: logsumexp(a, 0, b), ("b, 20", "b, 20")),
    "softmax_jacobian": (softmax_jacobian, ("b, 20",)),
    "entropy": (entropy, ("b, 20",)),
    "kl_divergence": (kl_divergence, ("b, 20", "b, 20")),
    "cross_entropy of classes": (cross_entropy, ("b, 20", "labels")),
    "cross_entropy with options": (
        partial(cross_entropy, label_smoothing=0.1, z_loss=0.1, ignore_label=3),
        ("b, 20", "labels"),
    ),
    "cross_entropy of probabilities": (
        lambda x, y: cross_entropy(x, softmax(y)),
        ("b, 20", "b, 20"),
    ),
    "linear_logits": (lambda x: linear_logits(Params(LAYER, LAYER[:, 0]), x), ("b, 3",)),
    "linear_logsumexp": (lambda x: linear_logsumexp(x, LAYER), ("b, 3",)),
    "linear_cross_entropy": (lambda x, y: linear_cross_entropy(x, LAYER, y), ("b, 3", "labels")),
}


def drawn(shape: str, count: int) -> Any:
    rng = np.random.default_rng(count)
    if shape == "labels":
        return rng.integers(0, CLASSES, count).astype(np.int32)
    return rng.normal(size=eval(shape, {"b": count})).astype(np.float32)


@pytest.mark.parametrize("name", CALLS)
def test_a_program_for_any_number_of_examples(name: str) -> None:
    f, shapes = CALLS[name]
    (b,) = export.symbolic_shape("b")
    arguments = [
        jax.ShapeDtypeStruct((b,), jnp.int32)
        if shape == "labels"
        else jax.ShapeDtypeStruct(eval(shape, {"b": b}), jnp.float32)
        for shape in shapes
    ]
    read = export.deserialize(export.export(jax.jit(f))(*arguments).serialize())
    for count in (1, 7, 300):
        values = [drawn(shape, count) for shape in shapes]
        np.testing.assert_allclose(read.call(*values), f(*values), rtol=1e-5, atol=1e-6)


def test_gradients_of_any_number_of_examples() -> None:
    (b,) = export.symbolic_shape("b")

    def loss(x: jax.Array, y: jax.Array) -> jax.Array:
        return linear_cross_entropy(x, LAYER, y) + cross_entropy(x, y % 3).mean()

    shapes = (jax.ShapeDtypeStruct((b, 3), jnp.float32), jax.ShapeDtypeStruct((b,), jnp.int32))
    read = export.export(jax.jit(jax.grad(loss)))(*shapes)
    x, y = drawn("b, 3", 9), drawn("labels", 9)
    np.testing.assert_allclose(read.call(x, y), jax.grad(loss)(x, y), rtol=1e-5, atol=1e-6)
