"""Softmax, log-softmax, log-sum-exp and their derivatives."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.special
from jax import lax
from jax.test_util import check_grads
from numpy.typing import NDArray

from jaxsoftmax import (
    cross_entropy,
    entropy,
    kl_divergence,
    log_softmax,
    logsumexp,
    softmax,
    softmax_jacobian,
)
from tests import exact, helpers
from tests.helpers import CASE_IDS, CASES, DTYPES, WIDE, Case, eps, in_double

# For tests in which a NaN may be hidden on the way.
fresh_programs = pytest.mark.usefixtures("fresh_programs")
inf, nan = np.inf, np.nan
_ON_CPU = jax.default_backend() == "cpu"
FUNCTIONS: list[Callable[..., Any]] = [softmax, log_softmax, partial(logsumexp, axis=-1)]
FUNCTION_IDS = ["softmax", "log_softmax", "logsumexp"]
over_functions = pytest.mark.parametrize("f", FUNCTIONS, ids=FUNCTION_IDS)
over_cases = pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), WIDE)


# Values


def softmax_family(x: jax.Array, axis: Any, where: jax.Array | None) -> tuple[jax.Array, ...]:
    return softmax(x, axis, where), log_softmax(x, axis, where), logsumexp(x, axis, where=where)


values = jax.jit(softmax_family, static_argnums=1)
# The tests of shapes do without the optimisations of machine code: they take half of the time.
quick_values = jax.jit(
    softmax_family,
    static_argnums=1,
    compiler_options={"xla_backend_optimization_level": 0} if _ON_CPU else None,
)


@pytest.mark.single
@pytest.mark.parametrize("length", [1, 12, 13, 20, 23, 41, 101, 1285])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_entry_of_a_row_is_lost_or_counted_twice(length: int, axis: int) -> None:
    shape = [2, 3, 2]
    shape[axis] = length
    rng = np.random.default_rng(length)
    x = np.log2(rng.integers(1, 4, shape)).round() * np.log(2)  # ties of the largest
    allowed = rng.random(shape) < 0.8
    for where in (None, allowed):
        kept = x if where is None else np.where(where, x, -inf)
        with np.errstate(invalid="ignore", divide="ignore"):
            log_total = scipy.special.logsumexp(kept, axis, keepdims=True)
        log_p = np.where(kept == -inf, -inf, kept - np.where(log_total == -inf, 0, log_total))
        expected = np.exp(log_p), log_p, log_total.squeeze(axis)
        for result, wanted in zip(quick_values(x.astype(WIDE), axis, where), expected, strict=True):
            np.testing.assert_allclose(result, wanted, rtol=8 * eps(WIDE), atol=8 * eps(WIDE))


@over_cases
@over_dtypes
def test_values_equal_those_at_80_digits(case: Case, dtype: Any) -> None:
    x, exact = helpers.logits_of(case, dtype)
    results = values(x, case.axis, case.where)
    assert {result.dtype for result in results} == {jnp.dtype(dtype)}
    p, log_p, total = (np.asarray(result, np.float64) for result in results)
    assert p.shape == log_p.shape == x.shape
    # exp turns the rounding of x - m, at most |x - m| eps / 2, into a relative error.
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    expected = helpers.reference(exact, case.axis)
    np.testing.assert_allclose(p, expected[0], 40 * eps(dtype), smallest)
    np.testing.assert_allclose(log_p, expected[1], 4 * eps(dtype), 4 * eps(dtype))
    np.testing.assert_allclose(total, expected[2], 4 * eps(dtype), 4 * eps(dtype))


@pytest.mark.single
@over_cases
def test_values_equal_those_of_jax_nn(case: Case) -> None:
    x, _ = helpers.logits_of(case, WIDE)
    where = None if case.where is None else np.broadcast_to(case.where, x.shape)

    @jax.jit
    def theirs(x: jax.Array) -> tuple[jax.Array, ...]:
        totals = (jax.nn.logsumexp(x, case.axis, None, k, where=where) for k in (False, True))
        return (
            jax.nn.softmax(x, case.axis, where),
            jax.nn.log_softmax(x, case.axis, where),
            *totals,
        )

    arguments: Any = (x, case.axis, None, True, False, where)
    ours = *values(x, case.axis, case.where), logsumexp(*arguments)
    for result, expected in zip(ours, theirs(x), strict=True):
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, 40 * eps(WIDE), 4 * eps(WIDE))


def test_defaults_are_those_of_jax_nn() -> None:
    x = normal(3, 4)
    np.testing.assert_allclose(softmax(x).sum(-1), 1, 4 * eps(WIDE))
    assert logsumexp(x).shape == ()


@pytest.mark.single
@pytest.mark.parametrize("x", [np.array([1, 2, 3], np.uint8), np.array([-100, 100], np.int8)])
@over_functions
def test_integers_are_promoted_before_anything_else(f: Callable[..., Any], x: Any) -> None:
    y = f(x)
    assert y.dtype == WIDE
    np.testing.assert_array_equal(y, f(jnp.asarray(x, WIDE)))


@pytest.mark.single
@over_functions
def test_booleans_and_numpy_arrays_and_scalars_are_taken(f: Callable[..., Any]) -> None:
    np.testing.assert_array_equal(f(np.array([True, False])), f(jnp.array([1.0, 0.0])))
    np.testing.assert_array_equal(f(np.array([2.0], np.float32)), f(jnp.array([2.0], jnp.float32)))
    assert softmax(3.0, None) == 1


@pytest.mark.single
def test_empty_input() -> None:
    assert softmax(jnp.zeros(0)).shape == (0,)
    assert log_softmax(jnp.zeros((2, 0))).shape == (2, 0)
    assert logsumexp(jnp.zeros(0)) == -inf
    np.testing.assert_array_equal(logsumexp(jnp.zeros((2, 0)), 1), [-inf, -inf])


@pytest.mark.single
@pytest.mark.parametrize("count", [512, 8192])
def test_uniform_bfloat16_rows(count: int) -> None:
    p = softmax(jnp.zeros(count, jnp.bfloat16))
    np.testing.assert_array_equal(p.astype(jnp.float32), 1 / count)


@pytest.mark.single
def test_long_float16_rows_do_not_overflow() -> None:
    x = jnp.zeros(70000, jnp.float16)
    np.testing.assert_allclose(np.asarray(softmax(x), float), 1.4286e-5, rtol=2e-3)
    np.testing.assert_allclose(np.asarray(log_softmax(x), float), -11.156, rtol=eps(jnp.float16))
    np.testing.assert_allclose(jax.grad(lambda x: log_softmax(x).sum())(x), 0, atol=1e-2)
    x = jax.random.normal(jax.random.key(0), (70000,), jnp.float16)
    assert np.isfinite(jax.grad(lambda x: log_softmax(x).sum())(x)).all()


@pytest.mark.single
@pytest.mark.parametrize(
    ("x", "of_softmax", "of_log_softmax", "of_logsumexp"),
    [
        ([-inf, 0.0], [0, 1], [-inf, 0], 0),
        ([-inf, -inf], [nan, nan], [nan, nan], -inf),
        ([inf, 0.0], [nan, nan], [nan, nan], inf),
        ([inf, -inf], [nan, nan], [nan, nan], inf),
        ([nan, 0.0], [nan, nan], [nan, nan], nan),
    ],
)
@pytest.mark.usefixtures("no_debug_nans")
def test_infinite_and_nan_entries(
    x: list[float], of_softmax: Any, of_log_softmax: Any, of_logsumexp: Any
) -> None:
    np.testing.assert_array_equal(softmax(jnp.array(x)), of_softmax)
    np.testing.assert_array_equal(log_softmax(jnp.array(x)), of_log_softmax)
    np.testing.assert_array_equal(logsumexp(jnp.array(x)), of_logsumexp)


@pytest.mark.single
@pytest.mark.parametrize("other", [0.0, inf])
@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.usefixtures("no_debug_nans")
def test_a_nan_anywhere_in_a_row_makes_it_nan(axis: int, length: int, other: float) -> None:
    functions: list[Callable[[jax.Array], jax.Array]] = [
        partial(softmax, axis=axis),
        partial(softmax, axis=axis, temperature=0),
        partial(log_softmax, axis=axis),
        partial(logsumexp, axis=axis),
        partial(entropy, axis=axis),
        partial(cross_entropy, labels=jnp.ones(length, jnp.int32), axis=axis),
    ]
    # Row i has the NaN at i, and another number, which may be +inf, beside it.
    rows = np.zeros((length, length), np.float32)
    np.fill_diagonal(rows, nan)
    rows[range(length), (np.arange(length) + 1) % length] = other
    x = jnp.asarray(rows if axis == -1 else rows.T)
    for f in functions:
        assert np.isnan(f(x)).all()


@pytest.mark.single
@pytest.mark.parametrize("length", [4, 40])
@pytest.mark.parametrize("c", [1 / 3, 0.1, np.pi])
def test_scaled_inputs_inside_jit_stay_finite_and_equal_eager_ones(c: float, length: int) -> None:
    factor = np.float32(c)

    def scaled(x: jax.Array) -> tuple[jax.Array, ...]:
        z = x * factor
        return softmax(z), log_softmax(z), logsumexp(z, -1)

    random = np.random.default_rng(0)
    magnitudes = 10.0 ** random.uniform(-30, 30, size=(10000, 1))
    rows = (magnitudes * random.normal(size=(10000, length))).astype(np.float32)
    rows[0] = np.r_[3e10, 1e10, np.zeros(length - 2)]
    p, log_p, total = jax.jit(scaled)(rows)
    assert np.isfinite(p).all()
    assert np.isfinite(log_p).all()
    assert np.isfinite(total).all()
    np.testing.assert_allclose(p.sum(-1), 1, rtol=4 * eps(jnp.float32))
    # The jitted product may be rounded or not, which moves z by half an eps of itself.
    moved = np.abs(rows).max(-1, keepdims=True) * c * eps(jnp.float32) + 16 * eps(jnp.float32)
    for jitted, eager in zip((p, log_p), scaled(jnp.asarray(rows))[:2], strict=True):
        assert (np.abs(np.asarray(jitted) - np.asarray(eager)) <= moved).all()
    np.testing.assert_allclose(total, scaled(jnp.asarray(rows))[2], 4 * eps(jnp.float32), 1e-6)


@pytest.mark.single
def test_a_size_one_axis_under_jit_equals_eager() -> None:
    x = normal(3, 1, 1)
    np.testing.assert_allclose(jax.jit(partial(softmax, axis=0))(x), softmax(x, 0), 4 * eps(WIDE))


# Masks


@fresh_programs
def test_what_is_masked_reaches_no_value_and_no_derivative() -> None:
    where = jnp.array([True, True, False])
    hessians = [jax.jit(jax.hessian(partial(f, where=where))) for f in FUNCTIONS]
    for hidden in (100.0, 1e30, inf, -inf, nan):
        x = jnp.array([1.0, 1.0, hidden])
        np.testing.assert_array_equal(softmax(x, where=where), [0.5, 0.5, 0])
        np.testing.assert_allclose(log_softmax(x, where=where), [-np.log(2), -np.log(2), -inf])
        np.testing.assert_allclose(logsumexp(x, where=where), 1 + np.log(2), 4 * eps(WIDE))
        for f, hessian in zip(FUNCTIONS, hessians, strict=True):
            masked = partial(f, where=where)
            first = np.asarray(jax.jacobian(masked)(x))
            assert np.isfinite(first).all()
            assert not first[..., 2].any()
            assert np.isfinite(hessian(x)).all()
            tangent = jnp.array([1.0, 2.0, hidden])
            assert np.isfinite(jax.jvp(masked, (x,), (tangent,))[1]).all()


@fresh_programs
@over_functions
def test_a_row_masked_throughout_is_empty_without_nan(f: Callable[..., Any]) -> None:
    x = jnp.array([[1.0, 2.0, inf], [3.0, inf, -inf]])
    where = jnp.array([[True, True, False], [False, False, False]])
    empty = {"softmax": 0, "log_softmax": -inf}.get(getattr(f, "__name__", ""), -inf)
    np.testing.assert_array_equal(f(x, where=where)[1], empty)
    jacobian = jax.jacobian(lambda x: f(x, where=where))(x)
    hessian = jax.jit(jax.hessian(lambda x: f(x, where=where)))(x)
    assert np.isfinite(jacobian).all()
    assert not np.asarray(jacobian)[1].any()
    assert np.isfinite(hessian).all()


@fresh_programs
def test_a_row_of_impossible_entries_has_logsumexp_with_gradient_zero() -> None:
    x = jnp.full(3, -inf)
    np.testing.assert_array_equal(jax.grad(logsumexp)(x), 0)
    np.testing.assert_array_equal(jax.hessian(logsumexp)(x), 0)


@fresh_programs
@over_functions
def test_derivatives_at_impossible_entries_are_finite(f: Callable[..., Any]) -> None:
    x, tangent = jnp.array([-inf, 0.0, 1.0]), jnp.array([0.0, 1.0, 0.0])
    assert np.isfinite(jax.jvp(f, (x,), (tangent,))[1]).all()
    assert np.isfinite(jax.jit(jax.hessian(f))(x)).all()


@pytest.mark.single
@over_functions
def test_a_traced_mask_leaks_no_tracer(f: Callable[..., Any]) -> None:
    x, masks = normal(4), jnp.array([[True, False, True, True], [True, True, False, False]])

    def in_scan(x: jax.Array) -> jax.Array:
        def body(total: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
            y = f(lax.cond(mask[1], lambda x: 2 * x, lambda x: x, x), where=mask)
            return total + jnp.sum(jnp.where(jnp.isfinite(y), y, 0) ** 2), None

        return lax.scan(body, jnp.zeros((), WIDE), masks)[0]

    def in_vmap(x: jax.Array) -> jax.Array:
        y = jax.vmap(lambda mask: f(jnp.where(mask[1], 2 * x, x), where=mask))(masks)
        return jnp.sum(jnp.where(jnp.isfinite(y), y, 0) ** 2)

    with jax.checking_leaks():
        of_scan, of_vmap = (jax.jit(jax.grad(g))(x) for g in (in_scan, in_vmap))
    np.testing.assert_allclose(of_scan, of_vmap, 20 * eps(WIDE))


# logsumexp's own arguments


def test_factors_signs_and_kept_axes_equal_scipy() -> None:
    a, b = np.asarray(normal(3, 4), np.float64), np.asarray(normal(4, 3).T, np.float64)
    for axis in (None, 0, -1, (0, 1)):
        for keepdims in (False, True):
            expected = scipy.special.logsumexp(a, axis, b, keepdims, True)
            ours = logsumexp(a, axis, b, keepdims, True)
            for got, want in zip(ours, expected, strict=True):
                assert got.shape == np.shape(want)
                np.testing.assert_allclose(got, want, 100 * eps(WIDE), 100 * eps(WIDE))


@pytest.mark.usefixtures("no_debug_nans")
def test_known_sums_with_factors() -> None:
    b = jnp.array([2.0, 0.0, 5.0])
    zeros = jnp.zeros(3)
    np.testing.assert_allclose(logsumexp(zeros, b=b), np.log(7), 4 * eps(WIDE))
    gradient = jax.grad(lambda b: logsumexp(zeros, b=b))(b)
    np.testing.assert_allclose(gradient, 1 / 7, 4 * eps(WIDE))
    value, sign = logsumexp(
        jnp.array([1.0, 0.9, 0.9]), b=jnp.array([-1.0, 1.0, 1.0]), return_sign=True
    )
    np.testing.assert_allclose(value, 0.7888774, 1e-6)
    assert sign == 1
    value, sign = logsumexp(zeros, b=-b, return_sign=True)
    np.testing.assert_allclose(value, np.log(7), 4 * eps(WIDE))
    assert sign == -1
    assert np.isnan(logsumexp(zeros, b=-b))
    assert np.isnan(jax.grad(logsumexp)(zeros, b=-b)).all()
    assert logsumexp(jnp.array([1000.0, 1.0]), b=jnp.array([0, 1])) == 1
    value, sign = logsumexp(zeros[:2], b=jnp.array([1, -1]), return_sign=True)
    assert value == -inf
    assert sign == 0


@fresh_programs
@pytest.mark.single
def test_a_masked_factor_counts_for_nothing() -> None:
    a, where = jnp.array([0.0, 0.0, 7.0]), jnp.array([True, True, False])

    def f(a: jax.Array, b: jax.Array) -> jax.Array:
        return logsumexp(a, b=b, where=where)

    b = jnp.array([1.0, 2.0, nan])
    np.testing.assert_allclose(f(a, b), np.log(3), 4 * eps(WIDE))
    for gradient in jax.grad(f, (0, 1))(a, b):
        assert np.isfinite(gradient).all()
        assert gradient[2] == 0


@fresh_programs
def test_an_exponent_of_factor_zero_may_overflow() -> None:
    a, b = jnp.array([0.0, 1e6, -inf]), jnp.array([1.0, 0.0, 0.0])
    for f in (logsumexp, lambda a, b: logsumexp(a, b=b, return_sign=True)[0]):
        assert f(a, b=b) == 0
    np.testing.assert_array_equal(jax.grad(lambda a: logsumexp(a, b=b))(a), [1, 0, 0])
    np.testing.assert_array_equal(jax.hessian(lambda a: logsumexp(a, b=b))(a), np.zeros((3, 3)))
    a = jnp.array([0.0, 3.0])
    gradient = jax.grad(lambda a, b: logsumexp(a, b=b), (0, 1))(a, b[:2])
    np.testing.assert_allclose(gradient, [[1, 0], [1, np.exp(3)]], 4 * eps(WIDE))
    mixed = jax.jacobian(jax.grad(lambda a, b: logsumexp(a, b=b)), 1)(a, b[:2])
    np.testing.assert_allclose(mixed, np.exp(3) * np.array([[0, -1], [0, 1]]), 4 * eps(WIDE))


def test_the_largest_term_decides_not_the_largest_exponent() -> None:
    a = jnp.array([[50.0, -50.0, 0.0], [-100.0, 1.0, -50.0], [110.0, 0.0, -inf]], WIDE)
    b = jnp.array([[1e-30, 1e30, 0.0], [1e30, 1e-30, -1.0], [1e-30, 1e30, 1e35]], WIDE)
    value, sign = logsumexp(a, -1, b, return_sign=True)
    wanted = scipy.special.logsumexp(np.asarray(a, np.float64), -1, np.asarray(b), return_sign=True)
    np.testing.assert_allclose(value, wanted[0], 4 * eps(WIDE))
    np.testing.assert_array_equal(sign, wanted[1])
    gradient = jax.grad(lambda a: logsumexp(a, -1, b).sum())(a)
    log_b = np.log(np.maximum(np.abs(np.asarray(b, np.float64)), 1e-300))
    shares = np.sign(b) * np.exp(np.asarray(a, np.float64) + log_b - wanted[0][:, None])
    np.testing.assert_allclose(gradient, shares * wanted[1][:, None], 200 * eps(WIDE), eps(WIDE))


@pytest.mark.single
def test_infinities_with_factors() -> None:
    for b, sign in (([1.0, 1.0], 1), ([-1.0, 1.0], -1), ([2.0, -1.0], 1)):
        result = logsumexp(jnp.array([inf, 0.0]), b=jnp.array(b), return_sign=True)
        np.testing.assert_array_equal(result, [inf, sign])
    assert logsumexp(jnp.zeros(2), b=jnp.array([inf, 1.0])) == inf
    largest = float(jnp.finfo(jnp.float32).max)
    for jacobian in (jax.jacfwd, jax.jacrev):
        result = jacobian(lambda b: logsumexp(jnp.array([1000.0, 0.0]), b=b))(jnp.array([0.0, 1.0]))
        np.testing.assert_array_equal(result, [np.float32(largest), 1])


@fresh_programs
def test_a_row_of_the_least_number_is_not_empty() -> None:
    a = jnp.full(2, jnp.finfo(WIDE).min)
    for f in (logsumexp, lambda a: logsumexp(a, b=jnp.ones(2, WIDE))):
        np.testing.assert_array_equal(jax.grad(f)(a), [0.5, 0.5])
    assert logsumexp(a, return_sign=True)[1] == 1


@pytest.mark.single
def test_the_dtype_with_factors_is_that_of_jax() -> None:
    low: Any = jnp.ones(2, jnp.float16)
    factors: list[Any] = [2, 2.0, np.float32(2), jnp.asarray(2.0), jnp.ones(2, jnp.bfloat16)]
    with jax.numpy_dtype_promotion("standard"):
        for a, b in [*((low, b) for b in factors), (1.0, low), (2, low)]:
            assert logsumexp(a, b=b).dtype == jax.nn.logsumexp(a, b=b).dtype


def test_factors_broadcast_with_the_exponents() -> None:
    a, b = normal(4), jnp.abs(normal(3, 1))
    for axis in (0, -1, None):
        expected = scipy.special.logsumexp(np.asarray(a), axis, np.asarray(b))
        np.testing.assert_allclose(logsumexp(a, axis, b), expected, 20 * eps(WIDE), 4 * eps(WIDE))


def test_complex_sums_equal_scipy() -> None:
    a, b = (lax.complex(x, y) for x, y in ((normal(2, 3), normal(3, 2).T), (normal(1, 3),) * 2))
    where = np.array([[True, True, False], [True, True, True]])
    close = partial(np.testing.assert_allclose, rtol=20 * eps(WIDE))
    close(logsumexp(300 * a, 0), scipy.special.logsumexp(300 * np.asarray(a), 0))
    close(logsumexp(a.real, b=2j), logsumexp(a.real, b=jnp.array(2j)))
    close(logsumexp(a, b=b), scipy.special.logsumexp(np.asarray(a), b=np.asarray(b)))
    value, sign = logsumexp(a, -1, b, True, True, where)
    wanted = scipy.special.logsumexp(np.asarray(a), -1, where * np.asarray(b), True, True)
    close(value, wanted[0])
    close(sign, wanted[1])
    assert value.dtype == sign.real.dtype == WIDE
    assert np.isfinite(jax.grad(lambda a: logsumexp(a, where=where), holomorphic=True)(a)).all()


def test_complex_sums_keep_the_contract_of_real_ones() -> None:
    dtype = jnp.complex128 if jnp.float64 == WIDE else jnp.complex64
    close = partial(np.testing.assert_allclose, rtol=4 * eps(WIDE))
    tail = logsumexp(jnp.array([0, -30], dtype))
    close(tail.real, np.log1p(np.exp(-30.0)))
    where = jnp.array([[True, True], [False, False], [True, True]])
    a = jnp.array([[0, 0], [-1000, 0], [-inf, -inf]], dtype)

    def total(a: jax.Array, b: jax.Array) -> jax.Array:
        log = logsumexp(a, -1, b, where=where).real
        return jnp.sum(jnp.where(jnp.isfinite(log), log, 0))

    for gradient in jax.grad(total, (0, 1))(a, jnp.ones((3, 2), WIDE)):
        np.testing.assert_array_equal(gradient, [[0.5, 0.5], [0, 0], [0, 0]])
    zero_factor = jnp.array([2.0, 0.0, 5.0], WIDE)
    gradient = jax.grad(lambda b: logsumexp(jnp.zeros(3, dtype), b=b).real)(zero_factor)
    close(gradient, [1 / 7] * 3)
    rows = jnp.asarray(np.random.default_rng(0).uniform(1e10, 3e11, (192, 8)), WIDE)
    third, zero = jnp.array(1 / 3, WIDE), jnp.zeros((), WIDE)
    result = jax.jit(lambda x: logsumexp(lax.complex(x * third, x * zero), 1))(rows)
    close(result.real, logsumexp(rows * third, 1))


@pytest.mark.single
def test_integer_factors_leave_the_dtype_of_the_exponents() -> None:
    a = jnp.zeros(2, jnp.bfloat16)
    for b in (3, 3.0, jnp.array([257, 257])):
        assert logsumexp(a, b=b).dtype == jnp.bfloat16
    assert logsumexp(a, b=jnp.array([257, 257])) == jnp.log(jnp.array(514.0)).astype(jnp.bfloat16)
    assert logsumexp(a, b=np.ones(2, np.float32)).dtype == jnp.float32


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weighted_sum_near_one_keeps_its_digits(sign: int) -> None:
    a, b = jnp.array([0.0, -30.0], WIDE), jnp.array([1.0, -2.0], WIDE)
    value, s = logsumexp(a, b=sign * b, return_sign=True)
    np.testing.assert_allclose(value, np.log1p(-2 * np.exp(-30.0)), 4 * eps(WIDE))
    assert s == sign


# Temperature

WARM = jnp.array([[0.5], [3.0]], WIDE)


@pytest.mark.parametrize("f", [softmax, log_softmax], ids=["softmax", "log_softmax"])
def test_a_temperature_divides_the_logits(f: Callable[..., Any]) -> None:
    x = normal(2, 4)
    close = partial(np.testing.assert_allclose, rtol=20 * eps(WIDE), atol=4 * eps(WIDE))
    close(f(x, temperature=WARM), f(x / WARM))
    close(f(x, 0, temperature=2), f(x / 2, 0))
    where = jnp.array([True, False, True, True])
    close(f(x, where=where, temperature=WARM), f(x / WARM, where=where))


@in_double
@pytest.mark.parametrize("f", [softmax, log_softmax], ids=["softmax", "log_softmax"])
def test_derivatives_at_a_temperature_equal_finite_differences(f: Callable[..., Any]) -> None:
    where = jnp.array([True, False, True, True])

    def finite(x: jax.Array, t: jax.Array) -> jax.Array:
        y = f(x, where=where, temperature=t)
        return jnp.where(jnp.isfinite(y), y, 0)

    check_grads(jax.jit(finite), (normal(2, 4), WARM), order=2)


@fresh_programs
@pytest.mark.parametrize("f", [softmax, log_softmax], ids=["softmax", "log_softmax"])
def test_temperature_zero_is_the_limit_with_derivative_zero(f: Callable[..., Any]) -> None:
    x = jnp.array([[1.0, 3.0, 3.0, -inf], [0.0, -1.0, 2.0, inf]])
    where = jnp.array([True, True, True, False])
    expected = np.array([[0, 0.5, 0.5, 0], [0, 0, 1, 0]])
    with np.errstate(divide="ignore"):
        expected = expected if f is softmax else np.log(expected)

    def finite(x: jax.Array, t: jax.Array) -> jax.Array:
        y = f(x, where=where, temperature=t)
        return jnp.where(jnp.isfinite(y), y, 0)

    cold = jnp.array([[0.0], [float(jnp.finfo(WIDE).smallest_subnormal)]], WIDE)
    np.testing.assert_allclose(f(x, where=where, temperature=0), expected, 4 * eps(WIDE))
    np.testing.assert_allclose(f(x, where=where, temperature=cold), expected, 4 * eps(WIDE))
    for jacobian in jax.jacobian(finite, (0, 1))(x, cold):
        assert not jacobian.any()


@fresh_programs
@pytest.mark.parametrize("t", [1e-30, 1e-12, 1e12, 1e30, inf])
@pytest.mark.parametrize("f", [softmax, log_softmax], ids=["softmax", "log_softmax"])
def test_extreme_temperatures_give_no_nan(f: Callable[..., Any], t: float) -> None:
    x = jnp.array([0.0, 1e10, -1e20, -inf])
    where = jnp.array([True, True, True, True])

    def total(x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.sum(f(x, where=where, temperature=t)[:2])

    for g in (jax.value_and_grad(total, (0, 1)), jax.jit(jax.value_and_grad(total, (0, 1)))):
        assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(g(x, jnp.array(t))))


@fresh_programs
def test_what_has_no_probability_leaves_the_derivatives_in_the_temperature() -> None:
    """Logits 1 and 2 with a third one far below, or masked, and a row that is masked throughout."""

    def second_derivative(t: float) -> float:
        p = 1 / (1 + np.exp(1 / t))
        return float(p * (1 - p) * ((1 - 2 * p) / t**4 - 2 / t**3))

    x = jnp.array([[1.0, 2.0, 0.0], [1.0, 2.0, 3.0]], WIDE)
    mask = jnp.array([[True, True, False], [False, False, False]])

    @jax.jit
    @jax.hessian
    def hessians(t: jax.Array, low: jax.Array) -> Any:
        far = softmax(x[0].at[2].set(low), temperature=t)[0]
        return far, softmax(x, where=mask, temperature=t)[:, 0]

    for t in (0.05, 1.0, 1.2):
        for low in (float(jnp.finfo(WIDE).min), -1e35, -inf):
            far, masked = hessians(jnp.array(t, WIDE), jnp.array(low, WIDE))
            np.testing.assert_allclose(far, second_derivative(t), 1e-4)
            np.testing.assert_allclose(masked, [second_derivative(t), 0], 1e-4)


@fresh_programs
@pytest.mark.parametrize(("low", "t"), [(-1e38, 0.5), (-1.0, 1e-20), (-inf, 2.0)])
def test_the_derivative_in_the_temperature_may_overflow_alone(low: float, t: float) -> None:
    jacobian = jax.jacobian(lambda x: log_softmax(x, temperature=t))(jnp.array([0.0, low], WIDE))
    np.testing.assert_allclose(jacobian, np.array([[0, 0], [-1, 1]]) / t, 4 * eps(WIDE))


@pytest.mark.usefixtures("no_debug_nans")
def test_a_traced_negative_temperature_is_nan() -> None:
    assert np.isnan(jax.jit(lambda t: softmax(jnp.zeros(2), temperature=t))(-1.0)).all()
    assert np.isnan(jax.jit(lambda t: log_softmax(jnp.zeros(2), temperature=t))(nan)).all()


@pytest.mark.single
def test_a_temperature_leaves_the_dtype_of_the_logits() -> None:
    x = normal(2, 4).astype(jnp.bfloat16)
    for f in (softmax, log_softmax, softmax_jacobian):
        warm = f(x, temperature=WARM)
        assert warm.dtype == jnp.bfloat16
        wide = f(x.astype(jnp.float32), temperature=WARM).astype(jnp.bfloat16)
        np.testing.assert_array_equal(warm, wide)


def test_the_jacobian_at_a_temperature() -> None:
    x = normal(2, 3, 4)
    t = jnp.array([0.5, 3.0, 0.0], WIDE)[:, None]
    by_rows = jax.jit(
        jax.vmap(jax.vmap(jax.jacfwd(lambda x, t: softmax(x, temperature=t))), (0, None))
    )
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=4 * eps(WIDE))
    close(softmax_jacobian(x, temperature=t), by_rows(x, t[:, 0]))
    moved = softmax_jacobian(jnp.moveaxis(x, -1, 0), 0, temperature=t[:, 0])
    close(moved, by_rows(x, t[:, 0]))


# Derivatives


@in_double
@pytest.mark.parametrize("f", [*FUNCTIONS, softmax_jacobian], ids=[*FUNCTION_IDS, "jacobian"])
def test_derivatives_equal_finite_differences(f: Callable[..., Any]) -> None:
    where = jnp.array([[True, True, True, True], [True, False, True, True]])

    @jax.jit
    def finite(x: jax.Array) -> jax.Array:
        y = f(x, where=where)
        return jnp.where(jnp.isfinite(y), y, 0)

    check_grads(finite, (normal(2, 4),), order=2)


@in_double
def test_derivatives_of_a_signed_sum_equal_finite_differences() -> None:
    def f(a: jax.Array, b: jax.Array) -> jax.Array:
        return logsumexp(a, -1, b, return_sign=True)[0]

    check_grads(jax.jit(f), (normal(2, 4), normal(4, 2).T), order=2)


def test_first_and_second_derivatives_are_the_analytic_ones() -> None:
    x, v = normal(5), normal(6)[:5]
    p = np.exp(np.asarray(x, np.float64))
    p /= p.sum()
    jacobian, eye = np.diag(p) - np.outer(p, p), np.eye(5)
    second = np.einsum("ik,ij->ijk", jacobian, eye - p) - np.einsum("i,jk->ijk", p, jacobian)

    @jax.jit
    def derivatives(x: jax.Array) -> Any:
        functions: list[Callable[..., Any]] = [*FUNCTIONS[:2], logsumexp]
        first = [jac(f)(x) for jac in (jax.jacfwd, jax.jacrev) for f in functions]
        product = jax.jvp(lambda x: jax.vjp(softmax, x)[1](v)[0], (x,), (v,))[1]
        return *first, jax.hessian(logsumexp)(x), jax.hessian(softmax)(x), product

    expected = (jacobian, eye - p, p) * 2 + (
        jacobian,
        second,
        np.einsum("ijk,i,k->j", second, v, v),
    )
    for ours, theirs in zip(derivatives(x), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=4 * eps(WIDE))


@fresh_programs
def test_saturated_rows_keep_their_tiny_derivatives() -> None:
    gap = 40.0 if jnp.float64 == WIDE else 20.0
    tail = np.exp(-gap)
    x = jnp.array([gap, 0.0], WIDE)
    cotangent = jnp.array([1.0, 0.0], WIDE)
    for f in (softmax, log_softmax):
        row = jax.vjp(f, x)[1](cotangent)[0]
        np.testing.assert_allclose(row, [tail, -tail], 32 * eps(WIDE))
    tangent = jax.jvp(softmax, (x,), (cotangent,))[1]
    np.testing.assert_allclose(tangent, [tail, -tail], 32 * eps(WIDE))
    tangent = jax.jvp(log_softmax, (x,), (cotangent,))[1]
    np.testing.assert_allclose(tangent, [tail, tail - 1], 32 * eps(WIDE))
    hessian = jax.jit(jax.hessian(logsumexp))(x)
    np.testing.assert_allclose(hessian, [[tail, -tail], [-tail, tail]], 32 * eps(WIDE))
    np.testing.assert_allclose(softmax_jacobian(x), hessian, 32 * eps(WIDE))


@over_functions
@over_dtypes
def test_each_rule_keeps_one_residual_in_the_dtype_of_the_input(
    f: Callable[..., Any], dtype: Any
) -> None:
    x = normal(3, 4).astype(dtype)
    for vjp in (jax.vjp(f, x)[1], jax.vjp(jax.jit(f), x)[1]):
        (residual,) = jax.tree.leaves(vjp)
        assert residual.shape == x.shape
        assert residual.dtype == dtype


@pytest.mark.parametrize(
    "f",
    [
        entropy,
        lambda x: kl_divergence(x, jnp.ones_like(x)),
        lambda x: softmax(x, temperature=1.5),
        lambda x: log_softmax(x, temperature=1.5),
    ],
    ids=["entropy", "kl_divergence", "softmax at T", "log_softmax at T"],
)
def test_one_residual_of_the_size_of_the_input(f: Callable[..., Any]) -> None:
    x = normal(3, 4)
    for vjp in (jax.vjp(f, x)[1], jax.vjp(jax.jit(f), x)[1]):
        assert sum(residual.shape == x.shape for residual in jax.tree.leaves(vjp)) == 1


@pytest.mark.single
@over_functions
def test_a_jitted_gradient_is_traced_once(f: Callable[..., Any]) -> None:
    traces = 0

    def loss(x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return jnp.sum(f(x) ** 2)

    gradient = jax.jit(jax.grad(loss))
    for row in normal(3, 4):
        gradient(row)
    assert traces == 1


# Transformations


@pytest.mark.single
@over_functions
def test_jit_equals_eager_and_vmap_equals_a_loop(f: Callable[..., Any]) -> None:
    x, where = np.asarray(normal(3, 4, 5)), helpers._mask(3, 4, 5)
    close = partial(np.testing.assert_allclose, rtol=20 * eps(WIDE), atol=4 * eps(WIDE))
    close(jax.jit(f)(x, where=where), f(x, where=where))
    batched = jax.jit(jax.vmap(lambda x, where: f(x, where=where), in_axes=1))(x, where)
    close(batched, np.stack([f(x[:, i], where=where[:, i]) for i in range(4)]))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(f(x)[..., 0] ** 2)))
    close(jax.jit(jax.vmap(gradient))(x), np.stack([gradient(row) for row in x]))


# Invariants

# A few shapes only: each is compiled anew.
rows = hnp.arrays(
    np.float32, st.sampled_from([(3, 1), (2, 2), (2, 5)]), elements=st.floats(-50, 50, width=32)
)


@pytest.mark.single
@hypothesis.given(rows)
def test_rows_sum_to_one_and_a_vjp_row_to_zero(x: Any) -> None:
    p, vjp = jax.vjp(softmax, jnp.asarray(x))
    np.testing.assert_allclose(p.sum(-1), 1, rtol=2 * eps(jnp.float32) * np.sqrt(x.shape[1]))
    (row,) = vjp(jnp.asarray(x[:, ::-1]))
    # A constant cotangent has the row 0, up to what two roundings of it leave.
    twice_rounded = x.shape[1] * eps(jnp.float32) ** 2 * np.abs(x).max(-1)
    bound = 4 * eps(jnp.float32) * np.abs(row).max(-1) + twice_rounded
    assert (np.abs(np.asarray(row, np.float64).sum(-1)) <= bound).all()


@pytest.mark.single
@hypothesis.given(rows, st.integers(-1000, 1000))
def test_a_common_shift_changes_nothing(x: Any, shift: int) -> None:
    x = np.round(x)
    moved = x + np.float32(shift)
    np.testing.assert_array_equal(softmax(moved), softmax(x))
    np.testing.assert_array_equal(log_softmax(moved), log_softmax(x))
    expected = logsumexp(x, -1) + np.float32(shift)
    np.testing.assert_allclose(logsumexp(moved, -1), expected, rtol=1e-6, atol=2e-4)


@pytest.mark.single
@hypothesis.given(rows, st.randoms(use_true_random=False))
def test_a_permutation_goes_through(x: Any, random: Any) -> None:
    order = random.sample(range(x.shape[1]), x.shape[1])
    close = partial(np.testing.assert_allclose, rtol=4 * eps(jnp.float32), atol=1e-37)
    close(softmax(x[:, order]), softmax(x)[:, np.array(order)])
    close(logsumexp(x[:, order], -1), logsumexp(x, -1), atol=1e-6)


@pytest.mark.single
@hypothesis.given(rows, st.data())
def test_a_masked_entry_equals_a_dropped_one(x: Any, data: st.DataObject) -> None:
    keep = data.draw(hnp.arrays(bool, x.shape[1]))
    hypothesis.assume(keep.any())
    close = partial(np.testing.assert_allclose, rtol=4 * eps(jnp.float32), atol=1e-37)
    close(softmax(x, where=keep)[:, keep], softmax(x[:, keep]))
    close(log_softmax(x, where=keep)[:, keep], log_softmax(x[:, keep]), atol=1e-6)
    close(logsumexp(x, -1, where=keep), logsumexp(x[:, keep], -1), atol=1e-6)


class Sample(NamedTuple):
    x: NDArray[Any]
    axis: int
    where: NDArray[Any]


SHAPES_AXES_DTYPES = [
    ((5,), 0, jnp.float16),
    ((3, 4), 0, jnp.bfloat16),
    ((3, 4), -1, jnp.float16),
    ((3, 4), -1, jnp.float32),
    ((2, 3, 2), 1, jnp.bfloat16),
    ((2, 3, 2), 1, jnp.float32),
]


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Logits of any dtype, integers so that shifts and multiples are exact, an axis and a mask."""
    shape, axis, dtype = draw(st.sampled_from(SHAPES_AXES_DTYPES))
    x = draw(hnp.arrays(np.float32, shape, elements=st.integers(-30, 30)))
    where = draw(hnp.arrays(bool, shape))
    np.moveaxis(where, axis, 0)[0] = True
    return Sample(x.astype(dtype), axis, where)


