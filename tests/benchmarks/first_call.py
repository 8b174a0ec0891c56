"""The first `fit` of the digits in a fresh process, compilation included: as it is, with XLA's
older code generator for CPUs, and with JAX's persistent compilation cache.

    python -m tests.benchmarks.first_call
"""

import os
import statistics
import subprocess
import sys
import tempfile

from tests.benchmarks._measure import environment

CODE = """
import time, jax
from sklearn.datasets import load_digits
from jaxsoftmax import fit
images, labels = load_digits(return_X_y=True)
start = time.perf_counter()
jax.block_until_ready(fit(images / 16, labels, num_classes=10, l2=1 / len(labels)))
print(time.perf_counter() - start)
"""


def seconds(**variables: str) -> float:
    environ = {name: v for name, v in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout)


def median(**variables: str) -> float:
    return statistics.median(seconds(**variables) for _ in range(5))


def main() -> None:
    print(environment("jaxsoftmax", "jax"))
    print(f"{'no cache':24} {median():.2f} s")
    older = median(XLA_FLAGS="--xla_cpu_use_fusion_emitters=false")
    print(f"{'older code generator':24} {older:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        cache = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        print(f"{'fills the cache':24} {seconds(**cache):.2f} s")
        print(f"{'finds it in the cache':24} {median(**cache):.2f} s")


if __name__ == "__main__":
    main()
