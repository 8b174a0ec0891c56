"""First calls, each in a fresh process without a cache, beside scikit-learn: what a new user waits.

    python -m tests.benchmarks.first_call [--repeats 3]

Imports and JAX's own start (its first program) are not counted. "then" is a later call of the same
shape. `kernels` are those that XLA compiles for the first call, about 25 ms each on a CPU.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks._measure import environment

START = """
import sys, time, warnings
import numpy as np, jax
from sklearn.datasets import load_digits, load_iris, load_wine
warnings.simplefilter("ignore")
images, digits = load_digits(return_X_y=True)
images = images / 16
flowers, species = load_iris(return_X_y=True)
wines, cultivars = load_wine(return_X_y=True)
jax.block_until_ready(jax.jit(lambda x: x + 1)(np.float32(1)))
"""
TIME = """
seconds = []
for _ in range(6):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
print(seconds[0], sorted(seconds[1:])[2])
"""
FIT = "from jaxsoftmax import fit\n"
ESTIMATORS = "from jaxsoftmax.estimator import SoftmaxRegression, SoftmaxRegressionCV\n"
THEIRS = "from sklearn.linear_model import LogisticRegression, LogisticRegressionCV\n"
OURS = {
    "fit, digits": FIT + "call = lambda: fit(images, digits, num_classes=10, l2=1 / 1797)",
    "fit, iris": FIT + "call = lambda: fit(flowers, species, num_classes=3, l2=1 / 150)",
    "fit inside jit, digits": FIT
    + "program = jax.jit(lambda x, y: fit(x, y, num_classes=10, l2=1 / 1797))\n"
    + "call = lambda: program(images.astype(np.float32), digits.astype(np.int32))",
    "SoftmaxRegression, digits": ESTIMATORS
    + "call = lambda: SoftmaxRegression().fit(images, digits).coef_",
    "SoftmaxRegression, iris after rows of it": ESTIMATORS
    + "SoftmaxRegression().fit(flowers[::2], species[::2])\n"
    + "call = lambda: SoftmaxRegression().fit(flowers, species).coef_",
    "SoftmaxRegressionCV, digits": ESTIMATORS
    + "call = lambda: SoftmaxRegressionCV().fit(images, digits).coef_",
    "SoftmaxRegressionCV, iris": ESTIMATORS
    + "call = lambda: SoftmaxRegressionCV().fit(flowers, species).coef_",
}
PEERS = {
    "fit, digits": "LogisticRegression(solver='newton-cg').fit(images, digits)",
    "fit, iris": "LogisticRegression(solver='newton-cg').fit(flowers, species)",
    "SoftmaxRegression, digits": "LogisticRegression(max_iter=1000).fit(images, digits)",
    "SoftmaxRegressionCV, digits": "LogisticRegressionCV(max_iter=1000).fit(images, digits)",
    "SoftmaxRegressionCV, iris": "LogisticRegressionCV(max_iter=1000).fit(flowers, species)",
}


def seconds(code: str, **variables: str) -> tuple[float, float]:
    """Seconds of the first call in a fresh process, and of a later one."""
    environ = {name: v for name, v in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    run = subprocess.run(
        [sys.executable, "-c", START + code + TIME],
        env=environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    first, later = run.stdout.split()
    return float(first), float(later)


def kernels(code: str) -> int:
    """How many kernels XLA compiles for the first call."""
    with tempfile.TemporaryDirectory() as folder:
        seconds(code, XLA_FLAGS=f"--xla_dump_to={folder} --xla_dump_hlo_as_text")
        programs = Path(folder).glob("*cpu_after_optimizations.txt")
        return sum(program.read_text().count("kind=k") for program in programs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(environment("jaxsoftmax", "jax", "scikit-learn"))
    print(f"{'':42}{'first':>8}{'then':>9}{'kernels':>9}{'scikit-learn':>14}")
    for name, code in OURS.items():
        runs = [seconds(code) for _ in range(repeats)]
        first, later = (statistics.median(column) for column in zip(*runs, strict=True))
        peer = ""
        if name in PEERS:
            call = THEIRS + f"call = lambda: {PEERS[name]}.coef_"
            peer = f"{statistics.median(seconds(call)[0] for _ in range(repeats)):.2f} s"
        print(f"{name:42}{first:6.2f} s{later:7.4f} s{kernels(code):9}{peer:>14}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        code = OURS["fit, digits"]
        seconds(code, **cache)
        found = statistics.median(seconds(code, **cache)[0] for _ in range(repeats))
        print(f"{'fit, digits, found in a cache':42}{found:6.2f} s")


if __name__ == "__main__":
    main()