@pytest.mark.slow
@pytest.mark.single
@hypothesis.given(samples(), st.integers(-64, 64), st.sampled_from([0.25, 2.0]), st.data())
def test_invariants_over_shapes_axes_and_dtypes(
    sample: Sample, shift: int, temperature: float, data: st.DataObject
) -> None:
    x, axis, where = sample
    order = np.array(data.draw(st.permutations(range(x.shape[axis]))))
    tiny = partial(np.testing.assert_allclose, rtol=4 * eps(x.dtype), atol=4 * eps(jnp.float32))

    def close(ours: Any, theirs: Any) -> None:
        assert ours.dtype == theirs.dtype == x.dtype
        tiny(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))

    for f in (softmax, log_softmax):
        y = np.asarray(f(x, axis))
        close(f(x + x.dtype.type(shift), axis), y)  # a common shift
        close(f(np.take(x, order, axis), axis), np.take(y, order, axis))  # a permutation
        close(f(x, axis, temperature=temperature), f(x / x.dtype.type(temperature), axis))
        hidden = np.where(where, x, x.dtype.type(inf))  # a mask is a logit of -inf
        close(f(hidden, axis, where), f(np.where(where, x, x.dtype.type(-inf)), axis))
        if x.ndim == 2:  # vmap over the other axis equals a loop over it
            batch = 1 - axis % 2
            looped = np.stack([f(row) for row in np.moveaxis(x, batch, 0)], batch)
            close(jax.vmap(f, batch, batch)(x), looped)
    close(logsumexp(np.take(x, order, axis), axis), logsumexp(x, axis))
    close(logsumexp(x, axis, keepdims=True), np.expand_dims(logsumexp(x, axis), axis))


