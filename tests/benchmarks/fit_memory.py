"""Memory of `fit` beyond its inputs: what XLA reserves, and the peak of the process.

    python -m tests.benchmarks.fit_memory

The peak is that of the resident set while the compiled program runs, less what it was before (Linux
only): of the first run, after which the libraries keep some memory, and of the second. "features"
and "logits" are the sizes of those arrays, the second of which is never made when it is large.
"""

import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxsoftmax import fit
from tests.benchmarks._measure import environment

SHAPES = [(60_000, 784, 10, 100), (200_000, 64, 1000, 5)]  # examples, features, classes, max_iter
MB = 1e6


def resident(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(found.group(1)) * 1024 / MB if found else float("nan")


def made(examples: int, width: int, classes: int) -> tuple[jax.Array, jax.Array]:
    """Features, and labels of which a fifth are at random; without all logits at once."""
    keys = jax.random.split(jax.random.key(0), 4)
    features = jax.random.normal(keys[0], (examples, width))
    teacher = jax.random.normal(keys[1], (width, classes))
    best = jax.lax.map(lambda x: jnp.argmax(x @ teacher), features, batch_size=1000)
    other = jax.random.randint(keys[2], (examples,), 0, classes)
    return features, jnp.where(jax.random.uniform(keys[3], (examples,)) < 0.2, other, best)


def main() -> None:
    print(environment("jaxsoftmax", "jax", "jaxlib"))
    for examples, width, classes, max_iter in SHAPES:
        features, labels = made(examples, width, classes)
        solve = jax.jit(partial(fit, num_classes=classes, max_iter=max_iter))
        program = solve.lower(features, labels).compile()
        analysis: Any = program.memory_analysis()
        reserved = analysis.temp_size_in_bytes / MB
        size = features.nbytes / MB
        print(
            f"{examples} x {width}, {classes} classes: features {size:.0f} MB, "
            f"logits {4 * examples * classes / MB:.0f} MB; "
            f"reserved {reserved:.0f} MB = {reserved / size:.2f} x features"
        )
        for _ in range(2):
            time.sleep(1)  # what the run before used is freed a little after its result is there
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before = resident("VmRSS")
            start = time.perf_counter()
            result = jax.block_until_ready(program(features, labels))
            seconds = time.perf_counter() - start
            peak = resident("VmHWM") - before
            print(
                f"  peak {peak:.0f} MB = {peak / size:.2f} x features; {result.iterations} "
                f"iterations in {seconds:.1f} s, objective {result.objective:.4f}"
            )


if __name__ == "__main__":
    main()
