"""Strict dtype promotion and `jax_debug_nans` for the whole suite; warnings are errors."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

# Threads of LAPACK in one worker wait busily for cores that another one has.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_nans", True)
jax.config.update("jax_num_cpu_devices", 8)  # for tests/test_sharding.py
# Most of the suite's time is compilation: what one worker or run has compiled serves the others.
jax.config.update(
    "jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache/jax")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hypothesis.settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def fresh_programs() -> None:
    """So that `jax_debug_nans` sees every call: JAX forgets it for a program that a gradient, or a
    call with the check off, has gone through before."""
    jax.clear_caches()


@pytest.fixture
def no_debug_nans() -> Iterator[None]:
    """For tests in which NaN is the right answer."""
    jax.config.update("jax_debug_nans", False)
    yield
    jax.config.update("jax_debug_nans", True)


@pytest.fixture
def no_jaxtyping() -> Iterator[None]:
    """Bad input without the suite's own runtime type checks, as a user would pass it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
