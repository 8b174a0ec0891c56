"""Time and memory of the elementwise functions beside jax.nn, jax.scipy and optax, all under jit.

    python -m tests.benchmarks.elementwise

A ratio is the peer's time over ours: above 1, ours is faster. "vjp" is value and gradient of the
sum of the result times a constant. Residuals are what `jax.vjp` keeps for the backward pass.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax
from tests.benchmarks._measure import environment, medians

SHAPES = [(262144, 3), (65536, 26), (20000, 100), (4096, 1024), (64, 65536)]
DTYPES = [jnp.float32, jnp.bfloat16]


def labels(x: jax.Array) -> jax.Array:
    return jnp.arange(x.shape[0]) % x.shape[1]


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "softmax": (jaxsoftmax.softmax, jax.nn.softmax),
    "log_softmax": (jaxsoftmax.log_softmax, jax.nn.log_softmax),
    "logsumexp": (
        lambda x: jaxsoftmax.logsumexp(x, -1),
        lambda x: jax.scipy.special.logsumexp(x, -1),
    ),
    "cross_entropy": (
        lambda x: jaxsoftmax.cross_entropy(x, labels(x)),
        lambda x: optax.losses.softmax_cross_entropy_with_integer_labels(x, labels(x)),
    ),
}


def with_gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    def total(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum((f(x) * weight).astype(jnp.float32))

    return jax.jit(jax.value_and_grad(total))


def residual_bytes(f: Callable[..., Any], x: jax.Array) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.vjp(jax.jit(f), x)[1]))


def main() -> None:
    print(environment("jaxsoftmax", "jax", "jaxlib", "optax"))
    print("                                      value          vjp          residuals/input")
    print("function       dtype     shape           ms  ratio     ms  ratio    ours  peer")
    ratios = []
    for name, (ours, theirs) in FUNCTIONS.items():
        for dtype in DTYPES:
            for shape in SHAPES:
                x = 3 * jax.random.normal(jax.random.key(0), shape, dtype)
                weight = jax.random.normal(jax.random.key(1), jax.eval_shape(ours, x).shape, dtype)
                seconds = medians(
                    {
                        "ours": partial(jax.jit(ours), x),
                        "peer": partial(jax.jit(theirs), x),
                        "ours vjp": partial(with_gradient(ours), x, weight),
                        "peer vjp": partial(with_gradient(theirs), x, weight),
                    }
                )
                value = seconds["peer"] / seconds["ours"]
                vjp = seconds["peer vjp"] / seconds["ours vjp"]
                ratios += [value, vjp]
                times = (1e3 * seconds["ours"], value, 1e3 * seconds["ours vjp"], vjp)
                kept = [residual_bytes(f, x) / x.nbytes for f in (ours, theirs)]
                print(
                    f"{name:14} {jnp.dtype(dtype).name:9} {shape!s:14}"
                    + " ".join(f"{value:6.2f}" for value in times)
                    + f"  {kept[0]:6.2f} {kept[1]:5.2f}"
                )
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"geometric mean of the ratios {mean:.2f}, least {min(ratios):.2f}")


if __name__ == "__main__":
    main()
