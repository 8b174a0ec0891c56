"""Cross-entropy with integer and probability labels."""

from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxsoftmax import cross_entropy
from tests import helpers
from tests.helpers import DTYPES, WIDE, eps

pytestmark = pytest.mark.usefixtures("fresh_programs")
inf, nan = np.inf, np.nan
close = partial(np.testing.assert_allclose, rtol=20 * eps(WIDE), atol=4 * eps(WIDE))


def logits(*shape: int) -> jax.Array:
    return 3 * jax.random.normal(jax.random.key(sum(shape)), shape, WIDE)


def probabilities(*shape: int) -> jax.Array:
    return jax.nn.softmax(jax.random.normal(jax.random.key(7), shape, WIDE))


def test_both_kinds_of_labels_equal_optax() -> None:
    z, p = logits(4, 3, 5), probabilities(4, 3, 5)
    integers = p.argmax(-1)
    close(
        cross_entropy(z, integers),
        optax.losses.softmax_cross_entropy_with_integer_labels(z, integers),
    )
    close(cross_entropy(z, p), optax.losses.softmax_cross_entropy(z, p))


@pytest.mark.single
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_class_axis_may_stand_anywhere(axis: int) -> None:
    z, p = logits(4, 3, 5), probabilities(4, 3, 5)
    moved, p_moved = jnp.moveaxis(z, -1, axis), jnp.moveaxis(p, -1, axis)
    close(cross_entropy(moved, p.argmax(-1), axis=axis), cross_entropy(z, p.argmax(-1)))
    close(cross_entropy(moved, p_moved, axis=axis), cross_entropy(z, p))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def test_the_loss_is_never_below_float32(dtype: Any) -> None:
    z = logits(3, 5).astype(dtype)
    exact = np.asarray(z if dtype == WIDE else z.astype(jnp.float32), np.float64)
    labels = np.array([0, 4, 2])
    loss = cross_entropy(z, labels)
    assert loss.dtype == (dtype if dtype == WIDE else jnp.float32)
    expected = -helpers.reference(exact, -1)[1][np.arange(3), labels]
    np.testing.assert_allclose(loss, expected, rtol=20 * eps(loss.dtype))
    one_hot = jax.nn.one_hot(labels, 5, dtype=dtype)
    np.testing.assert_allclose(cross_entropy(z, one_hot), expected, rtol=20 * eps(loss.dtype))
    assert jax.grad(lambda z: cross_entropy(z, labels).sum())(z).dtype == dtype


@pytest.mark.single
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.uint32])
def test_any_integer_dtype_names_classes(dtype: Any) -> None:
    z = logits(2, 300)
    close(cross_entropy(z, jnp.array([3, 100], dtype)), cross_entropy(z, jnp.array([3, 100])))


@pytest.mark.single
@pytest.mark.parametrize("offset", [1e4, 1e6, 1e8])
def test_large_equal_logits_are_exact(offset: float) -> None:
    z = jnp.full(2, offset, jnp.float32)
    np.testing.assert_allclose(cross_entropy(z, 0), np.log(2), rtol=eps(jnp.float32))


@pytest.mark.single
def test_large_logits_keep_their_difference() -> None:
    z = jnp.array([1e6 + 2, 1e6 - 1], jnp.float32)
    np.testing.assert_allclose(cross_entropy(z, 0), 0.04858735, rtol=1e-6)


def test_impossible_and_masked_classes() -> None:
    z = jnp.array([-inf, 0.0])
    assert cross_entropy(z, jnp.array([0.0, 1.0])) == 0
    assert cross_entropy(z, 1) == 0
    assert cross_entropy(z, 0) == inf
    assert cross_entropy(z, jnp.array([0.5, 0.5])) == inf
    where = jnp.array([True, True, False])
    for hidden in (3.0, inf, nan):
        z = jnp.array([1.0, 2.0, hidden])
        assert cross_entropy(z, 2, where=where) == inf
        close(cross_entropy(z, 0, where=where), np.log1p(np.e))
        for labels in (0, jnp.array([0.25, 0.75, 0.0])):
            gradient = jax.grad(cross_entropy)(z, labels, where=where)
            assert jnp.isfinite(gradient).all()
            assert gradient[2] == 0


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.usefixtures("no_debug_nans")
def test_a_row_with_plus_infinity_is_nan(label: int) -> None:
    z = jnp.array([inf, 0.0])
    assert jnp.isnan(cross_entropy(z, label))
    assert jnp.isnan(jax.grad(cross_entropy)(z, label)).all()
    assert jnp.isnan(cross_entropy(z, jnp.array([0.5, 0.5])))


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
def test_a_label_too_large_for_the_default_integer_does_not_wrap() -> None:
    labels = np.array([2**32, 2**32 + 1, -(2**32)])
    assert jnp.isnan(cross_entropy(jnp.zeros((3, 4)), labels)).all()