# The Jacobian


def plain_softmax(x: jax.Array) -> jax.Array:
    return jnp.exp(x) / jnp.exp(x).sum()


def test_jacobian_equals_that_of_the_plain_definition() -> None:
    x = np.asarray(normal(2, 3, 4))
    by_rows = jax.jit(jax.vmap(jax.vmap(jax.jacfwd(plain_softmax))))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=4 * eps(WIDE))
    close(softmax_jacobian(x), by_rows(x))
    close(softmax_jacobian(np.moveaxis(x, -1, 0), 0), by_rows(x))
    close(softmax_jacobian(np.moveaxis(x, -1, 1), 1), by_rows(x))


@fresh_programs
def test_jacobian_of_a_masked_row_has_zero_rows_and_columns() -> None:
    x, where = jnp.array([1.0, inf, 3.0]), jnp.array([True, False, True])
    jacobian = np.asarray(softmax_jacobian(x, where=where))
    assert not jacobian[1].any()
    assert not jacobian[:, 1].any()
    expected = softmax_jacobian(x[where])
    np.testing.assert_allclose(jacobian[np.ix_([0, 2], [0, 2])], expected, 4 * eps(WIDE))


@pytest.mark.single
def test_jacobian_in_low_precision_is_rounded_once() -> None:
    x = normal(6).astype(jnp.bfloat16)
    expected = softmax_jacobian(x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert softmax_jacobian(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(softmax_jacobian(x), expected)


# Bad input


@pytest.mark.single
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"axis": 2}, ValueError, r"axis must be in \[-2, 2\) for an array of rank 2, got 2"),
        ({"axis": -3}, ValueError, r"axis must be in \[-2, 2\) for an array of rank 2, got -3"),
        ({"axis": True}, TypeError, "axis must be an integer, got the bool True"),
        ({"axis": 1.0}, TypeError, "axis must be an integer, got 1.0"),
        ({"axis": "0"}, TypeError, "axis must be an integer, got '0'"),
        ({"where": np.ones(3)}, TypeError, "where must be boolean, got dtype float"),
        (
            {"where": np.ones(2, bool)},
            ValueError,
            r"where must broadcast to shape \(2, 3\), got shape \(2,\)",
        ),
        (
            {"where": np.ones((4, 2, 3), bool)},
            ValueError,
            r"where must broadcast to shape \(2, 3\), got shape \(4, 2, 3\)",
        ),
    ],
)
@pytest.mark.parametrize("f", [softmax, log_softmax, logsumexp, softmax_jacobian])
@pytest.mark.usefixtures("no_jaxtyping")
def test_bad_arguments_are_named(
    f: Callable[..., Any], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    f(jnp.zeros((2, 3)), axis=1)  # axis=True must not find this call in a cache
    for function in (f, jax.jit(partial(f, **kwargs))):
        arguments = {} if function is not f else kwargs
        with pytest.raises(error, match=message):
            function(jnp.zeros((2, 3)), **arguments)


@pytest.mark.single
@pytest.mark.usefixtures("no_jaxtyping")
def test_bad_inputs_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"axis must not repeat, got \(0, -2\) for an array of rank 2"
    ):
        softmax(jnp.zeros((2, 3)), (0, -2))
    with pytest.raises(ValueError, match="axis -1 needs an array of rank 1 or more, got a scalar"):
        softmax(jnp.zeros(()))
    with pytest.raises(TypeError, match="x must hold real numbers, got dtype complex64"):
        softmax(jnp.zeros(2, jnp.complex64))
    with pytest.raises(TypeError, match=r"x must be an array of numbers, got array\('abc'"):
        log_softmax(np.array("abc"))
    with pytest.raises(ValueError, match=r"a and b must broadcast to one shape, got .*\(3,\) and"):
        logsumexp(jnp.zeros(3), b=jnp.zeros((2, 4)))
    with pytest.raises(TypeError, match="a must be an array of numbers, got array"):
        logsumexp(np.array("abc"))
    with pytest.raises(TypeError, match=r"axis must be an integer, got \(0, 1\)"):
        softmax_jacobian(jnp.zeros((2, 3)), (0, 1))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"axis must be .* got an array of shape \(3,\) and dtype b"
    ):
        softmax(jnp.zeros((2, 3)), jnp.ones(3, bool))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"axis must be .* got a tracer; name it in static_argnames"
    ):
        jax.jit(softmax)(jnp.zeros((2, 3)), 0)
    with pytest.raises(ValueError, match=r"axis_name must name axes .* called in, got 'classes'"):
        softmax(jnp.zeros(3), axis_name="classes")


