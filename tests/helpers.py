"""Cases, dtypes and references that the tests share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

# float64 has its own run, with JAX_ENABLE_X64=1.
X64 = bool(jax.config.read("jax_enable_x64"))
WIDE = jnp.float64 if X64 else jnp.float32
in_double = pytest.mark.skipif(not X64, reason="finite differences need JAX_ENABLE_X64=1")
DTYPES = [jnp.float64] if X64 else [jnp.float32, jnp.bfloat16, jnp.float16]


def eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


class Case(NamedTuple):
    """Logits with the axis and the mask that go with them."""

    name: str
    x: NDArray[Any]
    axis: Any = -1
    where: Any = None


def _normal(*shape: int, scale: float = 3.0) -> NDArray[Any]:
    return scale * np.random.default_rng(sum(shape)).normal(size=shape)


def _mask(*shape: int) -> NDArray[Any]:
    mask = np.random.default_rng(len(shape)).random(shape) < 0.7
    mask[..., 0] = True
    return mask


CASES = [
    Case("vector", _normal(5)),
    Case("single entry", _normal(4, 1)),
    Case("matrix", _normal(3, 7)),
    Case("leading axis", _normal(6, 4), 0),
    Case("long leading axis", _normal(40, 3), 0),
    Case("middle axis", _normal(2, 5, 3), 1),
    Case("negative axis", _normal(2, 5, 3), -3),
    Case("two axes", _normal(2, 5, 3), (0, -1)),
    Case("all axes", _normal(2, 5, 3), None),
    Case("no axis", _normal(2, 3), ()),
    Case("long row", _normal(1000)),
    Case("equal entries", np.zeros((2, 9))),
    Case("dominant entry", np.array([[40.0, 0.0, -3.0], [0.0, 60.0, 60.0]])),
    Case("common offset", 1024.0 + np.round(_normal(3, 4))),
    Case("impossible classes", np.array([[-np.inf, 0.0, 1.0], [2.0, -np.inf, -np.inf]])),
    Case("mask", _normal(3, 7), -1, _mask(3, 7)),
    Case("mask over the leading axis", _normal(6, 4), 0, _mask(4, 6).T),
    Case("broadcast mask", _normal(3, 7), -1, _mask(7)),
    Case("mask over two axes", _normal(2, 5, 3), (0, 1), _mask(3, 5, 2).T),
    Case("scalar mask", _normal(3), -1, np.array(True)),
]
CASE_IDS = [case.name for case in CASES]


def logits_of(case: Case, dtype: Any) -> tuple[jax.Array, NDArray[Any]]:
    """The case in `dtype`, and the same rounded numbers in float64 with -inf where masked."""
    x = jnp.asarray(case.x).astype(dtype)
    exact = np.asarray(x.astype(jnp.float32) if dtype != WIDE else x, dtype=np.float64)
    return x, exact if case.where is None else np.where(case.where, exact, -np.inf)


_mpf = np.vectorize(mpmath.mpf, otypes=[object])
_log = np.vectorize(mpmath.log, otypes=[object])
_exp = np.vectorize(mpmath.exp, otypes=[object])


def reference(x: NDArray[Any], axis: Any) -> tuple[NDArray[Any], ...]:
    """Softmax, log-softmax and log-sum-exp at 80 digits, rounded to float64 at the end."""
    with mpmath.workdps(80):
        exact = _mpf(x)
        e = _exp(exact)
        total = np.sum(e, axis=axis, keepdims=True)
        results = e / total, exact - _log(total), _log(np.sum(e, axis=axis))
        return tuple(np.asarray(result).astype(np.float64) for result in results)
