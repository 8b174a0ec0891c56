"""Fits along a path of penalties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax import Fit, Status, fit_path, l2_grid
from tests.fits import CLASSES, L2, TOL, WIDTH, data, small_fit
from tests.helpers import WIDE

L2S = np.array([1e-2, 10.0, 1e-4, 0.3])  # in no order


def test_a_path_equals_single_fits() -> None:
    features, labels = data()
    path = fit_path(features, labels, num_classes=CLASSES, l2s=L2S, tol=TOL)
    assert (path.status == Status.CONVERGED).all()
    for i, l2 in enumerate(L2S):
        single = small_fit(features, labels, l2=l2)
        for of_path, alone in zip(path.params, single.params, strict=True):
            np.testing.assert_allclose(
                of_path[i], alone, atol=1e-6 if WIDE == jnp.float64 else 2e-3
            )
        np.testing.assert_allclose(path.objective[i], single.objective, rtol=2 * TOL)
