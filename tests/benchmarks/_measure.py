"""What the benchmarks share: interleaved timing, versions and device, data from files."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray


def environment(*packages: str) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    device = jax.devices()[0]
    kind = f"{os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return f"Python {platform.python_version()}, {versions}; {device.platform}, {kind}"


def medians(
    contenders: Mapping[str, Callable[[], Any]], *, repeats: int = 15, least: float = 0.01
) -> dict[str, float]:
    """Median seconds a call of each contender, after a warm-up, taking turns in every repeat.

    A repeat calls a contender so often that it takes at least `least` seconds.
    """
    calls = {}
    for name, f in contenders.items():
        jax.block_until_ready(f())
        start = time.perf_counter()
        jax.block_until_ready(f())
        calls[name] = 1 + int(least / max(time.perf_counter() - start, 1e-9))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, f in contenders.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                result = f()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def stored(folder: Path | None) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Name, features and labels of each .npz of a folder with arrays X and y.

    Bytes are divided by 255 if they go that far.
    """
    for path in sorted(folder.glob("*.npz")) if folder else ():
        with np.load(path) as arrays:
            features, labels = arrays["X"], arrays["y"]
        scale = 255 if features.dtype == np.uint8 and features.max() > 127 else 1
        yield path.stem, features.astype(np.float64) / scale, labels
