"""Time and memory of the linear cross-entropy beside the loss of the logits: optax and tokamax.

    python -m tests.benchmarks.linear

Loss and gradients for features and weights, jitted, float32. A ratio is our time over the peer's
where it says so. "memory" is what the compiled program needs beside its arguments and results.
"products" is the time of the four matrix products that a blockwise loss is made of, in the same
blocks and with nothing else: the limit. tokamax is printed where it is installed.
"""

import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsoftmax import linear_cross_entropy
from tests.benchmarks._measure import environment, medians

tokamax: Any = importlib.import_module("tokamax") if importlib.util.find_spec("tokamax") else None

SHAPES = [(2048, 64, 16384), (2048, 256, 32768), (4096, 64, 131072)]
# What no array of a real head needs to be allocated for: compiled only.
LARGE = (8192, 1024, 131072)


def ours(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
    return linear_cross_entropy(x, w, y)


def with_all_options(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
    return linear_cross_entropy(
        x, w, y, jnp.zeros(w.shape[0]), softcap=30.0, label_smoothing=0.1, z_loss=1e-4
    )


def dense(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(x @ w.T, y).mean()


def in_tokamax(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
    loss = tokamax.linear_softmax_cross_entropy_loss
    value: jax.Array = loss(x, y, w.T, reduction="mean", implementation="xla")
    return value


def products(x: jax.Array, w: jax.Array, y: jax.Array) -> Any:
    """Logits twice, and the products with the features and with the weights."""
    blocks = w.reshape(-1, 256, w.shape[1])

    def forward(m: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        return jnp.maximum(m, (x @ block.T).max(-1)), None

    def backward(dx: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = x @ block.T
        return dx + z @ block, z.T @ x

    m, _ = jax.lax.scan(forward, jnp.zeros(x.shape[0]), blocks)
    return m, jax.lax.scan(backward, jnp.zeros_like(x), blocks)


def compiled(f: Any, *arguments: Any) -> tuple[Any, float]:
    program = jax.jit(f).lower(*arguments).compile()
    analysis: Any = program.memory_analysis()
    return program, analysis.temp_size_in_bytes / 2**20


def main() -> None:
    names = ["jaxsoftmax", "jax", "jaxlib", "optax", *(["tokamax"] if tokamax else [])]
    print(environment(*names))
    print(f"{'N, D, V':22} {'':28}       ms  over dense  memory MiB")
    losses = {"ours": ours, "ours, every option": with_all_options, "dense, optax": dense}
    if tokamax:
        losses["tokamax, xla"] = in_tokamax
    for n, d, v in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (n, d))
        w = jax.random.normal(keys[1], (v, d)) / d**0.5
        y = jax.random.randint(keys[2], (n,), 0, v)
        programs = {
            name: compiled(jax.value_and_grad(f, (0, 1)), x, w, y) for name, f in losses.items()
        }
        programs["products"] = compiled(products, x, w, y)
        seconds = medians(
            {name: partial(program, x, w, y) for name, (program, _) in programs.items()}, repeats=5
        )
        for name, (_, memory) in programs.items():
            print(
                f"{f'{n}, {d}, {v}':22} {name:28} {1e3 * seconds[name]:8.0f}"
                f" {seconds[name] / seconds['dense, optax']:11.2f} {memory:11.1f}"
            )
    n, d, v = LARGE
    shapes = ((n, d), jnp.bfloat16), ((v, d), jnp.bfloat16), ((n,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    for name in ("ours", "dense, optax"):
        _, memory = compiled(jax.value_and_grad(losses[name], (0, 1)), *arguments)
        print(f"{f'{n}, {d}, {v} bfloat16':22} {name:32} (compiled only) {memory:13.1f}")


if __name__ == "__main__":
    main()