@pytest.mark.single
def test_scaled_logits_inside_jit_equal_eager_ones() -> None:
    def scaled(x: jax.Array) -> jax.Array:
        return cross_entropy(x * c, x.argmax(-1))

    c = np.float32(1 / 3)
    rows = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32) * 1e11
    jitted = jax.jit(jax.value_and_grad(lambda x: scaled(x).sum()))(rows)
    assert jnp.isfinite(jitted[1]).all()
    np.testing.assert_allclose(jax.jit(scaled)(rows), scaled(jnp.asarray(rows)), atol=1e-6)


@pytest.mark.single
def test_an_ignored_row_that_is_masked_throughout_leaves_the_others_alone() -> None:
    z, labels = logits(2, 3), jnp.array([1, 2])
    where = jnp.array([[True, True, True], [False, False, False]])

    def mean_of_first(z: jax.Array) -> jax.Array:
        return jnp.sum(
            jnp.where(jnp.array([True, False]), cross_entropy(z, labels, where=where), 0)
        )

    gradient = jax.grad(mean_of_first)(z)
    close(gradient[0], jax.grad(lambda row: cross_entropy(row, 1))(z[0]))
    assert not gradient[1].any()


@pytest.mark.single
@pytest.mark.parametrize("label", [4, -1, -100])
@pytest.mark.usefixtures("no_debug_nans")
def test_a_label_out_of_range_is_nan_for_its_example_alone(label: int) -> None:
    z, labels = logits(3, 4), jnp.array([1, label, 3])
    loss = cross_entropy(z, labels)
    np.testing.assert_array_equal(jnp.isnan(loss), [False, True, False])
    gradient = jax.grad(lambda z: cross_entropy(z, labels).sum())(z)
    np.testing.assert_array_equal(jnp.isnan(gradient).all(-1), [False, True, False])
    np.testing.assert_array_equal(jnp.isnan(gradient).any(-1), [False, True, False])


def test_derivatives_equal_finite_differences() -> None:
    z, p = logits(2, 4), probabilities(2, 4)
    where = jnp.array([True, True, False, True])
    integers = jnp.array([0, 3])
    check_grads(jax.jit(lambda z: cross_entropy(z, integers)), (z,), order=2)
    check_grads(jax.jit(lambda z: cross_entropy(z, integers, where=where)), (z,), order=2)
    check_grads(jax.jit(cross_entropy), (z, p), order=2)


def test_the_gradient_is_p_minus_y_and_the_hessian_that_of_logsumexp() -> None:
    z, y = logits(5), probabilities(5)
    p = np.asarray(jax.nn.softmax(z))
    close(jax.grad(cross_entropy)(z, y), p - y)
    close(jax.grad(cross_entropy)(z, 2), p - np.eye(5)[2])
    for labels in (2, y):
        close(jax.hessian(cross_entropy)(z, labels), np.diag(p) - np.outer(p, p))


def test_the_gradient_with_respect_to_a_probability_of_zero_is_right() -> None:
    z, y = jnp.array([0.0, 1.0, -inf]), jnp.array([0.0, 1.0, 0.0])
    gradient = jax.grad(cross_entropy, argnums=1)(z, y)
    close(gradient, [1 + np.log1p(np.exp(-1)), np.log1p(np.exp(-1)), 0])


@pytest.mark.single
def test_jit_equals_eager_and_vmap_equals_a_loop() -> None:
    z, labels = logits(3, 4, 5), jnp.array([[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]])
    loss = cross_entropy(z, labels)
    close(jax.jit(cross_entropy)(z, labels), loss)
    close(jax.vmap(cross_entropy)(z, labels), loss)
    gradient = jax.grad(cross_entropy)
    batched = jax.vmap(gradient)(z[0], labels[0])
    close(batched, jnp.stack([gradient(*pair) for pair in zip(z[0], labels[0], strict=True)]))


