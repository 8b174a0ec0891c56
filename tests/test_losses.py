"""Cross-entropy with integer and probability labels."""

from functools import partial
from typing import Any, NamedTuple, cast

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
from tests.helpers import DTYPES, WIDE, eps, in_double

# For tests in which a NaN may be hidden on the way.
fresh_programs = pytest.mark.usefixtures("fresh_programs")
inf, nan = np.inf, np.nan
close = partial(np.testing.assert_allclose, rtol=20 * eps(WIDE), atol=4 * eps(WIDE))


def logits(*shape: int) -> jax.Array:
    return jnp.asarray(3 * np.random.default_rng(sum(shape)).normal(size=shape), WIDE)


def probabilities(*shape: int) -> jax.Array:
    e = np.exp(np.random.default_rng(7).normal(size=shape))
    return jnp.asarray(e / e.sum(-1, keepdims=True), WIDE)


def softmax(z: Any) -> Any:
    e = np.exp(np.asarray(z, np.float64))
    return e / e.sum(-1, keepdims=True)


def one_hot(labels: Any, classes: int) -> Any:
    return (np.arange(classes) == np.asarray(labels)[..., None]).astype(WIDE)


def test_both_kinds_of_labels_equal_optax() -> None:
    z, p = logits(4, 3, 5), probabilities(4, 3, 5)

    @jax.jit
    def pairs(z: Any, p: Any, integers: Any) -> Any:
        of_classes = optax.losses.softmax_cross_entropy_with_integer_labels(z, integers)
        return (
            (cross_entropy(z, integers), of_classes),
            (cross_entropy(z, p), optax.losses.softmax_cross_entropy(z, p)),
        )

    for ours, theirs in pairs(z, p, np.argmax(p, -1)):
        close(ours, theirs)


@pytest.mark.single
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_class_axis_may_stand_anywhere(axis: int) -> None:
    z, p = logits(4, 3, 5), probabilities(4, 3, 5)
    moved, p_moved = (np.moveaxis(np.asarray(part), -1, axis) for part in (z, p))
    integers = np.argmax(p, -1)
    close(cross_entropy(moved, integers, axis=axis), cross_entropy(z, integers))
    close(cross_entropy(moved, p_moved, axis=axis), cross_entropy(z, p))


@pytest.mark.single
def test_several_axes_of_classes_are_one() -> None:
    z, p, where = logits(4, 3, 5), probabilities(4, 3, 5), jnp.array([[True], [True], [False]])
    flat = jnp.moveaxis(z, 0, -1).reshape(3, 20)
    classes = jnp.array([0, 7, 19])
    close(cross_entropy(z, classes, axis=(2, 0)), cross_entropy(flat, classes))
    allowed = jnp.broadcast_to(where, z.shape)
    y = jnp.where(allowed, p, 0)
    flat_y = jnp.moveaxis(y, 0, -1).reshape(3, 20)
    options: dict[str, Any] = {"label_smoothing": 0.1, "class_weight": jnp.arange(20.0)}
    ours = cross_entropy(z, y, axis=(-1, 0), where=where, **options)
    close(ours[:2], cross_entropy(flat, flat_y, **options)[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def test_the_loss_is_never_below_float32(dtype: Any) -> None:
    z = logits(3, 5).astype(dtype)
    exact = np.asarray(z if dtype == WIDE else z.astype(jnp.float32), np.float64)
    labels = np.array([0, 4, 2])
    loss = cross_entropy(z, labels)
    assert loss.dtype == (dtype if dtype == WIDE else jnp.float32)
    expected = -helpers.reference(exact, -1)[1][np.arange(3), labels]
    np.testing.assert_allclose(loss, expected, rtol=20 * eps(loss.dtype))
    row = jnp.asarray(one_hot(labels, 5), dtype)
    np.testing.assert_allclose(cross_entropy(z, row), expected, rtol=20 * eps(loss.dtype))
    gradient = jax.eval_shape(jax.grad(lambda z: cross_entropy(z, labels).sum()), z)
    assert gradient.dtype == dtype


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


@fresh_programs
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
            assert np.isfinite(gradient).all()
            assert gradient[2] == 0


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.usefixtures("no_debug_nans")
def test_a_row_with_plus_infinity_is_nan(label: int) -> None:
    z = jnp.array([inf, 0.0])
    assert np.isnan(cross_entropy(z, label))
    assert np.isnan(jax.grad(cross_entropy)(z, label)).all()
    assert np.isnan(cross_entropy(z, jnp.array([0.5, 0.5])))


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
def test_a_label_too_large_for_the_default_integer_does_not_wrap() -> None:
    labels = np.array([2**32, 2**32 + 1, -(2**32)])
    assert np.isnan(cross_entropy(jnp.zeros((3, 4)), labels)).all()


@pytest.mark.single
def test_scaled_logits_inside_jit_equal_eager_ones() -> None:
    def scaled(x: jax.Array) -> jax.Array:
        return cross_entropy(x * c, x.argmax(-1))

    c = np.float32(1 / 3)
    rows = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32) * 1e11
    jitted = jax.jit(jax.value_and_grad(lambda x: scaled(x).sum()))(rows)
    assert np.isfinite(jitted[1]).all()
    np.testing.assert_allclose(jax.jit(scaled)(rows), scaled(jnp.asarray(rows)), atol=1e-6)


@fresh_programs
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
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])
    gradient = jax.grad(lambda z: cross_entropy(z, labels).sum())(z)
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), [False, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), [False, True, False])