# Entropy and divergence


def probabilities_of(z: Any, where: Any) -> Any:
    e = np.where(where, np.exp(np.asarray(z, np.float64)), 0)
    return e / e.sum(-1, keepdims=True)


def plogq(p: Any, q: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p == 0, 0, p * np.log(q)).sum(-1)


def test_entropy_and_divergence_equal_their_definitions() -> None:
    z, t = np.asarray(normal(3, 5)), 2 * np.asarray(normal(5, 3)).T
    for where in (True, helpers._mask(3, 5)):
        p, q = probabilities_of(z, where), probabilities_of(t, where)
        mask = None if where is True else where
        close = partial(np.testing.assert_allclose, rtol=20 * eps(WIDE))
        close(entropy(z, where=mask), -plogq(p, p))
        close(kl_divergence(z, t, where=mask), plogq(q, q) - plogq(q, p), atol=4 * eps(WIDE))
        turned = None if mask is None else mask.T
        close(entropy(z.T, 0, turned), -plogq(p, p))
        close(kl_divergence(z.T, t.T, 0, turned), kl_divergence(z, t, where=mask))


slopes_of_divergence = jax.jit(jax.vmap(jax.value_and_grad(kl_divergence, (0, 1))))


@pytest.mark.parametrize("step", [1e2, 1e1, 1.0, 1e-1, 1e-3, 1e-6])
def test_the_divergence_keeps_its_digits_between_close_distributions(step: float) -> None:
    random = np.random.default_rng(0)
    t = jnp.asarray(3 * random.normal(size=(30, 5)), WIDE)
    z = t + jnp.asarray(step * random.normal(size=(30, 5)), WIDE)
    with mpmath.workdps(60):
        p, q = (exact.make_rows(x) for x in (z, t))
        log_p, log_q = (np.stack([exact.log_softmax(row)[0] for row in part]) for part in (p, q))
        shares_p, shares_q = (np.stack([row.p for row in part]) for part in (p, q))
        value = (shares_q * (log_q - log_p)).sum(1)
        of_target = shares_q * (log_q - log_p - value[:, None])
        gradients = [part.astype(float) for part in (shares_p - shares_q, of_target)]
    ours = slopes_of_divergence(z, t)
    np.testing.assert_allclose(ours[0], value.astype(float), 32 * eps(WIDE))
    # The rounding of z - m enters both by up to half of the largest gap.
    tolerance = (32 + np.ptp(z, axis=1).max()) * eps(WIDE)
    for derivative, wanted in zip(ours[1], gradients, strict=True):
        scale = np.abs(wanted).max(1, keepdims=True)
        np.testing.assert_allclose(derivative / scale, wanted / scale, 0, tolerance)


