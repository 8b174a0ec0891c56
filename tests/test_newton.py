"""The parts of the Newton solver, each beside a dense computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax import Params, linear_logits
from jaxsoftmax.regression import _objective as objective_module
from jaxsoftmax.regression._data import Problem, make_problem, thinned
from jaxsoftmax.regression._objective import centred, curvature, objective, value_and_gradient
from jaxsoftmax.regression.solver import _coordinates, _preconditioner
from jaxsoftmax.regression.solver._certificate import gap_scale
from jaxsoftmax.regression.solver._cg import (
    Progress,
    conjugate_gradient,
    empty_memory,
    informed,
)
from jaxsoftmax.regression.solver._implicit import solve_hessian
from jaxsoftmax.regression.solver._lbfgs import Fit, Status
from jaxsoftmax.regression.solver._newton import newton_cg
from tests.helpers import WIDE, eps

EXAMPLES, WIDTH, CLASSES, L2 = 30, 4, 3, 0.05
MANY = 32 * CLASSES * WIDTH + 20  # examples of which a sample is taken
TOL = 1e-6


def problem(l2: float = L2) -> Problem:
    rng = np.random.default_rng(0)
    return make_problem(
        jnp.asarray(rng.normal(size=(EXAMPLES, WIDTH)) + 0.5, WIDE),
        jnp.asarray(rng.integers(0, CLASSES, EXAMPLES)),
        l2=jnp.asarray(l2, WIDE),
        sample_weight=jnp.asarray(rng.uniform(size=EXAMPLES), WIDE),
        offset=jnp.asarray(rng.normal(size=(EXAMPLES, CLASSES)), WIDE),
    )


def params(seed: int = 1) -> Params:
    rng = np.random.default_rng(seed)
    return Params(
        jnp.asarray(rng.normal(size=(CLASSES, WIDTH)), WIDE),
        jnp.asarray(rng.normal(size=CLASSES), WIDE),
    )


def close(actual: jax.Array, expected: jax.Array, scale: float = 100) -> None:
    np.testing.assert_allclose(actual, expected, scale * eps(WIDE), scale * eps(WIDE))


def solved(
    data: Problem, tol: float = TOL, max_iter: int = 50, init: Params | None = None
) -> tuple[Fit, float]:
    if init is None:
        init = Params(jnp.zeros((CLASSES, WIDTH), WIDE), jnp.zeros(CLASSES, WIDE))
    fit, products = newton_cg(
        data, init, fit_bias=True, tol=jnp.asarray(tol, WIDE), max_iter=jnp.asarray(max_iter)
    )
    return fit, float(products)


@pytest.fixture(params=[False, True], ids=["whole", "in blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 rows, which do not divide the 30."""
    if request.param:
        in_small_blocks(monkeypatch)


def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_module, "_LOGITS", 0)
    monkeypatch.setattr(objective_module, "_BLOCK", 4 * CLASSES)


@pytest.mark.usefixtures("blocks")
def test_value_and_gradient_are_those_of_the_objective() -> None:
    value, gradient = value_and_gradient(params(), problem())
    expected = jax.value_and_grad(objective)(params(), problem())
    close(value, expected[0])
    jax.tree.map(close, gradient, expected[1])


@pytest.mark.usefixtures("blocks")
def test_the_product_is_that_of_the_dense_hessian() -> None:
    at, v = params(), params(2)
    _, expected = jax.jvp(jax.grad(lambda at: objective(at, problem())), (at,), (v,))
    jax.tree.map(close, curvature(at, problem()).product(v), expected)


