"""Strict dtype promotion for the whole suite; warnings are errors (pyproject.toml)."""

from collections.abc import Iterator

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def no_jaxtyping() -> Iterator[None]:
    """Bad input without the suite's own runtime type checks, as a user would pass it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
