"""Arrays as people bring them: any byte order and layout, masks, objects, other libraries."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from jaxsoftmax import (
    cross_entropy,
    cross_validate,
    fit,
    linear_cross_entropy,
    log_softmax,
    logsumexp,
    softmax,
)

pytestmark = [pytest.mark.single, pytest.mark.usefixtures("no_jaxtyping")]

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(12, 3)).astype(np.float32)
LABELS = np.arange(12, dtype=np.int16) % 3
WEIGHTS = RNG.normal(size=(3, 3)).astype(np.float32)

# Of features and labels.
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "softmax": lambda x, y: softmax(x),
    "log_softmax": lambda x, y: log_softmax(x),
    "logsumexp": lambda x, y: logsumexp(x, 1, abs(x)),
    "cross_entropy": lambda x, y: cross_entropy(x, y),
    "linear_cross_entropy": lambda x, y: linear_cross_entropy(x, WEIGHTS, y),
    "fit": lambda x, y: fit(x, y, num_classes=3).params,
    "cross_validate": lambda x, y: cross_validate(x, y, num_classes=3, l2s=np.ones(1)).log_loss,
}
over_calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)

LAYOUTS: dict[str, Callable[[NDArray[Any]], Any]] = {
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "little-endian": lambda a: a.astype(a.dtype.newbyteorder("<")),
    "columns first": np.asfortranarray,
    "reversed twice": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "without a masked entry": np.ma.masked_array,
}


@over_calls
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_nothing(call: Callable[[Any, Any], Any], layout: str) -> None:
    change = LAYOUTS[layout]
    features, labels = change(FEATURES), change(LABELS)
    features.flags.writeable = labels.flags.writeable = False
    jax.tree.map(np.testing.assert_array_equal, call(features, labels), call(FEATURES, LABELS))


@over_calls
def test_a_masked_entry_is_an_error(call: Callable[[Any, Any], Any]) -> None:
    hidden = np.zeros(FEATURES.shape, bool)
    hidden[1, 2] = True
    with pytest.raises(ValueError, match="must have no masked entry, got 1"):
        call(np.ma.masked_array(FEATURES, hidden), LABELS)


@pytest.mark.usefixtures("no_debug_nans")  # by which pandas marks what is missing
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "fit", "cross_validate"])
def test_masked_and_missing_labels_are_errors(name: str) -> None:
    masked = np.ma.masked_array(LABELS, LABELS == 1)
    with pytest.raises(ValueError, match="labels must have no masked entry, got 4"):
        CALLS[name](FEATURES, masked)
    missing = pd.Series([*LABELS[:11], None], dtype="Int64")
    with pytest.raises(TypeError, match=r"labels .* integer"):
        CALLS[name](FEATURES, missing)


def test_masked_folds_are_an_error() -> None:
    folds = np.ma.masked_array(LABELS, LABELS == 1)
    with pytest.raises(ValueError, match="folds must have no masked entry, got 4"):
        cross_validate(FEATURES, LABELS, num_classes=3, folds=folds)


@over_calls
def test_numbers_of_more_than_64_bits_are_an_error(call: Callable[[Any, Any], Any]) -> None:
    if np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("this platform has none")
    with pytest.raises(TypeError, match=r"must have at most 64 bits a number, got dtype \w+128"):
        call(FEATURES.astype(np.longdouble), LABELS)


def test_what_is_no_number_is_named() -> None:
    entries = FEATURES.astype(object)
    entries[2, 1] = "much"
    with pytest.raises(TypeError, match=r"features must .* dtype object with the entry 'much'"):
        fit(entries, LABELS, num_classes=3)


def test_frames_are_arrays() -> None:
    result, expected = (fit(x, LABELS, num_classes=3) for x in (pd.DataFrame(FEATURES), FEATURES))
    np.testing.assert_array_equal(result.params.weights, expected.params.weights)