def test_blocks_of_rows_have_the_mean_spread_of_the_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = curvature(params(), problem()).spread()
    in_small_blocks(monkeypatch)
    parts = curvature(params(), problem()).spread()
    assert whole.shape == (CLASSES, EXAMPLES)
    close(parts, whole.mean(0, keepdims=True))


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_coordinates_have_mean_zero_and_size_one_and_give_the_same_objective(
    parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:
        monkeypatch.setattr(_coordinates, "_BLOCK", 4 * WIDTH)
    far = problem()._replace(features=problem().features * jnp.array([1e-3, 1, 1, 1e3]) + 2)
    view = _coordinates.view(far, centre=True)
    fast = _coordinates.standard(view, _coordinates.standard_columns(view, WIDE))
    close(far.share @ fast.problem.features, jnp.zeros(WIDTH), 1e4)
    close(far.share @ jnp.abs(fast.problem.features), jnp.ones(WIDTH), 1e4)
    table = jnp.concatenate([params().weights, params().bias[:, None]], 1)
    close(view.table_of(view.params(table)), table, 1e5)
    here, there = (objective(v.params(table), v.problem) for v in (view, fast))
    np.testing.assert_allclose(here, there, 1e-3 if jnp.float32 == WIDE else 1e-10)
    gradient = jax.grad(lambda table: objective(view.params(table), far))(table)
    close(view.table(jax.grad(objective)(view.params(table), far)), gradient, 1e4)
    close(view.table(view.gradient(table)), table, 1e6)


def test_a_constant_column_has_no_spread_whatever_its_size() -> None:
    features = problem().features.at[:, 1].set(1e6 / 3)
    view = _coordinates.view(problem()._replace(features=features), centre=True)
    np.testing.assert_array_equal(view.inverse > 0, [True, False, True, True])
    assert (
        not _coordinates.standard(view, _coordinates.standard_columns(view, WIDE))
        .problem.features[:, 1]
        .any()
    )


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_factors_of_all_rows_are_those_of_the_blocks_of_the_hessian(
    parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:  # blocks of rows and panels of columns that do not divide them
        monkeypatch.setattr(_preconditioner, "_ROWS", 4)
        monkeypatch.setattr(_preconditioner, "_PANEL", 2)
    data, at = problem(), params()
    ridge = jnp.append(jnp.full(WIDTH, L2, WIDE), 0)
    mean = _preconditioner.covariance(data)
    spread = curvature(at, data).spread()
    factors = _preconditioner.factorise(data, spread, mean, ridge, EXAMPLES)
    x = jnp.concatenate([data.features, jnp.ones((EXAMPLES, 1), WIDE)], 1)
    v = jnp.arange(CLASSES * (WIDTH + 1.0), dtype=WIDE).reshape(CLASSES, WIDTH + 1)
    applied = _preconditioner.apply(factors, v)
    for k in range(CLASSES):
        block = (x.T * spread[k]) @ x + jnp.diag(ridge)
        np.testing.assert_allclose(block @ applied[k], v[k], 1e-3, 1e-3)


def test_rows_that_a_factor_leaves_out_count_as_the_mean_row() -> None:
    data = problem()
    ridge = jnp.append(jnp.full(WIDTH, L2, WIDE), 0)
    spread = jnp.where(jnp.arange(EXAMPLES) < 6, 1.0, 0.1).astype(WIDE)[None]
    mean = _preconditioner.covariance(data)
    inverse = _preconditioner.factorise(data, spread, mean, ridge, 6)[0]
    x = jnp.concatenate([data.features, jnp.ones((EXAMPLES, 1), WIDE)], 1)
    block = x[:6].T @ x[:6] + 2.4 * (x.T * data.share) @ x + jnp.diag(ridge)
    np.testing.assert_allclose(inverse @ block, np.eye(WIDTH + 1), atol=1e-3)


@pytest.mark.usefixtures("no_debug_nans")
def test_a_block_that_can_not_be_factorised_leaves_its_diagonal() -> None:
    block = jnp.array([[4.0, 100.0], [100.0, 9.0]], WIDE)
    inverse = _preconditioner._inverse(block, jnp.zeros(2, WIDE))
    np.testing.assert_allclose(inverse, np.diag([1 / 4, 1 / 9]), 1e-6)


def test_the_plan_has_no_factors_above_its_bytes() -> None:
    plan = _preconditioner.plan
    assert plan(10000, 784, 10, kept=True).groups == 10
    assert plan(10000, 784, 2, kept=True).groups == 1
    assert plan(10000, 784, 1000, kept=True).groups == 1
    assert plan(10000, 784, 10, kept=False).groups == 1
    assert plan(10000, 9000, 10, kept=True).groups == 0


def test_conjugate_gradients_solve_a_system_and_its_decrement() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    matrix, b = jnp.asarray(root @ root.T + np.eye(6), WIDE), jnp.asarray(rng.normal(size=6), WIDE)

    def proceed(at: Progress) -> jax.Array:
        return (at.squared > eps(WIDE) ** 2 * at.first) & (at.steps < 20)

    found = conjugate_gradient(lambda v, _: matrix @ v, lambda v: v / jnp.diag(matrix), b, proceed)
    expected = jnp.linalg.solve(matrix, b)
    close(found.x, expected, 1e4)
    close(found.decrement, b @ expected, 1e4)
    memory = empty_memory(2, b, WIDE)
    broken = conjugate_gradient(lambda v, _: -v, lambda v: v, b, proceed, memory)
    assert broken.broken
    assert not broken.x.any()
    assert broken.memory is not None
    assert not broken.memory.directions.any()
    assert not broken.memory.images.any()


def test_remembered_directions_make_the_preconditioner_exact_along_them() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    matrix, b = jnp.asarray(root @ root.T + np.eye(6), WIDE), jnp.asarray(rng.normal(size=6), WIDE)
    memory = empty_memory(3, b, WIDE)
    close(informed(lambda v: 2 * v, memory)(b), 2 * b)
    found = conjugate_gradient(
        lambda v, _: matrix @ v, lambda v: v, b, lambda at: at.steps < 5, memory
    ).memory
    assert found is not None
    directions, images = found
    close(directions @ matrix @ directions.T, jnp.eye(3), 1e5)
    close(images, directions @ matrix, 1e4)
    corrected = informed(lambda v: v, found)
    for direction, image in zip(directions, images, strict=True):
        close(corrected(image), direction, 1e5)
    dense = jax.vmap(corrected)(jnp.eye(6, dtype=WIDE))
    close(dense, dense.T, 1e4)
    assert jnp.linalg.eigvalsh(dense).min() > 0


def test_the_space_of_the_rows_has_the_same_objective() -> None:
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(EXAMPLES, 50)) + 1, WIDE)
    wide = problem()._replace(features=features)
    rows, inner = _coordinates.row_space(wide, centre=True)
    assert inner.features.shape == (EXAMPLES, EXAMPLES)
    weights = jnp.asarray(rng.normal(size=(CLASSES, EXAMPLES)), WIDE)
    there = Params(weights, jnp.arange(CLASSES, dtype=WIDE))
    here = rows.outward(there)
    close(objective(here, wide), objective(there, inner), 1e4)
    jax.tree.map(lambda a, b: close(a, b, 1e4), rows.inward(here), there)


