"""The fit: its optimum, its certificate, its invariances and its transformations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from sklearn.linear_model import LogisticRegression

from jaxsoftmax import Fit, Params, Status, diverging_weights, fit, linear_logits, softmax
from jaxsoftmax.regression._plan import Plan
from tests.fits import (
    CLASSES,
    EXAMPLES,
    L2,
    TOL,
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

# The objective is L2-strongly convex in the weights: a gap of TOL leaves them this far off.
close = partial(np.testing.assert_allclose, rtol=1e-3, atol=(2 * TOL * np.log(CLASSES) / L2) ** 0.5)


def test_the_optimum_is_that_of_scikit_learn() -> None:
    features, labels = data()
    result = fit(features, labels, num_classes=CLASSES, l2=L2, tol=TOL, max_iter=500)
    assert status(result) == Status.CONVERGED
    assert result.gap <= TOL
    peer = LogisticRegression(C=1 / (L2 * EXAMPLES), solver="newton-cg", tol=1e-10)
    peer.fit(np.asarray(features, np.float64), np.asarray(labels))
    close(result.params.weights, peer.coef_)
    close(result.params.bias, peer.intercept_)
    close(softmax(linear_logits(result.params, features)), peer.predict_proba(features))
    problem = make_problem(features, labels, num_classes=CLASSES)
    there = Params(*(jnp.asarray(value, WIDE) for value in (peer.coef_, peer.intercept_)))
    best = objective(there, problem, jnp.asarray(L2))
    assert abs(result.objective - best) <= max(TOL, 4 * eps(WIDE)) * best


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("fit_bias", [True, False])
def test_the_gap_bounds_the_true_distance(tol: float, fit_bias: bool) -> None:
    features, labels = data()
    best = small_fit(features + 1, labels, fit_bias=fit_bias)
    rough = small_fit(features + 1, labels, fit_bias=fit_bias, tol=tol)
    distance = (rough.objective - best.objective) / best.objective
    assert status(rough) == Status.CONVERGED
    assert distance - 4 * eps(WIDE) <= rough.gap <= tol


def test_without_penalty_the_gap_is_the_newton_decrement() -> None:
    features, labels = data()
    best = small_fit(features, labels, l2=0.0)
    rough = small_fit(features, labels, l2=0.0, tol=1e-3)
    assert status(best) == status(rough) == Status.CONVERGED
    distance = (rough.objective - best.objective) / best.objective
    assert 1e-7 < rough.gap <= 1e-3
    np.testing.assert_allclose(rough.gap, distance, rtol=0.1)
    peer = LogisticRegression(C=np.inf, solver="newton-cg", tol=1e-10)
    peer.fit(np.asarray(features, np.float64), np.asarray(labels))
    close(result_weights(best), peer.coef_ - peer.coef_.mean(0))


def result_weights(result: Fit) -> jax.Array:
    return result.params.weights


@pytest.mark.parametrize("scales", [[1, 1, 1, 1e-6], [1e5, 1, 1, 1e-3], [1e-20] * 4])
def test_without_penalty_no_scale_of_a_column_passes_for_an_optimum(scales: list[float]) -> None:
    features, labels = data()
    best = small_fit(features, labels, l2=0.0)
    scaled = small_fit(features * jnp.array(scales, WIDE), labels, l2=0.0, max_iter=200)
    reached = scaled.objective <= best.objective * (1 + 1e-4)
    assert reached or status(scaled) != Status.CONVERGED
    assert reached or not scaled.gap <= 1e-4


@pytest.mark.parametrize("solver", ["newton_cg", "lbfgs"])
def test_separable_data_without_penalty_end_finite_and_say_so(solver: str) -> None:
    features, _ = data()
    labels = features[:, :CLASSES].argmax(-1)
    result = small_fit(features, labels, l2=0.0, solver=solver)
    assert status(result) == Status.SEPARABLE
    assert jnp.isfinite(result.params.weights).all()
    assert result.objective < np.log(2) / EXAMPLES
    if solver == "newton_cg":
        assert result.objective <= TOL
        np.testing.assert_allclose(result.gap, 1)
    assert (linear_logits(result.params, features).argmax(-1) == labels).all()


@pytest.mark.single
@pytest.mark.parametrize("weight", [1e37, 1e-37])
def test_weights_of_any_size_give_the_same_fit(weight: float) -> None:
    features, labels = data()
    weights = jnp.full(EXAMPLES, weight, jnp.float32)
    result = small_fit(features, labels, sample_weight=weights.astype(WIDE))
    assert status(result) == Status.CONVERGED
    close(result.params.weights, small_fit(features, labels).params.weights)


@pytest.mark.single
def test_features_near_zero_do_not_pass_for_an_optimum_without_penalty() -> None:
    features, labels = data()
    result = small_fit(1e-2 * features, labels, l2=0.0, tol=1e-4)
    assert status(result) == Status.CONVERGED
    best = small_fit(features, labels, l2=0.0)
    np.testing.assert_allclose(result.objective, best.objective, rtol=2e-4)


@pytest.mark.parametrize("l2", [0.0, L2])
def test_parameters_sum_to_zero_over_the_classes(l2: float) -> None:
    features, labels = data()
    start = Params(jnp.ones((CLASSES, WIDTH), WIDE), jnp.arange(CLASSES).astype(WIDE))
    for kwargs in ({}, {"init": start}):
        result = small_fit(features, labels, l2=l2, **kwargs)
        assert jnp.abs(result.params.weights.sum(0)).max() < 10 * eps(WIDE)
        assert jnp.abs(result.params.bias.sum()) < 10 * eps(WIDE)


@pytest.mark.single
def test_probability_labels_are_taken_and_one_hot_rows_equal_integers() -> None:
    features, labels = data()
    by_integers = small_fit(features, labels)
    by_rows = small_fit(features, jax.nn.one_hot(labels, CLASSES, dtype=WIDE))
    close(by_rows.params.weights, by_integers.params.weights)
    soft = jnp.full((EXAMPLES, CLASSES), 1 / CLASSES, WIDE)
    uniform = small_fit(features, soft)
    close(uniform.params.weights, 0)
    close(uniform.objective, np.log(CLASSES))


@pytest.mark.single
def test_weights_equal_repeated_and_dropped_rows() -> None:
    features, labels = data()
    counts = np.random.default_rng(1).multinomial(EXAMPLES, np.full(EXAMPLES, 1 / EXAMPLES))
    weighted = small_fit(features, labels, sample_weight=jnp.asarray(counts, WIDE))
    repeated = small_fit(jnp.repeat(features, counts, 0), jnp.repeat(labels, counts))
    close(weighted.params.weights, repeated.params.weights)
    close(weighted.params.bias, repeated.params.bias)
    close(weighted.objective, repeated.objective, rtol=1e-5)


@pytest.mark.single
def test_an_absent_class_has_probability_zero_and_changes_nothing() -> None:
    features, labels = data()
    weight = jnp.ones(EXAMPLES, WIDE).at[0].set(0.0)
    extra = small_fit(
        features, labels.at[0].set(CLASSES), num_classes=CLASSES + 1, sample_weight=weight
    )
    dropped = small_fit(features, labels, sample_weight=weight)
    close(extra.params.weights[:CLASSES], dropped.params.weights)
    assert not extra.params.weights[CLASSES].any()
    probabilities = softmax(linear_logits(extra.params, features))
    np.testing.assert_array_equal(probabilities[:, CLASSES], 0)
    # Such a fit may start another in which the class is present.
    again = small_fit(
        features, labels.at[0].set(CLASSES), num_classes=CLASSES + 1, init=extra.params
    )
    assert status(again) == Status.CONVERGED


@pytest.mark.single
def test_an_offset_is_added_to_the_logits() -> None:
    features, labels = data()
    shift = jnp.array([0.5, -1.0, 0.5], WIDE)
    plain = small_fit(features, labels)
    moved = small_fit(features, labels, offset=jnp.tile(shift, (EXAMPLES, 1)))
    close(moved.params.weights, plain.params.weights)
    close(moved.params.bias, plain.params.bias - shift)


@pytest.mark.single
def test_without_a_bias_it_is_zero() -> None:
    features, labels = data()
    result = small_fit(features, labels, fit_bias=False)
    peer = LogisticRegression(
        C=1 / (L2 * EXAMPLES), solver="newton-cg", tol=1e-10, fit_intercept=False
    )
    peer.fit(np.asarray(features, np.float64), np.asarray(labels))
    close(result.params.weights, peer.coef_)
    assert not result.params.bias.any()


@pytest.mark.single
def test_the_bias_is_not_penalised() -> None:
    features, labels = data()
    result = small_fit(features, labels, l2=1e4)
    shares = jnp.bincount(labels, length=CLASSES) / EXAMPLES
    close(softmax(result.params.bias), shares, rtol=1e-4)
    constant = small_fit(features.at[:, -1].set(5.0), labels)
    close(constant.params.weights[:, -1], 0)


@pytest.mark.single
def test_a_warm_start_at_the_optimum_takes_no_iteration() -> None:
    features, labels = data()
    result = small_fit(features, labels, tol=1e-5)
    again = small_fit(features, labels, tol=1e-5, init=result.params)
    assert again.iterations == 0
    assert status(again) == Status.CONVERGED


def test_how_a_fit_ends() -> None:
    features, labels = data()
    limited = small_fit(features, labels, max_iter=3)
    assert status(limited) == Status.MAX_ITER
    assert limited.iterations == 3
    assert limited.gap > TOL
    assert status(small_fit(features, labels, max_iter=0)) == Status.MAX_ITER
    impossible = small_fit(features, labels, tol=1e-36)
    assert status(impossible) == Status.STALLED
    assert 0 < impossible.gap < 1e-6


@pytest.mark.single
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("no_debug_nans")
def test_a_feature_that_is_not_finite_diverges_to_nan(bad: float) -> None:
    features, labels = data()
    result = small_fit(features.at[3, 1].set(bad), labels)
    assert status(result) == Status.DIVERGED
    for value in (*result.params, result.objective, result.gap):
        assert jnp.isnan(value).all()


def test_the_diverging_columns_and_classes_of_separable_data_are_named() -> None:
    # statsmodels#516: the first column is constant, the second separates.
    features, labels = jnp.array([[1.0, 0], [1, 0], [1, 2], [1, 1]], WIDE), jnp.array([1, 1, 0, 0])
    result = fit(features, labels, num_classes=2, l2=0.0)
    assert status(result) == Status.SEPARABLE
    assert jnp.isfinite(result.params.weights).all()
    diverging = diverging_weights(result.params, features, labels)
    np.testing.assert_array_equal(diverging.weights, [[False, True]] * 2)


def test_columns_that_separate_some_examples_are_named() -> None:
    features, labels = data()
    some = jnp.arange(EXAMPLES) < 9
    features = features.at[:, 2].set(jnp.where(some, 1e3, 0.0))
    labels = jnp.where(some, 1, labels)
    result = small_fit(features, labels, l2=0.0, tol=1e-6)
    assert status(result) == Status.CONVERGED
    diverging = diverging_weights(result.params, features, labels)
    np.testing.assert_array_equal(diverging.weights.any(0), [False, False, True, False])
    assert diverging.weights[1, 2]
    features, labels = data()
    result = small_fit(features, labels, l2=0.0)
    assert not diverging_weights(result.params, features, labels).weights.any()


SCALES = [[1e4, 1, 1, 1e-4], [1e-3, 1e-1, 10, 1e3]]


@pytest.mark.parametrize("scales", SCALES)
def test_without_penalty_the_scale_of_columns_changes_nothing(scales: list[float]) -> None:
    features, labels = data()
    scaled = features * jnp.array(scales, WIDE)
    plain, other = (small_fit(x, labels, l2=0.0, tol=1e-6) for x in (features, scaled))
    assert status(plain) == status(other) == Status.CONVERGED
    assert 2 * other.iterations <= 3 * plain.iterations
    before, after = (
        softmax(linear_logits(result.params, x))
        for result, x in ((plain, features), (other, scaled))
    )
    np.testing.assert_allclose(after, before, atol=1e-5)


@in_double  # in float32 the gradient is not exact enough for so small a penalty
@pytest.mark.parametrize("scales", SCALES)
def test_with_a_penalty_a_fit_of_scaled_columns_converges_as_soon(scales: list[float]) -> None:
    features, labels = data()
    plain = small_fit(features, labels, l2=1e-4, tol=1e-6)
    other = small_fit(features * jnp.array(scales, WIDE), labels, l2=1e-4, tol=1e-6)
    assert status(plain) == status(other) == Status.CONVERGED
    assert 2 * other.iterations <= 3 * plain.iterations


def test_a_column_far_from_zero_is_fitted_as_the_centred_one() -> None:
    features, labels = data()
    far = jnp.round(features * 64) / 64  # so that adding 8192 does not round
    near, moved = small_fit(far, labels), small_fit(far + 8192, labels)
    assert status(near) == status(moved) == Status.CONVERGED
    close(moved.params.weights, near.params.weights)


def test_a_penalised_fit_agrees_with_lbfgs() -> None:
    features, labels = data()
    tol = 1e-8 if jnp.float64 == WIDE else TOL
    newton, lbfgs = (
        small_fit(features, labels, solver=solver, tol=tol) for solver in ("newton_cg", "lbfgs")
    )
    assert status(newton) == status(lbfgs) == Status.CONVERGED
    np.testing.assert_allclose(newton.objective, lbfgs.objective, rtol=2 * tol)
    assert newton.iterations < lbfgs.iterations


@pytest.mark.parametrize("l2", [0.0, 1e-2])
def test_directions_that_the_data_do_not_determine(l2: float) -> None:
    features, labels = data()
    best = small_fit(features, labels, l2=l2)
    p = softmax(linear_logits(best.params, features))

    def same(columns: jax.Array) -> Fit:
        result = fit(columns, labels, num_classes=CLASSES, l2=l2, tol=TOL, max_iter=500)
        assert status(result) == Status.CONVERGED
        assert jnp.abs(result.params.weights.sum(0)).max() < 100 * eps(WIDE)
        return result

    constant = jnp.full((EXAMPLES, 1), 3.0, WIDE)
    with_constant = same(jnp.concatenate([features, constant], 1))
    close(with_constant.params.weights[:, -1], 0)
    close(softmax(linear_logits(with_constant.params, jnp.c_[features, constant])), p)
    doubled = same(jnp.concatenate([features, features[:, :1]], 1))
    if l2 > 0:
        close(doubled.params.weights[:, 0], doubled.params.weights[:, -1])
    else:
        pair = doubled.params.weights[:, 0] + doubled.params.weights[:, -1]
        close(pair, best.params.weights[:, 0])
        close(softmax(linear_logits(doubled.params, jnp.c_[features, features[:, :1]])), p)


@pytest.mark.parametrize("fit_bias", [True, False])
def test_more_features_than_examples(fit_bias: bool) -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(12, 30)) + 1, rng.integers(0, CLASSES, 12)
    result = fit(
        jnp.asarray(features, WIDE), labels, num_classes=CLASSES, l2=L2, tol=TOL, fit_bias=fit_bias
    )
    assert status(result) == Status.CONVERGED
    peer = LogisticRegression(
        C=1 / (L2 * 12), solver="newton-cg", tol=1e-10, fit_intercept=fit_bias
    ).fit(features, labels)
    close(result.params.weights, peer.coef_)
    close(result.params.bias, peer.intercept_)


@pytest.mark.parametrize("examples", [2, 3])
def test_one_example_per_class(examples: int) -> None:
    features = jnp.eye(examples, 5, dtype=WIDE)
    result = fit(features, jnp.arange(examples), num_classes=examples, l2=0.1, tol=TOL)
    assert status(result) == Status.CONVERGED
    probabilities = softmax(linear_logits(result.params, features))
    np.testing.assert_array_equal(probabilities.argmax(-1), jnp.arange(examples))
    np.testing.assert_allclose(probabilities, probabilities.T, atol=1e-3)
    alone = fit(features, jnp.arange(examples), num_classes=examples, l2=0.0)
    assert status(alone) == Status.SEPARABLE


def test_two_classes_equal_the_binary_model_of_twice_the_penalty() -> None:
    features, labels = data()
    labels = (labels == 0).astype(int)
    result = small_fit(features, labels, num_classes=2)
    peer = LogisticRegression(C=2 / (L2 * EXAMPLES), solver="newton-cg", tol=1e-10)
    peer.fit(np.asarray(features, np.float64), np.asarray(labels))
    close(result.params.weights[1] - result.params.weights[0], peer.coef_[0])


@pytest.mark.parametrize("l2", [0.0, L2])
def test_a_single_present_class_is_certain(l2: float) -> None:
    features, labels = data()
    result = small_fit(features, jnp.zeros_like(labels), l2=l2)
    assert status(result) == Status.CONVERGED
    assert result.objective == 0
    probabilities = softmax(linear_logits(result.params, features))
    np.testing.assert_array_equal(probabilities[:, 0], 1)


@in_double
@pytest.mark.parametrize("labelled", ["classes", "probabilities"])
@pytest.mark.parametrize("fit_bias", [True, False])
def test_derivatives_of_a_fit_equal_finite_differences(labelled: str, fit_bias: bool) -> None:
    """Along random directions in which all arguments change."""
    features, labels = data()
    rng = np.random.default_rng(1)
    arguments: dict[str, Any] = {
        "l2": jnp.asarray(0.05),
        "sample_weight": jnp.asarray(rng.uniform(0.5, 1.5, EXAMPLES)),
        "features": features,
        "offset": jnp.asarray(rng.normal(size=(EXAMPLES, CLASSES))),
    }
    if labelled == "probabilities":
        arguments["logits"] = jnp.asarray(rng.normal(size=(EXAMPLES, CLASSES)))

    def fitted(arguments: dict[str, Any]) -> tuple[Params, jax.Array]:
        kwargs = dict(arguments)
        of = softmax(kwargs.pop("logits")) if "logits" in kwargs else labels
        result = fit(
            kwargs.pop("features"),
            of,
            num_classes=CLASSES,
            fit_bias=fit_bias,
            tol=1e-14,
            **kwargs,
        )
        return result.params, result.objective

    check_grads(fitted, (arguments,), order=1, atol=1e-5, rtol=1e-5, eps=1e-4)


@in_double
def test_derivatives_of_many_features_and_few_examples_equal_finite_differences() -> None:
    rng = np.random.default_rng(0)
    features, labels = jnp.asarray(rng.normal(size=(12, 30)) + 1), rng.integers(0, CLASSES, 12)

    def fitted(features: jax.Array, l2: jax.Array) -> tuple[Params, jax.Array]:
        result = fit(features, labels, num_classes=CLASSES, l2=l2, tol=1e-14)
        return result.params, result.objective

    check_grads(fitted, (features, jnp.asarray(0.05)), order=1, atol=1e-5, rtol=1e-5, eps=1e-4)
    l2s = jnp.array([0.01, 0.1])
    batched, _ = jax.vmap(fitted, (None, 0))(features, l2s)
    for one, l2 in zip(batched.weights, l2s, strict=True):
        np.testing.assert_allclose(one, fitted(features, l2)[0].weights, atol=1e-6)


@in_double
def test_second_derivatives_of_a_fit_equal_finite_differences() -> None:
    features, labels = data()

    @jax.jit
    @jax.grad
    def slope(l2: jax.Array) -> jax.Array:
        result = fit(features, labels, num_classes=CLASSES, l2=l2, tol=1e-14)
        return jnp.sum(result.params.weights**3)

    check_grads(slope, (jnp.asarray(0.05),), order=1, atol=1e-5, rtol=1e-5, eps=2e-5)


@pytest.mark.single
def test_products_have_full_precision_on_every_device() -> None:
    features, labels = data()

    def size(features: jax.Array, solver: str) -> jax.Array:
        result = fit(features, labels, num_classes=CLASSES, l2=L2, solver=solver)
        return jnp.sum(result.params.weights**2)

    for f in (size, jax.grad(size)):
        for solver in ("newton_cg", "lbfgs"):
            program = jax.jit(f, static_argnums=1).lower(features, solver).as_text()
            products = [line for line in program.splitlines() if "dot_general" in line]
            assert products
            assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.single
def test_derivatives_of_a_fit_under_vmap_equal_a_loop() -> None:
    features, labels = data()

    @jax.jit
    @jax.grad
    def slope(l2: jax.Array) -> jax.Array:
        return jnp.sum(small_fit(features, labels, l2=l2).params.weights ** 2)

    l2s = jnp.array([0.01, 0.1], WIDE)
    np.testing.assert_allclose(jax.vmap(slope)(l2s), [slope(l2) for l2 in l2s], rtol=1e-3)


@pytest.mark.single
def test_logits_of_a_large_problem_are_never_formed_at_once() -> None:
    examples, classes, width = 20000, 1000, 8
    program = fit_program(examples, classes, width)
    logits = 4 * examples * classes
    assert program.memory_analysis().temp_size_in_bytes < logits / 2


def fit_program(examples: int, classes: int, width: int) -> Any:
    features = jax.ShapeDtypeStruct((examples, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((examples,), jnp.int32)
    return jax.jit(partial(fit, num_classes=classes)).lower(features, labels).compile()


@pytest.mark.single
def test_a_problem_in_blocks_of_rows_has_the_same_fit() -> None:
    features, labels = data()
    blocks = Plan(kept_logits=0, block_logits=8 * CLASSES)  # 8 rows, which do not divide 60
    for l2 in (0.0, L2):
        one, other = (planned_fit(plan, features, labels, l2=l2) for plan in (Plan(), blocks))
        assert status(one) == status(other) == Status.CONVERGED
        close(one.params.weights, other.params.weights)
        close(one.objective, other.objective, rtol=10 * TOL)


@pytest.mark.single
def test_jit_equals_eager_and_a_bad_value_under_it_gives_nan() -> None:
    features, labels = data()
    ones = jnp.ones(EXAMPLES, WIDE)

    @jax.jit
    def jitted(labels: jax.Array, l2: float = L2, weight: jax.Array = ones) -> Fit:
        return small_fit(features, labels, l2=l2, sample_weight=weight)

    good = jitted(labels, L2, ones)
    assert status(good) == Status.CONVERGED
    close(good.params.weights, small_fit(features, labels).params.weights)
    for result in (
        jitted(labels.at[0].set(CLASSES), 1e-2, ones),
        jitted(labels.at[0].set(-1), 1e-2, ones),
        jitted(labels, -1e-3, ones),
        jitted(labels, L2, ones.at[2].set(-1.0)),
        jitted(labels, 1e-2, 0 * ones),
    ):
        assert status(result) == Status.DIVERGED
        assert jnp.isnan(result.params.weights).all()


@pytest.mark.single
def test_low_precision_and_integer_features_are_computed_in_float32() -> None:
    features, labels = data()
    low = features.astype(jnp.bfloat16)
    expected = small_fit(low.astype(jnp.float32), labels, tol=1e-5)
    result = small_fit(low, labels, tol=1e-5)
    assert result.params.weights.dtype == jnp.float32
    close(result.params.weights, expected.params.weights)
    whole = jnp.round(features).astype(jnp.int32)
    assert small_fit(whole, labels).params.weights.dtype == WIDE


# Transformations


@pytest.mark.single
def test_one_shape_is_compiled_once(caplog: pytest.LogCaptureFixture) -> None:
    features, labels = data()
    small_fit(features, labels)
    scaled = 2 * features
    with caplog.at_level("WARNING"), jax.log_compiles():
        small_fit(scaled, labels, l2=0.5, tol=1e-3, max_iter=7)
    assert not [record for record in caplog.records if "Compiling" in record.message]


def assert_equals_loop(batched: Fit, singles: list[Fit]) -> None:
    for i, single in enumerate(singles):
        assert batched.status[i] == single.status
        close(batched.params.weights[i], single.params.weights)
        close(batched.params.bias[i], single.params.bias)
        close(batched.objective[i], single.objective, rtol=1e-5)


@pytest.mark.single
def test_scan_over_penalties_with_warm_starts() -> None:
    features, labels = data()

    def body(params: Params, l2: jax.Array) -> tuple[Params, jax.Array]:
        result = small_fit(features, labels, l2=l2, init=params)
        return result.params, result.objective

    l2s = jnp.array([1.0, 1e-1, 1e-2], WIDE)
    start = Params(jnp.zeros((CLASSES, WIDTH), WIDE), jnp.zeros(CLASSES, WIDE))
    _, objectives = jax.lax.scan(body, start, l2s)
    singles = [small_fit(features, labels, l2=l2).objective for l2 in l2s]
    np.testing.assert_allclose(objectives, singles, rtol=1e-5)


# Bad input


@pytest.mark.single
@pytest.mark.parametrize("solver", ["newton_cg", "lbfgs"])
def test_each_solver_takes_features_of_low_precision(solver: str) -> None:
    features, labels = data()
    rounded = features.astype(jnp.bfloat16)
    for l2 in (0.0, L2):
        low = small_fit(rounded, labels, solver=solver, l2=l2, tol=1e-5)
        high = small_fit(rounded.astype(WIDE), labels, solver=solver, l2=l2, tol=1e-5)
        assert low.params.weights.dtype == jnp.float32
        np.testing.assert_allclose(low.objective, high.objective, rtol=1e-4)


@pytest.mark.single
@pytest.mark.usefixtures("no_jaxtyping")
def test_a_fit_in_place_of_its_parameters_is_named() -> None:
    features, labels = data()
    result: Any = small_fit(features, labels)
    with pytest.raises(TypeError, match="params must be a Params, got a Fit"):
        diverging_weights(result, features, labels)


@pytest.mark.single
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"features": np.zeros(6)},
            ValueError,
            r"features must have shape \(examples, features\), got",
        ),
        (
            {"features": np.zeros((0, 2))},
            ValueError,
            r"features must have shape .* got shape \(0, 2\)",
        ),
        ({"features": np.array([["a"]])}, TypeError, "features must be an array of numbers"),
        (
            {"labels": np.zeros(5, int)},
            ValueError,
            r"labels must have shape \(examples,\) = \(6,\)",
        ),
        (
            {"labels": np.zeros(6)},
            TypeError,
            r"labels of shape \(6,\), one per example, must have an",
        ),
        (
            {"labels": np.ones((6, 2))},
            ValueError,
            r"labels must have shape \(examples, classes\) = \(6, 3\), got shape \(6, 2\)",
        ),
        ({"labels": np.ones((6, 3))}, ValueError, "labels must be probabilities, .* sum to 3"),
        ({"labels": np.zeros(6, bool)}, TypeError, "labels must be integer classes or floating"),
        (
            {"labels": np.arange(6)},
            ValueError,
            r"labels must be in \[0, 3\) for num_classes=3, got values from 0 to 5",
        ),
        (
            {"labels": -np.ones(6, int)},
            ValueError,
            r"labels must be in .* got values from -1 to -1",
        ),
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2, got 1"),
        ({"num_classes": 3.0}, TypeError, "num_classes must be an integer, got 3.0"),
        ({"num_classes": True}, TypeError, "num_classes must be an integer, got the bool True"),
        ({"l2": -1.0}, ValueError, "l2 must be at least 0, got -1.0"),
        ({"l2": np.nan}, ValueError, "l2 must be at least 0, got nan"),
        ({"l2": 10**400}, TypeError, "l2 must be an array of numbers, got 1000"),
        ({"l2": np.ones(2)}, ValueError, r"l2 must be a scalar, got shape \(2,\); use jax.vmap"),
        ({"l2": "big"}, TypeError, "l2 must be an array of numbers, got 'big'"),
        ({"sample_weight": np.ones(5)}, ValueError, r"sample_weight must have shape \(examples,\)"),
        ({"sample_weight": -np.ones(6)}, ValueError, "sample_weight must not be negative"),
        ({"sample_weight": np.zeros(6)}, ValueError, "sample_weight must have a positive entry"),
        ({"offset": np.zeros((6, 2))}, ValueError, r"offset must have shape \(examples, classes\)"),
        (
            {"init": Params(jnp.zeros((2, 3)), jnp.zeros(3))},
            ValueError,
            r"init.weights must have shape \(classes, features\) = \(3, 2\), got shape \(2, 3\)",
        ),
        (
            {"init": Params(jnp.zeros((3, 2)), jnp.zeros(2))},
            ValueError,
            r"init.bias must have shape \(classes,\) = \(3,\), got shape \(2,\)",
        ),
        (
            {"init": (np.zeros((3, 2)), np.zeros(3))},
            TypeError,
            "init must be a Params, got a tuple",
        ),
        (
            {"solver": "sgd"},
            ValueError,
            "solver must be one of 'auto', 'newton_cg', 'lbfgs', got 'sgd'",
        ),
        ({"fit_bias": 1}, TypeError, "fit_bias must be True or False, got 1"),
        ({"tol": 0.0}, ValueError, "tol must be above 0, got 0.0"),
        ({"max_iter": -1}, ValueError, "max_iter must be at least 0, got -1"),
        ({"max_iter": 1.5}, TypeError, "max_iter must be an integer, got 1.5"),
    ],
)
@pytest.mark.usefixtures("no_jaxtyping", "no_debug_nans")
def test_bad_arguments_are_named(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {
        "features": np.zeros((6, 2), np.float32),
        "labels": np.array([0, 1, 2, 0, 1, 2]),
        "num_classes": 3,
    }
    with pytest.raises(error, match=message):
        fit(**(good | kwargs))


@pytest.mark.single
@pytest.mark.parametrize("constant", [0.0, 1.0, 3.7, -250.0])
def test_a_constant_column_hides_no_diverging_one(constant: float) -> None:
    features = np.array([[constant, x] for x in (-3, -2, -1, 1, 2, 3)], np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1])
    result = fit(features, labels, num_classes=2, l2=0.0)
    found = diverging_weights(result.params, features, labels)
    np.testing.assert_array_equal(found.weights.any(0), [False, True])