@pytest.mark.single
def test_entropy_and_divergence_are_computed_in_float32() -> None:
    z = normal(3, 5).astype(jnp.bfloat16)
    assert entropy(z).dtype == kl_divergence(z, z).dtype == jnp.float32
    np.testing.assert_array_equal(entropy(z), entropy(z.astype(jnp.float32)))


@fresh_programs
def test_impossible_classes_have_no_entropy_and_a_finite_gradient() -> None:
    z = jnp.array([0.0, 0.0, -inf])
    np.testing.assert_allclose(entropy(z), np.log(2), 4 * eps(WIDE))
    np.testing.assert_allclose(jax.grad(entropy)(z), 0, atol=4 * eps(WIDE))
    assert np.isfinite(jax.jit(jax.hessian(entropy))(z)).all()
    assert entropy(jnp.array([3.0, -inf])) == 0


@fresh_programs
def test_the_divergence_at_impossible_classes() -> None:
    z, sure = jnp.array([0.0, 1.0, -inf]), jnp.array([0.0, -inf, -inf])
    np.testing.assert_allclose(kl_divergence(z, sure), np.log1p(np.e), 4 * eps(WIDE))
    for gradient in jax.grad(kl_divergence, (0, 1))(z, sure):
        assert np.isfinite(gradient).all()
    assert kl_divergence(z, z) == 0
    assert kl_divergence(sure, z) == inf
    share = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(jax.grad(kl_divergence)(sure, z), [share, -share, 0], 4 * eps(WIDE))
    for gradient in jax.grad(kl_divergence, (0, 1))(sure, z):
        assert np.isfinite(gradient).all()