@in_double
def test_derivatives_equal_finite_differences() -> None:
    z, p = logits(2, 4), probabilities(2, 4)
    where = jnp.array([True, True, False, True])
    integers = jnp.array([0, 3])
    check_grads(jax.jit(lambda z: cross_entropy(z, integers)), (z,), order=2)
    check_grads(jax.jit(lambda z: cross_entropy(z, integers, where=where)), (z,), order=2)
    check_grads(jax.jit(cross_entropy), (z, p), order=2)


def test_the_gradient_is_p_minus_y_and_the_hessian_that_of_logsumexp() -> None:
    z, y = logits(5), probabilities(5)
    p = softmax(z)

    @jax.jit
    def derivatives(z: Any, labels: Any) -> Any:
        return jax.grad(cross_entropy)(z, labels), jax.hessian(cross_entropy)(z, labels)

    for labels, probability in ((2, np.eye(5)[2]), (y, y)):
        gradient, hessian = derivatives(z, labels)
        close(gradient, p - probability)
        close(hessian, np.diag(p) - np.outer(p, p))


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
    gradient = jax.jit(jax.grad(cross_entropy))
    batched = jax.jit(jax.vmap(gradient))(z[0], labels[0])
    close(batched, [gradient(*pair) for pair in zip(z[0], labels[0], strict=True)])


@pytest.mark.single
@hypothesis.given(st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4), st.integers(0, 3))
def test_an_integer_equals_its_one_hot_row(z: list[float], label: int) -> None:
    row = np.array(z, np.float32)
    # The one-hot form rounds the logarithm of the whole sum, next to logits of up to 60.
    expected = cross_entropy(row, one_hot(label, 4))
    np.testing.assert_allclose(cross_entropy(row, label), expected, 1e-6, eps(jnp.float32))


def test_a_confident_label_keeps_the_digits_of_its_loss_and_gradient() -> None:
    gap = 40.0 if jnp.float64 == WIDE else 20.0
    tail = np.exp(-gap)
    z = jnp.array([gap, 0.0, -inf], WIDE)

    @jax.jit
    def derivatives(z: Any) -> Any:
        return *jax.value_and_grad(cross_entropy)(z, 0), jax.hessian(cross_entropy)(z, 0)

    value, gradient, hessian = (np.asarray(part) for part in derivatives(z))
    np.testing.assert_allclose(value, tail, 4 * eps(WIDE))
    np.testing.assert_allclose(gradient, [-tail, tail, 0], 4 * eps(WIDE))
    hessian = hessian[:2, :2]
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


# Options

WHERE = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], bool)
WEIGHT = np.array([0.5, 2.0, 1.0, 0.0, 1.5])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"where": WHERE},
    "smoothing": {"label_smoothing": 0.3},
    "all of the label smoothed": {"label_smoothing": 1.0},
    "weights": {"class_weight": jnp.asarray(WEIGHT, WIDE)},
    "z-loss": {"z_loss": 0.1},
    "all": {
        "where": WHERE,
        "label_smoothing": 0.3,
        "class_weight": jnp.asarray(WEIGHT, WIDE),
        "z_loss": 0.1,
    },
}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Defined(NamedTuple):
    """Values, gradients and Hessians of each example by the formula of the docstring."""

    value: Any
    gradient: Any
    hessian: Any


