"""Time of `import jaxsoftmax` in fresh processes beside `import jax, optax`.

python tests/benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

from tests.benchmarks._measure import environment

STATEMENTS = ("import jax, optax", "import jax, optax, jaxsoftmax")


def seconds(statement: str) -> float:
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def main() -> None:
    print(environment("jaxsoftmax", "jax", "optax"))
    for statement in STATEMENTS:
        seconds(statement)
    pairs = [[seconds(statement) for statement in STATEMENTS] for _ in range(11)]
    for index, statement in enumerate(STATEMENTS):
        print(f"{statement:32} {statistics.median(pair[index] for pair in pairs):.3f} s")
    extra = statistics.median(after - before for before, after in pairs)
    print(f"{'median of the differences':32} {extra:.3f} s")


if __name__ == "__main__":
    main()