@fresh_programs
def test_a_row_masked_throughout_has_no_entropy_and_no_divergence() -> None:
    z, where = jnp.array([[1.0, 2.0], [inf, 4.0]]), jnp.array([[True, True], [False, False]])
    assert entropy(z, where=where)[1] == 0
    assert kl_divergence(z, 2 * z, where=where)[1] == 0
    gradients = [
        jax.grad(lambda z: entropy(z, where=where).sum())(z),
        *jax.grad(lambda z, t: kl_divergence(z, t, where=where).sum(), (0, 1))(z, z),
    ]
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert not gradient[1].any()


@fresh_programs
def test_tails_of_entropy_and_divergence_keep_their_digits() -> None:
    gap = 40.0 if jnp.float64 == WIDE else 20.0
    z, tail = jnp.array([gap, 0.0], WIDE), np.exp(-gap)
    np.testing.assert_allclose(entropy(z), tail * (1 + gap), 20 * eps(WIDE))
    gradient = jax.grad(entropy)(z)
    np.testing.assert_allclose(gradient, [-tail * gap, tail * gap], 50 * eps(WIDE))
    # Close distributions: half the variance of the difference under p, never below 0.
    z, step = normal(6), 1e-5 if jnp.float64 == WIDE else 1e-3
    p, v = probabilities_of(z, True), np.cos(np.arange(6))
    moved = z + jnp.asarray(step * v, WIDE)
    expected = step**2 / 2 * (p @ v**2 - (p @ v) ** 2)
    np.testing.assert_allclose(kl_divergence(moved, z), expected, 20 * step)
    assert kl_divergence(z, z + 1e-7) >= 0