def define(
    z: Any,
    y: Any,
    where: Any = True,
    label_smoothing: float = 0.0,
    class_weight: Any = 1.0,
    z_loss: float = 0.0,
) -> Defined:
    z, allowed = np.asarray(z, np.float64), np.broadcast_to(where, z.shape)
    n = allowed.sum(-1, keepdims=True)
    a = np.asarray(class_weight, np.float64) * allowed
    a = a * ((1 - label_smoothing) * np.asarray(y, np.float64) + label_smoothing / n)
    e = np.where(allowed, np.exp(z), 0)
    log_z = np.log(e.sum(-1, keepdims=True))
    p, total = np.exp(z - log_z) * allowed, a.sum(-1, keepdims=True)
    slope = total + 2 * z_loss * log_z
    squares = p[:, :, None] * p[:, None, :]
    curvature = p[:, :, None] * np.eye(z.shape[-1]) - squares
    return Defined(
        (a * (log_z - z)).sum(-1) + z_loss * log_z[:, 0] ** 2,
        slope * p - a,
        slope[..., None] * curvature + 2 * z_loss * squares,
    )


@over_options
def test_options_follow_the_formula(options: dict[str, Any]) -> None:
    z, classes = logits(3, 5), np.array([1, 4, 2])
    y = np.where(options.get("where", True), probabilities(3, 5), 0).astype(WIDE)
    v = jnp.asarray(np.cos(z), WIDE)

    @jax.jit
    def derivatives(labels: Any) -> Any:
        def loss(z: jax.Array) -> jax.Array:
            return cross_entropy(z, labels, **options)

        def total(z: jax.Array) -> jax.Array:
            return jnp.sum(loss(z) ** 2)

        forward = jax.jvp(loss, (z,), (v,))
        return *forward, jax.grad(total)(z), jax.hessian(total)(z)

    for labels, reference in ((classes, one_hot(classes, 5)), (y, y)):
        value, gradient, hessian = define(z, reference, **options)
        blocks = 2 * gradient[:, :, None] * gradient[:, None] + 2 * value[:, None, None] * hessian
        expected = (
            value,
            (gradient * v).sum(-1),
            2 * value[:, None] * gradient,
            np.einsum("ijk,il->ijlk", blocks, np.eye(3)),
        )
        for ours, theirs in zip(derivatives(labels), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, 200 * eps(WIDE), 200 * eps(WIDE))


@pytest.mark.single
@pytest.mark.parametrize("axis", [0, 1])
def test_options_follow_the_axis(axis: int) -> None:
    z, y = logits(3, 4, 5), probabilities(3, 4, 5)
    where = np.broadcast_to(WHERE[:, None], z.shape)
    moved = [np.moveaxis(np.asarray(part), -1, axis) for part in (z, y, where)]
    classes = np.argmax(y, -1)
    options: dict[str, Any] = {**OPTIONS["all"], "ignore_label": 3}
    for labels, moved_labels in ((classes, classes), (y, moved[1])):
        chosen = options if labels.ndim == 2 else OPTIONS["all"]
        ours = cross_entropy(moved[0], moved_labels, axis=axis, **{**chosen, "where": moved[2]})
        close(ours, cross_entropy(z, labels, **{**chosen, "where": where}))


def test_smoothing_goes_to_the_allowed_classes() -> None:
    z, where = jnp.array([1.0, 2.0, 3.0]), jnp.array([True, True, False])
    smoothed = jnp.array([0.85, 0.15, 0])
    loss = cross_entropy(z, 0, where=where, label_smoothing=0.3)
    close(loss, cross_entropy(z, smoothed, where=where))
    assert cross_entropy(z, 2, where=where, label_smoothing=0.3) == inf
    # Smoothing takes some of the label to a class that cannot be.
    assert cross_entropy(jnp.array([0.0, -inf]), 0, label_smoothing=0.1) == inf


def test_an_integer_label_is_smoothed_as_its_one_hot_row() -> None:
    z, labels = logits(4, 7), np.arange(4)

    @jax.jit
    def expected(z: Any, row: Any) -> Any:
        return optax.losses.softmax_cross_entropy(z, optax.smooth_labels(row, 0.3))

    loss = cross_entropy(z, labels, label_smoothing=0.3)
    close(loss, expected(z, jnp.asarray(one_hot(labels, 7))))


