"""What a fit says of its result, on data that mislead: the status, the gap, the gradient norm."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax import Fit, Params, Status, fit
from jaxsoftmax.regression._plan import Plan
from tests.fits import (
    CLASSES,
    EXAMPLES,
    L2,
    WIDTH,
    data,
    make_problem,
    objective,
    planned_fit,
    small_fit,
    status,
)
from tests.helpers import WIDE, eps, in_double

pytestmark = pytest.mark.slow

TOL = 1e-6
PENALTIES = pytest.mark.parametrize("l2", [0.0, L2])
SOLVERS = pytest.mark.parametrize("solver", ["newton_cg", "lbfgs"])


fitted = partial(small_fit, tol=TOL)


def same_optimum(result: Fit, expected: Fit) -> None:
    assert status(result) == status(expected) == Status.CONVERGED
    np.testing.assert_allclose(result.objective, expected.objective, rtol=4 * TOL)
    np.testing.assert_allclose(result.params.weights, expected.params.weights, atol=0.02)


@pytest.mark.single
@PENALTIES
@pytest.mark.parametrize("weight", [0.0, 1e-7])
def test_a_dropped_example_of_another_size_hides_no_column(l2: float, weight: float) -> None:
    features, labels = data()
    weights = jnp.ones(EXAMPLES, WIDE).at[0].set(weight)
    plain = fitted(features, labels, l2=l2, sample_weight=weights)
    huge = features.at[0, 1].set(1e6 if weight == 0 else 100.0)
    same_optimum(fitted(huge, labels, l2=l2, sample_weight=weights), plain)


@pytest.mark.single
@SOLVERS
def test_offsets_that_separate_do_not_make_the_examples_separable(solver: str) -> None:
    features, labels = jnp.array([[0.0], [1], [0], [1]], WIDE), jnp.array([0, 0, 1, 1])
    offset = 5 * jax.nn.one_hot(labels, 2, dtype=WIDE)
    result = fit(features, labels, num_classes=2, l2=0.0, offset=offset, solver=solver)
    assert status(result) == Status.CONVERGED
    np.testing.assert_allclose(result.objective, np.log1p(np.exp(-5)), rtol=1e-5)
    np.testing.assert_allclose(result.params.weights, 0, atol=1e-2)


def test_separable_examples_are_so_whatever_their_offsets() -> None:
    features, _ = data()
    labels = features[:, :CLASSES].argmax(-1)
    offset = jnp.asarray(np.random.default_rng(1).normal(size=(EXAMPLES, CLASSES)), WIDE)
    for shift in (offset, offset.at[:, 0].set(30.0)):
        result = fitted(features, labels, l2=0.0, offset=shift)
        assert status(result) == Status.SEPARABLE
        np.testing.assert_allclose(result.gap, 1)


@pytest.mark.single
@SOLVERS
def test_shares_of_several_classes_are_never_separable(solver: str) -> None:
    features = jnp.array([[0.0], [1.0], [2.0]], WIDE)
    labels = jnp.array([[0.97, 0.03], [0.96, 0.04], [0.98, 0.02]], WIDE)
    result = fit(features, labels, num_classes=2, l2=0.0, solver=solver)
    assert status(result) == Status.CONVERGED
    entropy = -jnp.sum(labels * jnp.log(labels)) / 3
    assert entropy < result.objective < 1.02 * entropy


@PENALTIES
@pytest.mark.parametrize("size", [30.0, 100.0, 300.0])
def test_a_saturated_start_is_left(l2: float, size: float) -> None:
    features, labels = data()
    best = fitted(features, labels, l2=l2)
    offset = jnp.zeros((EXAMPLES, CLASSES), WIDE).at[:, 0].set(size)
    same_optimum(fitted(features, labels, l2=l2, offset=offset), best)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(CLASSES, WIDTH))
    far = Params(jnp.asarray(size * weights, WIDE), jnp.asarray(size * rng.normal(size=3), WIDE))
    same_optimum(fitted(features, labels, l2=l2, init=far), best)


@PENALTIES
@pytest.mark.parametrize("max_iter", [0, 1, 2, 5])
def test_a_start_without_curvature_has_no_small_gap(l2: float, max_iter: int) -> None:
    features, labels = data()
    best = fitted(features, labels, l2=l2)
    offset = jnp.zeros((EXAMPLES, CLASSES), WIDE).at[:, 0].set(1e4)
    result = fitted(features, labels, l2=l2, offset=offset, max_iter=max_iter)
    assert status(result) != Status.CONVERGED
    assert result.objective * (1 - result.gap) <= best.objective


@pytest.mark.single
@PENALTIES
@pytest.mark.parametrize("examples", [1, 5])
def test_without_features_the_bias_has_the_shares_of_the_classes(l2: float, examples: int) -> None:
    labels = jnp.array([0, 0, 0, 1, 2])[:examples]
    result = fit(jnp.zeros((examples, 0), WIDE), labels, num_classes=3, l2=l2)
    assert status(result) == Status.CONVERGED
    shares = np.bincount(labels, minlength=3) / examples
    np.testing.assert_allclose(jax.nn.softmax(result.params.bias), shares, atol=1e-3)


@pytest.mark.parametrize("max_iter", [0, 1, 2, 100])
@pytest.mark.parametrize("distance", [0.3, 3.0])
def test_the_gap_is_a_bound_far_from_the_optimal_bias(distance: float, max_iter: int) -> None:
    # The bias' own Hessian is that of a cluster that weights and bias share.
    rng = np.random.default_rng(0)
    ends, cluster = np.repeat([1.0, -1.0], 300), 0.5 + 0.01 * rng.normal(size=400)
    features = jnp.asarray(np.concatenate([ends, cluster])[:, None], WIDE)
    labels = jnp.asarray(np.concatenate([np.repeat([0, 1], 300), rng.integers(0, 2, 400)]))
    run = partial(fit, features, labels, num_classes=2, l2=1e-6)
    best = run()
    bias = best.params.bias + distance / 2 * jnp.array([1, -1], WIDE)
    there = run(offset=jnp.tile(bias, (1000, 1)), fit_bias=False)
    result = run(init=Params(there.params.weights, bias), max_iter=max_iter)
    rounding = 8 * eps(WIDE)
    assert result.objective * (1 - result.gap - rounding) <= best.objective
    if max_iter == 0:
        true = 1 - best.objective / result.objective
        assert true <= result.gap * (1 + 1e-3)
        assert true > 10 * TOL
    if max_iter == 100:
        assert status(result) == Status.CONVERGED


def test_without_penalty_an_unsolved_newton_system_is_no_certificate() -> None:
    # So nearly dependent that the diagonal is a poor preconditioner.
    plan = Plan(factor_bytes=0)
    assert plan.preconditioning(200, 40, CLASSES, kept=True).groups == 0
    rng = np.random.default_rng(0)
    common = rng.normal(size=(200, 1))
    features = jnp.asarray(common + 1e-2 * rng.normal(size=(200, 40)), WIDE)
    labels = jnp.asarray(rng.integers(0, CLASSES, 200))
    run = partial(planned_fit, plan, features, labels, l2=0.0, tol=TOL)
    best = run()
    assert status(best) == Status.CONVERGED
    for max_iter in range(6):
        result = run(max_iter=max_iter)
        true = 1 - best.objective / result.objective
        assert true <= 2 * result.gap + 10 * eps(WIDE)


@pytest.mark.single
@PENALTIES
@pytest.mark.parametrize("shape", [(EXAMPLES, WIDTH), (12, 30)])
def test_the_gradient_norm_is_that_of_the_objective(shape: tuple[int, int], l2: float) -> None:
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=shape) + 10, WIDE)
    labels = jnp.asarray(rng.integers(0, CLASSES, shape[0]))
    result = fit(features, labels, num_classes=CLASSES, l2=l2, max_iter=2)
    problem = make_problem(features, labels, num_classes=CLASSES)
    gradient = jax.grad(objective)(result.params, problem, jnp.asarray(l2, WIDE))
    expected = np.sqrt(np.sum(gradient.weights**2) + np.sum(gradient.bias**2))
    assert expected > 1e-3
    np.testing.assert_allclose(result.gradient_norm, expected, rtol=1e-2)


@pytest.mark.single
def test_separable_examples_have_gap_1_from_any_start() -> None:
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(32 * CLASSES * WIDTH, WIDTH)), WIDE)
    labels = features[:, :CLASSES].argmax(-1)
    run = partial(fit, features, labels, num_classes=CLASSES, l2=0.0)
    first = run()
    again = run(init=first.params)
    for result in (first, again):
        assert status(result) == Status.SEPARABLE
        np.testing.assert_allclose(result.gap, 1)


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
def test_a_tolerance_that_is_none_under_jit_gives_nan() -> None:
    features, labels = data()
    run = jax.jit(lambda tol: fitted(features, labels, tol=tol))
    for tol in (0.0, -1.0, np.nan):
        result = run(tol)
        assert status(result) == Status.DIVERGED
        assert jnp.isnan(result.params.weights).all()
        assert jnp.isnan(result.gap)
    assert status(run(TOL)) == Status.CONVERGED


@in_double
def test_weights_that_float32_can_not_hold_fit_float32_features() -> None:
    features, labels = data()
    narrow = features.astype(jnp.float32)
    run = partial(fit, narrow, labels, num_classes=CLASSES, l2=L2)
    for weight in (1e300, 1e-300):
        result = run(sample_weight=np.full(EXAMPLES, weight))
        assert result.params.weights.dtype == jnp.float32
        same_optimum(result, run())


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
def test_a_dropped_example_may_have_any_label_under_jit() -> None:
    features, labels = data()
    weights = jnp.ones(EXAMPLES, WIDE).at[0].set(0.0)
    run = jax.jit(lambda labels: fitted(features, labels, sample_weight=weights))
    expected = run(labels)
    for label in (-1, CLASSES):
        same_optimum(run(labels.at[0].set(label)), expected)