@pytest.mark.single
@hypothesis.given(st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4), st.integers(0, 3))
def test_an_integer_equals_its_one_hot_row(z: list[float], label: int) -> None:
    row = jnp.array(z, jnp.float32)
    one_hot = jax.nn.one_hot(label, 4, dtype=jnp.float32)
    # The one-hot form rounds the logarithm of the whole sum, next to logits of up to 60.
    expected = cross_entropy(row, one_hot)
    np.testing.assert_allclose(cross_entropy(row, label), expected, 1e-6, eps(jnp.float32))


def test_a_confident_label_keeps_the_digits_of_its_loss_and_gradient() -> None:
    gap = 40.0 if jnp.float64 == WIDE else 20.0
    tail = np.exp(-gap)
    z = jnp.array([gap, 0.0, -inf], WIDE)
    value, gradient = jax.value_and_grad(cross_entropy)(z, 0)
    np.testing.assert_allclose(value, tail, 4 * eps(WIDE))
    np.testing.assert_allclose(gradient, [-tail, tail, 0], 4 * eps(WIDE))
    hessian = jax.hessian(cross_entropy)(z, 0)[:2, :2]
    np.testing.assert_allclose(hessian, [[tail, -tail], [-tail, tail]], 32 * eps(WIDE))


def test_one_residual_in_the_dtype_of_the_logits() -> None:
    labels = jnp.arange(3)
    for dtype in DTYPES:
        z = logits(3, 5).astype(dtype)
        residual, *rest = jax.tree.leaves(jax.vjp(lambda z: cross_entropy(z, labels), z)[1])
        assert residual.shape == z.shape
        assert residual.dtype == dtype
        # float16 cannot hold p - e_c of a confident label, so the logits and the labels are kept.
        assert [part.shape for part in rest] == ([labels.shape] if dtype == jnp.float16 else [])


@pytest.mark.single
@pytest.mark.parametrize(
    ("labels", "kwargs", "error", "message"),
    [
        (
            np.zeros(3, np.float32),
            {},
            TypeError,
            r"labels of shape \(3,\), one per example, must have an integer dtype, got float32",
        ),
        (
            np.zeros((3, 4), int),
            {},
            TypeError,
            r"labels of shape \(3, 4\), with an axis of classes, must be floating probabilities",
        ),
        (
            np.zeros(4, int),
            {},
            ValueError,
            r"labels must have shape \(batch axes of logits\) = \(3,\), got shape \(4,\)",
        ),
        (
            np.zeros((3, 5), np.float32),
            {},
            ValueError,
            r"labels must have shape \(shape of logits\) = \(3, 4\), got shape \(3, 5\)",
        ),
        (np.zeros(3, bool), {}, TypeError, "labels must be integer classes or .* got dtype bool"),
        (np.zeros(3, int), {"axis": 2}, ValueError, r"axis must be in \[-2, 2\)"),
        (np.zeros(3, int), {"axis": True}, TypeError, "axis must be an integer, got the bool True"),
        (np.zeros(3, int), {"where": np.ones(4)}, TypeError, "where must be boolean"),
        (
            np.zeros(3, int),
            {"where": np.ones(3, bool)},
            ValueError,
            "where must broadcast to shape",
        ),
    ],
)
@pytest.mark.usefixtures("no_jaxtyping")
def test_bad_arguments_are_named(
    labels: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    for f in (cross_entropy, jax.jit(lambda z, y: cross_entropy(z, y, **kwargs))):
        arguments = kwargs if f is cross_entropy else {}
        with pytest.raises(error, match=message):
            f(jnp.zeros((3, 4)), labels, **arguments)


@pytest.mark.single
@pytest.mark.usefixtures("no_jaxtyping")
def test_complex_logits_are_refused() -> None:
    with pytest.raises(TypeError, match="logits must hold real numbers, got dtype complex64"):
        cross_entropy(jnp.zeros((3, 4), jnp.complex64), jnp.zeros(3, int))