@pytest.mark.single
def test_integer_labels_take_no_memory_of_the_size_of_the_logits() -> None:
    shape = 256, 512
    z, labels = jnp.zeros(shape), jnp.zeros(shape[0], jnp.int32)

    def share_of_the_logits(labels: jax.Array, smoothing: float) -> float:
        def loss(z: jax.Array, labels: jax.Array) -> jax.Array:
            return cross_entropy(z, labels, label_smoothing=smoothing).sum()

        compiled = jax.jit(jax.value_and_grad(loss)).lower(z, labels).compile()
        memory: Any = compiled.memory_analysis()
        return float(memory.temp_size_in_bytes / z.nbytes)

    assert share_of_the_logits(labels, 0.0) < 0.1
    assert share_of_the_logits(labels, 0.3) < share_of_the_logits(z, 0.3) + 0.1


@fresh_programs
@pytest.mark.single
@pytest.mark.parametrize(("ignored", "dtype"), [(-100, jnp.int8), (1, jnp.uint8), (3, jnp.int32)])
def test_an_ignored_example_counts_for_nothing(ignored: int, dtype: Any) -> None:
    z = np.array(logits(4, 3))
    z[1], z[2] = inf, -inf
    labels, counted = np.array([0, ignored, ignored, 2], dtype), np.array([0, 3])

    def loss(z: Any, weight: Any, labels: Any, ignored: int | None = ignored) -> jax.Array:
        return cross_entropy(
            z, labels, ignore_label=ignored, class_weight=weight, z_loss=0.1, label_smoothing=0.2
        )

    def total(z: Any, weight: Any) -> jax.Array:
        return loss(z, weight, labels).sum()

    weight = jnp.ones(3)
    value = np.asarray(loss(z, weight, labels))
    np.testing.assert_array_equal(value[1:3], 0)
    close(value[counted], loss(z[counted], weight, labels[counted], None))
    gradients = jax.grad(total, (0, 1))(jnp.asarray(z), weight)
    assert all(np.isfinite(part).all() for part in gradients)
    assert not np.asarray(gradients[0])[1:3].any()
    assert np.isfinite(jax.jit(jax.hessian(total))(z, weight)).all()


@pytest.mark.single
def test_an_ignored_label_that_no_label_can_be_ignores_none() -> None:
    z, labels = logits(3, 4), jnp.array([0, 1, 2], jnp.uint8)
    close(cross_entropy(z, labels, ignore_label=-100), cross_entropy(z, labels))


@in_double
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_derivatives_with_respect_to_the_options_equal_finite_differences(kind: str) -> None:
    labels = jnp.array([0, 3]) if kind == "classes" else probabilities(2, 4)

    def f(z: jax.Array, weight: jax.Array, smoothing: jax.Array, z_loss: jax.Array) -> jax.Array:
        return cross_entropy(
            z, labels, class_weight=weight, label_smoothing=smoothing, z_loss=z_loss
        )

    arguments = logits(2, 4) / 3, jnp.array([0.5, 2.0, 1.0, 1.5]), jnp.array(0.3), jnp.array(0.2)
    check_grads(jax.jit(f), tuple(part.astype(WIDE) for part in arguments), order=2)


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
@pytest.mark.parametrize(
    "options", [{"label_smoothing": -0.1}, {"label_smoothing": 1.1}, {"z_loss": -1.0}]
)
def test_a_traced_option_out_of_range_is_nan(options: dict[str, float]) -> None:
    z = logits(2, 4)
    for labels in (jnp.array([0, 3]), probabilities(2, 4)):
        loss = jax.jit(lambda labels, options: cross_entropy(z, labels, **options))(labels, options)
        assert np.isnan(loss).all()


@pytest.mark.single
def test_a_weight_of_zero_outweighs_an_infinite_loss() -> None:
    z, weight = jnp.array([-inf, 0.0]), jnp.array([0.0, 1.0])

    def loss(z: jax.Array, weight: jax.Array) -> jax.Array:
        return cross_entropy(z, 0, class_weight=weight)

    assert loss(z, weight) == 0
    np.testing.assert_array_equal(jax.grad(loss)(z, weight), 0)
    # Where the loss is finite, the derivative with respect to a weight of 0 is the loss.
    close(jax.grad(loss, 1)(jnp.zeros(2), weight), [np.log(2), 0])


