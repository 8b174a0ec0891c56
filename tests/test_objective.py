"""The objective: its value, its derivatives, its data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from sklearn._loss import HalfMultinomialLoss
from sklearn.linear_model._linear_loss import LinearModelLoss

from jaxsoftmax import Params, linear_logits
from jaxsoftmax.regression._data import Problem
from jaxsoftmax.regression._objective import as_they_came
from tests.fits import make_problem
from tests.fits import objective as objective_of
from tests.helpers import WIDE, eps, in_double

EXAMPLES, WIDTH, CLASSES, L2 = 30, 4, 3, 0.05
ZERO = jnp.zeros(())


def problem() -> Problem:
    rng = np.random.default_rng(0)
    return make_problem(
        jnp.asarray(rng.normal(size=(EXAMPLES, WIDTH)) + 0.5, WIDE),
        jnp.asarray(rng.integers(0, CLASSES, EXAMPLES)),
        jnp.asarray(rng.uniform(size=EXAMPLES), WIDE),
        num_classes=CLASSES,
    )


def objective(at: Params, data: Problem, l2: float = L2, *, fit_bias: bool = True) -> jax.Array:
    return objective_of(at, data, jnp.asarray(l2, WIDE), fit_bias=fit_bias)


def params() -> Params:
    rng = np.random.default_rng(1)
    return Params(
        jnp.asarray(rng.normal(size=(CLASSES, WIDTH)), WIDE), jnp.asarray(rng.normal(size=3), WIDE)
    )


def test_value_and_gradient_equal_those_of_scikit_learn() -> None:
    data, at = problem(), params()
    loss = LinearModelLoss(HalfMultinomialLoss(n_classes=CLASSES), fit_intercept=True)
    coef = np.column_stack([*map(np.asarray, at)]).astype(np.float64)
    value, gradient = loss.loss_gradient(
        np.asfortranarray(coef),
        np.asarray(data.features, np.float64),
        np.asarray(data.labels, np.float64),
        sample_weight=np.asarray(data.share, np.float64),
        l2_reg_strength=L2,
    )
    ours, (weights, bias) = jax.value_and_grad(objective)(at, data)
    np.testing.assert_allclose(ours, value, 20 * eps(WIDE))
    np.testing.assert_allclose(weights, gradient[:, :WIDTH], 1e-4, 20 * eps(WIDE))
    np.testing.assert_allclose(bias, gradient[:, WIDTH], 1e-4, 20 * eps(WIDE))


@in_double
def test_derivatives_equal_finite_differences() -> None:
    data = problem()
    check_grads(jax.jit(lambda at: objective(at, data)), (params(),), order=2)


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
def test_probability_labels_that_are_none_make_the_objective_nan() -> None:
    features = jnp.ones((2, WIDTH), WIDE)
    for row in ([0.5, 0.5, 0.5], [1.5, -0.5, 0.0]):
        labels = jnp.array([[1.0, 0.0, 0.0], row], WIDE)
        assert jnp.isnan(objective(params(), make_problem(features, labels, num_classes=CLASSES)))


def test_a_fixed_bias_has_gradient_zero() -> None:
    gradient = jax.grad(lambda at: objective(at, problem(), fit_bias=False))(params())
    assert not gradient.bias.any()
    assert gradient.weights.any()


def test_labels_of_a_narrow_dtype_name_any_class() -> None:
    labels = jnp.array([3, 200], jnp.uint8)
    rows, _ = as_they_came(make_problem(jnp.ones((2, 1)), labels, num_classes=300), 300, ZERO)
    np.testing.assert_array_equal(np.flatnonzero(rows.present), [3, 200])


@pytest.mark.usefixtures("no_debug_nans")
def test_a_label_too_large_for_32_bits_is_not_wrapped_into_a_class() -> None:
    largest = jnp.iinfo(jnp.asarray(0).dtype).max
    labels = jnp.array([0, largest - largest % 2**32 + 1 if largest >= 2**32 else largest])
    data = make_problem(jnp.ones((2, 1)), labels, num_classes=3)
    zeros = Params(jnp.zeros((3, 1)), jnp.zeros(3))
    assert jnp.isnan(objective_of(zeros, data, ZERO))


@pytest.mark.single
def test_examples_of_weight_zero_are_dropped_though_their_loss_is_infinite() -> None:
    features, labels = jnp.ones((3, 2)), jnp.array([0, 1, 2])
    weight = jnp.array([1.0, 1.0, 0.0])
    data = make_problem(features, labels, weight, num_classes=4)
    rows, _ = as_they_came(data, 4, ZERO)
    np.testing.assert_array_equal(rows.present[:, 0, 0], [True, True, False, False])
    at = Params(jnp.ones((4, 2)), jnp.zeros(4))
    value, gradient = jax.value_and_grad(objective)(at, data, 0.0)
    np.testing.assert_allclose(value, np.log(2), 4 * eps(WIDE))
    assert jnp.isfinite(gradient.weights).all()
    assert not gradient.weights[2:].any()


@pytest.mark.single
def test_linear_logits_take_any_batch_and_cast_the_features() -> None:
    at = params()
    assert linear_logits(at, jnp.ones(WIDTH, jnp.bfloat16)).dtype == WIDE
    stacked = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, WIDTH)), WIDE)
    logits = linear_logits(at, stacked)
    expected = np.asarray(stacked, np.float64) @ np.asarray(at.weights, np.float64).T
    np.testing.assert_allclose(logits, expected + np.asarray(at.bias), 1e-5, 1e-6)


@pytest.mark.single
@pytest.mark.usefixtures("no_jaxtyping")
def test_linear_logits_name_a_bad_argument() -> None:
    message = r"features must have shape \(..., 4\) to fit weights of shape \(3, 4\), got"
    with pytest.raises(ValueError, match=message):
        linear_logits(params(), jnp.zeros(2))
    with pytest.raises(TypeError, match="features must hold real numbers, got dtype complex64"):
        linear_logits(params(), jnp.zeros(4, jnp.complex64))
    with pytest.raises(
        ValueError, match=r"weights must have shape \(classes, features\), got .*\(4,\)"
    ):
        linear_logits(Params(jnp.zeros(4), jnp.zeros(1)), jnp.zeros(4))
    with pytest.raises(
        ValueError, match=r"bias must have shape \(classes,\) = \(1,\), got shape \(2,\)"
    ):
        linear_logits(Params(jnp.zeros((1, 4)), jnp.zeros(2)), jnp.zeros(4))


def test_integer_parameters_do_not_truncate_the_features() -> None:
    at = Params(jnp.ones((3, 4), int), jnp.ones(3, int))
    np.testing.assert_array_equal(linear_logits(at, jnp.full((2, 4), 0.5)), np.full((2, 3), 3.0))
