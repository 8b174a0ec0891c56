"""Errors of values and derivatives against mpmath, within the targets of `exact.QUANTITIES`.

`python -m tests.benchmarks.accuracy` prints the errors themselves, beside those of other libraries.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax
from tests import exact
from tests.exact import QUANTITIES, Inputs, Library, Row
from tests.helpers import DTYPES

OURS = Library(
    jaxsoftmax.softmax,
    jaxsoftmax.log_softmax,
    jaxsoftmax.logsumexp,
    jaxsoftmax.cross_entropy,
    jaxsoftmax.cross_entropy,
)
LONG = 2000
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
over_groups = pytest.mark.parametrize("group", ["3", "100", str(LONG), "masked"])


@cache
def rows_of(group: str, dtype: Any) -> tuple[Inputs, list[Row]]:
    """All families of one length, so that there is one program for them."""
    families = exact.families(dtype, LONG, every=3)
    if group == "masked":
        inputs = families["masked"]
    else:
        members = [
            part
            for part in families.values()
            if part.where is None and part.x.shape[1] == int(group)
        ]
        x, v, label, labels = (
            jnp.concatenate([getattr(part, field) for part in members])
            for field in ("x", "v", "label", "labels")
        )
        inputs = Inputs(x, None, v, label, labels)
    return inputs, exact.make_rows(inputs.x, inputs.where)


@jax.jit
def results(inputs: Inputs) -> list[Any]:
    return [exact.compute(OURS, quantity, inputs) for quantity in QUANTITIES]


@over_dtypes
@over_groups
def test_errors_are_within_their_targets(group: str, dtype: Any) -> None:
    inputs, rows = rows_of(group, dtype)
    for quantity, result in zip(QUANTITIES, results(inputs), strict=True):
        expected = exact.reference(quantity.exact, rows, *inputs.vectors()[quantity.argument])
        units = exact.units(result, expected, jnp.finfo(result.dtype))
        used = units / exact.bound(quantity, rows, np.asarray(inputs.label))
        assert used.max() <= 1, (quantity, units.max(), used.max())
        if result.dtype.itemsize == 2 and quantity.transform is None:
            rounded = jnp.asarray(expected.high, jnp.float32).astype(result.dtype)
            assert np.mean(exact.as_float64(result) == exact.as_float64(rounded)) >= 0.99, quantity
            assert units.max() <= 1, (quantity, units.max())


@over_dtypes
@over_groups
def test_rows_of_the_softmax_sum_to_one_and_those_of_its_vjp_to_zero(
    group: str, dtype: Any
) -> None:
    inputs, _ = rows_of(group, dtype)
    p = exact.as_float64(results(inputs)[0])
    info = jnp.finfo(dtype)
    # Each entry that is no normal number may be off by its own rounding.
    least = float(info.tiny) * p.shape[1]
    assert np.abs(p.sum(-1) - 1).max() <= 2 * float(info.eps) * np.sqrt(p.shape[1]) + least
    row = np.abs(exact.as_float64(results(inputs)[2]))
    off = np.abs(exact.as_float64(results(inputs)[2]).sum(-1))
    # 4 eps of the largest entry, or where many are as large the rounding of their sum.
    assert (off <= float(info.eps) * np.maximum(4 * row.max(-1), row.sum(-1)) + least).all()