def test_probabilities_keep_the_digits_of_a_tiny_loss() -> None:
    gap = 40.0 if jnp.float64 == WIDE else 20.0
    z, y = jnp.array([gap, 0.0, 0.0], WIDE), jnp.array([1.0, 0.0, 0.0], WIDE)
    np.testing.assert_allclose(cross_entropy(z, y), 2 * np.exp(-gap), 4 * eps(WIDE))
    z = jnp.array([1e8, 1e8 + 8, 0.0], WIDE)
    np.testing.assert_allclose(
        cross_entropy(z, jnp.array([0.0, 1.0, 0.0], WIDE)), np.log1p(np.exp(-8)), 4 * eps(WIDE)
    )


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
def test_a_row_of_impossible_classes_is_nan_for_both_kinds_of_labels() -> None:
    z = jnp.full(3, -inf)
    assert np.isnan(cross_entropy(z, 1))
    assert np.isnan(cross_entropy(z, jnp.array([0.0, 1.0, 0.0])))
    assert np.isnan(jax.grad(cross_entropy)(z, 1)).all()


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
def test_the_hessian_at_a_label_out_of_range_is_nan() -> None:
    assert np.isnan(jax.hessian(cross_entropy)(jnp.zeros(3), 5)).all()


@fresh_programs
def test_a_row_masked_throughout_is_infinite_without_nan() -> None:
    z, where = logits(2, 3), jnp.array([[True, True, True], [False, False, False]])
    options: dict[str, Any] = {"where": where, "label_smoothing": 0.1, "z_loss": 0.1}
    for labels in (jnp.array([0, 1]), probabilities(2, 3)):
        assert cross_entropy(z, labels, **options)[1] == inf
        gradient = np.asarray(
            jax.grad(lambda z, y: cross_entropy(z, y, **options).sum())(z, labels)
        )
        assert np.isfinite(gradient).all()
        assert not gradient[1].any()


# Invariants


@pytest.mark.single
@hypothesis.given(
    st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4),
    st.integers(0, 3),
    st.floats(0, 1, width=32),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_a_smoothed_integer_equals_its_smoothed_one_hot_row_and_a_mask_a_dropped_class(
    z: list[float], label: int, smoothing: float, mask: list[bool]
) -> None:
    row, where = np.array(z, np.float32), np.array(mask)
    where[label] = True
    loss = cross_entropy(row, label, where=where, label_smoothing=smoothing)
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=eps(jnp.float32))
    same(loss, cross_entropy(row, one_hot(label, 4), where=where, label_smoothing=smoothing))
    dropped = int(where[:label].sum())
    same(loss, cross_entropy(row[where], dropped, label_smoothing=smoothing))