@in_double
def test_derivatives_of_entropy_and_divergence_equal_finite_differences() -> None:
    where = jnp.array([[True, True, True, True], [True, False, True, True]])
    z, t = normal(2, 4), normal(4, 2).T
    check_grads(jax.jit(partial(entropy, where=where)), (z,), order=2)
    check_grads(jax.jit(partial(kl_divergence, where=where)), (z, t), order=2)
    p, q = probabilities_of(z, True), probabilities_of(t, True)
    gradient = jax.grad(lambda z: kl_divergence(z, t).sum())(z)
    np.testing.assert_allclose(gradient, p - q, 20 * eps(WIDE), 4 * eps(WIDE))


@pytest.mark.single
@pytest.mark.usefixtures("no_jaxtyping", "no_debug_nans")
def test_bad_arguments_of_entropy_divergence_and_temperature_are_named() -> None:
    x = jnp.zeros((2, 3))
    with pytest.raises(TypeError, match="logits must hold real numbers, got dtype complex64"):
        entropy(x.astype(jnp.complex64))
    with pytest.raises(ValueError, match=r"target_logits must have shape \(shape of logits\)"):
        kl_divergence(x, x[0])
    with pytest.raises(TypeError, match="axis_name must be a string or a tuple of strings, got 3"):
        softmax(x, axis_name=3)  # type: ignore[arg-type]
    for f in (softmax, log_softmax, softmax_jacobian):
        with pytest.raises(ValueError, match=r"temperature must be at least 0, got -1\.0"):
            f(x, temperature=-1.0)
        with pytest.raises(ValueError, match="temperature must be at least 0, got nan"):
            f(x, temperature=np.array([[1.0], [nan]]))
        for t in (np.ones(2), np.ones((2, 3)), np.ones((1, 2, 1))):
            message = (
                rf"broadcast to shape \(2, 1\), one per row, got shape {re.escape(str(t.shape))}"
            )
            with pytest.raises(ValueError, match=message):
                f(x, temperature=t)
        with pytest.raises(TypeError, match="temperature must hold real numbers, got dtype compl"):
            f(x, temperature=1j)