def test_a_penalty_that_underflows_still_counts_in_the_gap() -> None:
    root = jnp.array([1e-24, 0.5, 0.0], jnp.float32)  # of penalties, the first of which underflows
    np.testing.assert_allclose(gap_scale(root), [0.5**0.5 * 1e24, 2**0.5, 0], 1e-6)


@pytest.mark.parametrize("fit_bias", [True, False])
def test_the_hessian_is_solved_for(fit_bias: bool) -> None:
    data, at = problem(), params()
    wanted = params(3)
    wanted = Params(*(value - value.mean(0) for value in wanted))
    if not fit_bias:
        wanted = wanted._replace(bias=jnp.zeros_like(wanted.bias))
    right = curvature(at, data).product(wanted)
    found = solve_hessian(at, data, right, fit_bias=fit_bias)
    jax.tree.map(lambda a, b: close(a, b, 1e4), found, wanted)


def test_a_fit_takes_few_products_and_counts_them() -> None:
    fit, products = solved(problem())
    assert fit.status == Status.CONVERGED
    assert int(fit.iterations) < products < 60


def test_without_a_step_the_bias_is_optimal_and_the_gap_the_duality_gap() -> None:
    data, at = problem()._replace(offset=None), centred(params(), jnp.ones(CLASSES, bool))
    near, _ = solved(data, tol=1e-8, max_iter=0, init=at)
    found, _ = solved(data, tol=1e-8, max_iter=0, init=near.params)
    close(found.params.weights, at.weights)
    gradient = jax.grad(objective)(found.params, data)
    np.testing.assert_allclose(gradient.bias, 0, atol=1e-5)
    # The dual objective at r = p - y: mean entropy of p less |sum_i c_i r_i x_i^T|^2 / (2 l2).
    logits = np.asarray(linear_logits(found.params, data.features), np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    share = np.asarray(data.share, np.float64)
    product = (share[:, None] * (p - np.eye(CLASSES)[data.labels])).T @ np.asarray(data.features)
    dual = -share @ (p * np.log(p)).sum(-1) - (product**2).sum() / (2 * L2)
    np.testing.assert_allclose(found.gap * found.objective, found.objective - dual, 1e-4)


def test_without_penalty_the_gap_is_half_the_squared_newton_decrement() -> None:
    data, at = problem(0.0), centred(params(), jnp.ones(CLASSES, bool))
    found, _ = solved(data, tol=1e6, max_iter=0, init=at)

    def flat_objective(flat: jax.Array) -> jax.Array:
        weights, bias = flat[: CLASSES * WIDTH], flat[CLASSES * WIDTH :]
        return objective(Params(weights.reshape(CLASSES, WIDTH), bias), data)

    flat = jnp.concatenate([found.params.weights.ravel(), found.params.bias])
    gradient, hessian = jax.grad(flat_objective)(flat), jax.hessian(flat_objective)(flat)
    expected = gradient @ np.linalg.pinv(hessian, rcond=1e-5) @ gradient / 2
    np.testing.assert_allclose(found.gap * found.objective, expected, rtol=1e-3)


def many(kind: str, l2: float) -> Problem:
    """So many examples that a sample of them gives the first steps, which may mislead."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(MANY, WIDTH))
    labels = (
        features @ rng.normal(size=(WIDTH, CLASSES)) + rng.gumbel(size=(MANY, CLASSES))
    ).argmax(1)
    weight = np.ones(MANY)
    if kind == "in turns":  # of every 4 examples each is of another kind
        features *= np.array([1, 10, 1, 0.1])[np.arange(MANY) % 4, None]
    if kind == "rare column":
        features[:, 1] = np.arange(MANY) % (MANY // 3) == 0
    if kind == "column outside the sample":
        features[:, 1] = 0
        numbers = problem()._replace(features=jnp.arange(MANY)[:, None], share=jnp.ones(MANY))
        outside = np.setdiff1d(np.arange(MANY), thinned(numbers, 4).features)
        features[outside[::40], 1] = 1
    if kind == "few of weight":
        weight[50:] = 0
    if kind == "unequal weights":
        weight = np.exp(3 * rng.normal(size=MANY))
    return make_problem(
        jnp.asarray(features, WIDE),
        jnp.asarray(labels),
        l2=jnp.asarray(l2, WIDE),
        sample_weight=jnp.asarray(weight, WIDE),
    )


@pytest.mark.parametrize("l2", [1e-3, 0])
@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "in turns",
        "rare column",
        "column outside the sample",
        "few of weight",
        "unequal weights",
    ],
)
def test_a_fit_that_starts_from_a_sample_ends_at_the_same_optimum(
    kind: str, l2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = many(kind, l2)
    expected, all_products = solved(data, 1e-10 if jnp.float64 == WIDE else TOL)
    monkeypatch.setattr(_preconditioner, "_LARGE", 0)
    found, products = solved(data)
    assert found.status == expected.status == Status.CONVERGED
    rounding = 10 * eps(WIDE)
    gap = found.gap if l2 > 0 else 1.01 * found.gap  # which is an estimate then
    assert found.objective * (1 - gap - rounding) <= expected.objective
    assert found.objective <= expected.objective * (1 + TOL + rounding)
    # What is reported is of the whole problem, in its own dtype.
    close(found.objective, objective(found.params, data))
    if kind == "plain":
        assert products < all_products


@pytest.mark.parametrize("max_iter", [0, 1, 3])
@pytest.mark.parametrize("l2", [1e-3, 0])
def test_a_fit_that_is_cut_short_reports_the_whole_problem(
    max_iter: int, l2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = many("plain", l2)
    best = solved(data)[0].objective
    monkeypatch.setattr(_preconditioner, "_LARGE", 0)
    fit, _ = solved(data, max_iter=max_iter)
    assert fit.status == Status.MAX_ITER
    assert fit.iterations == max_iter
    close(fit.objective, objective(fit.params, data))
    if l2 > 0:
        assert fit.objective * (1 - fit.gap) <= best


def test_separable_classes_are_noticed_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_preconditioner, "_LARGE", 0)
    data = many("plain", 0)
    labels = jnp.argmax(data.features[:, :CLASSES], 1)
    fit, _ = solved(data._replace(labels=labels), max_iter=100)
    assert fit.status == Status.SEPARABLE
    close(fit.objective, objective(fit.params, data._replace(labels=labels)))


def test_a_sample_has_one_example_of_each_group() -> None:
    data = problem()._replace(features=jnp.arange(30 * WIDTH, dtype=WIDE).reshape(30, WIDTH))
    few = thinned(data, 4)
    chosen = few.features[:, 0].astype(int) // WIDTH
    np.testing.assert_array_equal(chosen // 4, np.arange(7))
    assert len(set(np.asarray(chosen % 4))) > 2
    close(few.share, 4 * data.share[chosen])
    np.testing.assert_array_equal(few.labels, data.labels[chosen])
    assert few.offset is not None
    assert data.offset is not None
    close(few.offset, data.offset[:, chosen])