# Zero times infinity


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
@pytest.mark.parametrize("big", [inf, nan])
def test_a_weight_that_does_not_count_reaches_nothing(big: float) -> None:
    z, half = jnp.zeros((2, 2)), np.log(2)

    def value_and_gradient(labels: Any, weight: list[float], **options: Any) -> Any:
        def total(z: jax.Array) -> Any:
            loss = cross_entropy(z, labels, class_weight=np.array(weight), **options)
            return loss.sum(), loss

        (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(z)
        return loss, gradient

    ignored = {"ignore_label": -1}
    loss, gradient = value_and_gradient(jnp.array([-1, 1]), [big, 1.0], **ignored)
    close(loss, [0, half])
    close(gradient, [[0, 0], [0.5, -0.5]])
    masked = {"where": np.array([True, False]), "label_smoothing": 0.1}
    for labels in (jnp.array([0, 0]), jnp.array([[1.0, 0.0], [1.0, 0.0]])):
        loss, gradient = value_and_gradient(labels, [1.0, big], **masked)
        close(loss, [0, 0])
        close(gradient, np.zeros((2, 2)))
    if big == inf:
        labels = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        close(cross_entropy(z, labels, class_weight=np.array([1.0, big])), [half, inf])


@pytest.mark.single
def test_the_z_loss_of_large_logits_overflows_only_if_it_is_too_large() -> None:
    far = jnp.full(3, -1e30)
    close(jax.jit(lambda z, factor: cross_entropy(z, 0, z_loss=factor))(far, 0.0), np.log(3))
    close(cross_entropy(jnp.array([1e20, 1e20]), 0, z_loss=1e-4), 1e36)
    z = jnp.array([3e38, 3e38, 0.0])
    close(jax.grad(lambda z: cross_entropy(z, 0, z_loss=1e-4))(z), [3e34, 3e34, 0])


# Bad input


@pytest.mark.single
@pytest.mark.usefixtures("no_jaxtyping")
def test_labels_may_be_any_array_like() -> None:
    z, loss = jnp.zeros((2, 3)), cast("Any", cross_entropy)
    close(jax.jit(lambda label: loss(z, [label, label]))(1), [np.log(3)] * 2)
    for labels in ([[0], [1, 2]], [0, 2**70]):
        with pytest.raises(TypeError, match="labels must be an array of numbers, got"):
            loss(z, labels)
    no_classes = cross_entropy(jnp.zeros((0, 0)), np.zeros(0, int), class_weight=np.zeros(0))
    assert no_classes.shape == (0,)


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
def test_a_label_beyond_its_dtype_is_never_the_ignored_one() -> None:
    largest = int(jnp.iinfo(jnp.int32).max)
    labels = np.array([0, largest + 1, largest])
    loss = cross_entropy(jnp.zeros((3, 3)), labels, ignore_label=largest)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])


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
            r"labels of dtype int\d+ are classes and must .* \(3,\), .* got shape \(3, 4\)",
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
        (np.zeros(3, int), {"axis": (0, 0)}, ValueError, "axis must not repeat"),
        (np.zeros(3, int), {"axis": 2}, ValueError, r"axis must be in \[-2, 2\)"),
        (np.zeros((3, 4), int), {"axis": ()}, ValueError, r"axis must name an axis, got \(\)"),
        (
            np.zeros(12, np.float32),
            {"axis": (0, 1)},
            ValueError,
            r"labels must have shape \(shape of logits\) = \(3, 4\), got shape \(12,\)",
        ),
        (np.zeros(3, int), {"axis": True}, TypeError, "axis must be an integer, got the bool True"),
        (np.zeros(3, int), {"where": np.ones(4)}, TypeError, "where must be boolean"),
        (
            np.zeros(3, int),
            {"where": np.ones(3, bool)},
            ValueError,
            "where must broadcast to shape",
        ),
        (np.zeros(3, int), {"label_smoothing": -0.1}, ValueError, "label_smoothing must be at le"),
        (np.zeros(3, int), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be at most"),
        (np.zeros(3, int), {"label_smoothing": 1j}, TypeError, "label_smoothing must hold real"),
        (
            np.zeros(3, int),
            {"label_smoothing": np.ones(3)},
            ValueError,
            "label_smoothing must be a s",
        ),
        (np.zeros(3, int), {"z_loss": -1.0}, ValueError, "z_loss must be at least 0, got -1"),
        (
            np.zeros(3, int),
            {"class_weight": np.ones(3)},
            ValueError,
            r"class_weight must have shape \(classes,\) = \(4,\), got shape \(3,\)",
        ),
        (np.zeros(3, int), {"ignore_label": 1.0}, TypeError, "ignore_label must be an integer"),
        (
            np.ones((3, 4), np.float32),
            {"ignore_label": 1},
            ValueError,
            "ignore_label needs integer",
        ),
        (np.zeros(3, int), {"axis_name": 1}, TypeError, "axis_name must be a string or a tuple"),
        (np.zeros(3, int), {"axis_name": "k"}, ValueError, "axis_name must name axes .*, got 'k'"),
        (
            np.zeros((), int),
            {"axis": (0, 1), "axis_name": "k"},
            ValueError,
            r"axis must be a single one with axis_name, got \(0, 1\)",
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


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
@pytest.mark.parametrize("class_weight", [None, np.ones(2), np.array([1.0, np.nan])])
def test_a_probability_of_a_masked_class_is_infinite_whatever_its_weight(class_weight: Any) -> None:
    where = np.array([True, False])
    loss = cross_entropy(
        jnp.zeros(2), jnp.array([0.5, 0.5]), where=where, class_weight=class_weight
    )
    assert loss == jnp.inf
    own = cross_entropy(jnp.zeros(2), jnp.array([1.0, 0.0]), where=where, class_weight=class_weight)
    assert own == 0