@pytest.mark.single
@pytest.mark.parametrize("length", [70_000, 1_000_000])
def test_a_long_leading_axis_is_added_up_in_more_than_one_accumulator(length: int) -> None:
    x = np.random.default_rng(0).normal(size=(length, 2)).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    exact /= exact.sum(0)
    np.testing.assert_allclose(softmax(x, 0), exact, rtol=(4 + np.log2(length)) * eps(jnp.float32))


@pytest.mark.single
def test_the_derivative_at_a_temperature_keeps_its_tail_inside_jit() -> None:
    x = jnp.array([0.0, -7.0])
    v = jnp.array([-0.68228679895401, -0.3522486388683319])

    def tangent(t: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: softmax(x, temperature=t), (x,), (v,))[1]

    found = jax.jit(tangent)(jnp.float32(0.1785457730293274))
    np.testing.assert_allclose(found, [-1.7378994e-17, 1.7378994e-17], rtol=1e-5)


@pytest.mark.parametrize("size", [1e4, 1e7])
def test_the_gradient_of_a_large_divergence_does_not_cancel(size: float) -> None:
    z = jnp.array([0.0, 0.0, -size])
    gradient = jax.grad(kl_divergence)(z, jnp.zeros(3))
    np.testing.assert_allclose(gradient, [1 / 6, 1 / 6, -1 / 3], rtol=1e-6)
