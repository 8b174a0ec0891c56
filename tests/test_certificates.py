"""The certificate on thousands of small random problems, beside damped Newton steps in NumPy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from jaxsoftmax import Fit, Params, Status, fit
from jaxsoftmax.regression.solver._certificate import distant
from tests.helpers import WIDE, X64, eps

Floats = NDArray[np.float64]
TOL = 1e-6


class Problems(NamedTuple):
    """Arrays with a leading axis of problems."""

    features: Floats
    labels: NDArray[Any]
    sample_weight: Floats
    offset: Floats
    init: Params
    l2: Floats


def problems(shape: tuple[int, int, int], count: int, *, soft: bool, seed: int) -> Problems:
    """Small integers as features, weights from 1e-5 to 1 and 0, offsets to 30, starts to 40,
    penalties 0 and 1e-6 to 10, classes that may be absent."""
    rng = np.random.default_rng(seed)
    examples, width, classes = shape
    labels: NDArray[Any] = rng.integers(0, classes, (count, examples))
    if soft:
        share = rng.choice([0.0, 0.3], (count, examples, 1))
        mixed = rng.dirichlet(np.ones(classes), (count, examples))
        labels = (1 - share) * np.eye(classes)[labels] + share * mixed
    weight = 10.0 ** rng.choice([0, 0, -1, -3, -5], (count, examples))
    weight *= rng.choice([1, 1, 1, 0], weight.shape)
    weight[:, 0] = np.maximum(weight[:, 0], 1e-3)
    reach = rng.choice([0, 1, 5, 30], (count, 1, 1))
    start = rng.choice([0, 0, 1, 40], (count, 1, 1))
    penalty = np.where(rng.random(count) < 0.4, 0, 10 ** rng.uniform(-6, 1, count))
    weights = start * rng.normal(size=(count, classes, width))
    return Problems(
        features=rng.integers(-1, 2, (count, examples, width)).astype(np.float64),
        labels=labels,
        sample_weight=weight,
        offset=reach * rng.uniform(-1, 1, (count, examples, classes)),
        init=Params(weights, start[:, :, 0] * rng.normal(size=(count, classes))),
        l2=penalty,
    )


def penalties(data: Problems, columns: int) -> Floats:
    ridge = np.repeat(data.l2[:, None], columns, 1)
    ridge[:, -1] = 0
    return ridge


def objectives(data: Problems, table: Floats) -> tuple[Floats, Floats, Floats]:
    """Objective, gradient and probabilities of tables (problems, classes, features + 1)."""
    classes = table.shape[1]
    x = np.concatenate([data.features, np.ones((*data.features.shape[:2], 1))], 2)
    share = data.sample_weight / data.sample_weight.sum(1, keepdims=True)
    targets = data.labels if data.labels.ndim == 3 else np.eye(classes)[data.labels]
    present = (share[:, :, None] * targets).sum(1) > 0
    z = np.einsum("ikd,ind->ink", table, x) + data.offset
    z = np.where(present[:, None], z, -1e9)
    z = z - z.max(2, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(2, keepdims=True))
    p = np.exp(log_p)
    ridge = np.concatenate(
        [np.repeat(data.l2[:, None], x.shape[2] - 1, 1), 0 * data.l2[:, None]], 1
    )
    losses = -np.where(targets > 0, targets * log_p, 0).sum(2)
    losses = np.where(share > 0, losses, 0)
    value = (share * losses).sum(1) + 0.5 * (ridge[:, None] * table**2).sum((1, 2))
    gradient = np.einsum("ink,ind->ikd", share[:, :, None] * (p - targets), x)
    return value, gradient * present[:, :, None] + ridge[:, None] * table, p


def minima(data: Problems, table: Floats, steps: int = 400) -> Floats:
    """The least objectives that damped Newton steps from a table find."""
    count, classes, columns = table.shape
    x = np.concatenate([data.features, np.ones((*data.features.shape[:2], 1))], 2)
    share = data.sample_weight / data.sample_weight.sum(1, keepdims=True)
    ridge = penalties(data, columns)
    value, gradient, p = objectives(data, table)
    damping = np.full(count, 1e-3)
    for _ in range(steps):
        curvature = p[..., None] * np.eye(classes) - p[..., :, None] * p[..., None, :]
        hessian = np.einsum("in,inkl,ind,ine->ikdle", share, curvature, x, x, optimize=True)
        hessian = hessian.reshape(count, classes * columns, -1)
        hessian += np.tile(ridge, (1, classes))[:, None] * np.eye(classes * columns)
        sizes, axes = np.linalg.eigh(hessian)
        along = np.einsum("iab,ia->ib", axes, gradient.reshape(count, -1))
        along /= np.maximum(sizes, 0) + damping[:, None]
        step = np.einsum("iab,ib->ia", axes, along).reshape(table.shape)
        step *= np.minimum(1, 20 / np.maximum(abs(step).max((1, 2)), 1e-300))[:, None, None]
        new_value, new_gradient, new_p = objectives(data, table - step)
        better = new_value < value
        damping = np.clip(np.where(better, damping / 4, damping * 6), 1e-15, 1e6)
        value = np.where(better, new_value, value)
        of = better[:, None, None]
        table = np.where(of, table - step, table)
        gradient, p = np.where(of, new_gradient, gradient), np.where(of, new_p, p)
    return value


def fitted(data: Problems) -> Fit:
    classes = data.offset.shape[2]

    def one(data: Problems) -> Fit:
        return fit(**data._asdict(), num_classes=classes, tol=TOL)

    arrays = jax.tree.map(
        lambda v: jnp.asarray(v, WIDE if np.issubdtype(v.dtype, np.floating) else None), data
    )
    result: Fit = jax.device_get(jax.jit(jax.vmap(one))(arrays))
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "soft"),
    [((4, 1, 2), False), ((6, 2, 3), False), ((3, 1, 3), False), ((4, 1, 3), True)],
)
def test_no_certificate_is_false(shape: tuple[int, int, int], soft: bool) -> None:
    data = problems(shape, 600, soft=soft, seed=shape[0])
    result = fitted(data)
    # In float32 the data are rounded, and the objective that is certified is that of these.
    dtype = np.float64 if X64 else np.float32
    rounded: Problems = jax.tree.map(
        lambda v: v.astype(dtype).astype(np.float64) if v.dtype == np.float64 else v, data
    )
    bias = np.where(np.isfinite(result.params.bias), result.params.bias, 0)
    table = np.concatenate([result.params.weights, bias[..., None]], 2).astype(np.float64)
    value = objectives(rounded, table)[0]
    least = np.minimum.reduce([value, minima(rounded, table), minima(rounded, 0 * table)])
    true, gap = value - least, result.gap * value
    rounding = 100 * eps(WIDE) * np.maximum(value, 1)
    converged = result.status == Status.CONVERGED
    assert (true[converged] <= 1.01 * TOL * value[converged] + rounding[converged]).all()
    # Where nothing is penalised, what a step leaves of the gradient counts from its rounding on.
    distance = 200 + np.ptp(data.offset, 2).max(1) + 2 * abs(table).max((1, 2))
    uncounted = 4 * eps(WIDE) * value * distance * table[0].size
    rounding += np.where(data.l2 == 0, uncounted, 0)
    bounded = result.status != Status.SEPARABLE
    assert (gap[bounded] >= 0.99 * true[bounded] - rounding[bounded]).all()
    ended = converged | (result.status == Status.SEPARABLE)
    if X64:
        assert (ended | (least < 1e-9)).all()  # of which the objective has few digits
    else:
        ended |= result.status == Status.STALLED
        assert ended.mean() > 0.99
    assert converged.mean() > 0.7


@pytest.mark.parametrize(
    ("features", "labels", "changed", "minimum"),
    [
        ([[1], [1], [0], [1]], [0, 1, 0, 0], {"l2": 0, "bias": [19, -13]}, 0.477386),
        (
            [[1], [0], [0]],
            [0, 1, 2],
            {
                "l2": 1,
                "weight": [1e-5, 1e-5, 0.01],
                "offset": [[2, 2, 1], [1, -4, -5], [-3, 5, -4]],
            },
            0.0238964,
        ),
        (
            [[-1], [1], [1], [1], [-1], [0]],
            [0, 1, 2, 2, 2, 0],
            {"l2": 1, "bias": [-33, -40, -3]},
            0.981,
        ),
    ],
)
def test_saturated_starts_and_tiny_weights_reach_the_minimum(
    features: Any, labels: Any, changed: dict[str, Any], minimum: float
) -> None:
    classes = max(labels) + 1
    init = Params(
        jnp.zeros((classes, 1), WIDE), jnp.asarray(changed.get("bias", [0] * classes), WIDE)
    )
    result = fit(
        jnp.asarray(features, WIDE),
        jnp.asarray(labels),
        num_classes=classes,
        l2=changed["l2"],
        init=init,
        sample_weight=jnp.asarray(changed.get("weight", [1] * len(labels)), WIDE),
        offset=jnp.asarray(changed.get("offset", [[0] * classes] * len(labels)), WIDE),
    )
    assert Status(int(result.status)) in (Status.CONVERGED, Status.STALLED)
    np.testing.assert_allclose(result.objective, minimum, rtol=1e-3)


def test_a_gap_is_no_less_than_the_distance_where_the_bias_is_off() -> None:
    arguments: dict[str, Any] = {
        "sample_weight": jnp.asarray([1e-5, 0.1, 1e-4], WIDE),
        "offset": jnp.asarray([[1, 5, -3], [-1, -1, 1], [-3, -3, -5]], WIDE),
        "num_classes": 3,
        "l2": 1.0,
    }
    features, labels = jnp.asarray([[0.0], [0.0], [-1.0]], WIDE), jnp.arange(3)
    best = fit(features, labels, tol=1e-12 if X64 else TOL, **arguments)
    for max_iter in range(8):
        result = fit(features, labels, max_iter=max_iter, **arguments)
        distance = float(result.objective - best.objective)
        assert result.gap * result.objective >= 0.99 * distance - 10 * eps(WIDE)


def test_far_out_what_rounding_hides_of_the_gradient_counts() -> None:
    value, gradient = jnp.ones(1, WIDE), jnp.zeros((2, 1, 2), WIDE)
    near, far = (distant(0 * value, jnp.full_like(gradient, t), gradient, value) for t in (1, 9e6))
    assert near == 0
    assert far > 1e6 * eps(WIDE)
