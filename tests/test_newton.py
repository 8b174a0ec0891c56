"""The parts of the Newton solver, each beside a dense computation."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsoftmax import Fit, Params, Status, linear_logits
from jaxsoftmax.regression import _objective
from jaxsoftmax.regression._coordinates import Coordinates, RowSpace
from jaxsoftmax.regression._data import Problem, make_problem
from jaxsoftmax.regression._objective import as_they_came, losses_and_residuals, table_of
from jaxsoftmax.regression._penalty import Ridge
from jaxsoftmax.regression._plan import Plan
from jaxsoftmax.regression._rows import Dense, Examples, Raw
from jaxsoftmax.regression.solver import _preconditioner
from jaxsoftmax.regression.solver._certificate import bias_step, moves_of
from jaxsoftmax.regression.solver._cg import Stop, conjugate_gradient, informed
from jaxsoftmax.regression.solver._implicit import solve_hessian
from jaxsoftmax.regression.solver._model import standard_coordinates
from tests.fits import planned_fit
from tests.helpers import WIDE, eps, in_double

EXAMPLES, WIDTH, CLASSES, L2 = 30, 4, 3, 0.05
TOL = 1e-6
RNG = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "features": jnp.asarray(RNG.normal(size=(EXAMPLES, WIDTH)) + 0.5, WIDE),
    "labels": jnp.asarray(RNG.integers(0, CLASSES, EXAMPLES)),
    "sample_weight": jnp.asarray(RNG.uniform(size=EXAMPLES), WIDE),
    "offset": jnp.asarray(RNG.normal(size=(EXAMPLES, CLASSES)), WIDE),
}

evaluate = jax.jit(_objective.evaluate)
hessian_product = jax.jit(_objective.hessian_product)
hessian_weight = jax.jit(_objective.hessian_weight)
point_at = jax.jit(_objective.point_at)


@jax.jit
def problem(**changed: Any) -> Problem:
    return make_problem(**(ARRAYS | changed), num_classes=CLASSES)


@jax.jit
def rows_and_penalty(l2: float = L2, **changed: Any) -> tuple[Examples, Ridge]:
    return as_they_came(problem(**changed), CLASSES, jnp.asarray(l2, WIDE))


@jax.jit
def objective(at: Params, l2: float = L2, **changed: Any) -> jax.Array:
    return _objective.objective(at, problem(**changed), jnp.asarray(l2, WIDE))


def params(seed: int = 1) -> Params:
    rng = np.random.default_rng(seed)
    return Params(
        jnp.asarray(rng.normal(size=(CLASSES, WIDTH)), WIDE),
        jnp.asarray(rng.normal(size=CLASSES), WIDE),
    )


@partial(jax.jit, static_argnums=2)
def coordinates_of(features: jax.Array, share: jax.Array, plan: Plan) -> Coordinates:
    return standard_coordinates(features, share, fit_bias=True, plan=plan)


def close(actual: Any, expected: Any, scale: float = 100) -> None:
    np.testing.assert_allclose(actual, expected, scale * eps(WIDE), scale * eps(WIDE))


def solved(l2: float = L2, **kwargs: Any) -> Fit:
    return planned_fit(Plan(), **(ARRAYS | {"num_classes": CLASSES, "l2": l2, "tol": TOL} | kwargs))


BLOCKS = pytest.mark.parametrize("block", [EXAMPLES, 4])  # the second does not divide 30


@BLOCKS
@pytest.mark.parametrize("by_class", [False, True])
def test_value_and_gradient_are_those_of_the_log_likelihood(block: int, by_class: bool) -> None:
    labels = jax.nn.one_hot(ARRAYS["labels"], CLASSES, dtype=WIDE)
    changed: dict[str, Any] = {"labels": 0.8 * labels + 0.2 / CLASSES} if by_class else {}
    shares = changed.get("labels", labels)
    data = problem()

    def log_likelihood(at: Params) -> jax.Array:
        logits = linear_logits(at, ARRAYS["features"]) + ARRAYS["offset"]
        losses = -jnp.sum(shares * jax.nn.log_softmax(logits), 1)
        return data.share @ losses + L2 / 2 * jnp.sum(at.weights**2)

    rows, penalty = rows_and_penalty(**changed)
    value, point = evaluate(replace(rows, block=block), penalty, table_of(params()))
    expected, gradient = jax.jit(jax.value_and_grad(log_likelihood))(params())
    close(value[0], expected)
    close(point.gradient, table_of(gradient))


@BLOCKS
def test_the_product_is_that_of_the_dense_hessian(block: int) -> None:
    at, v = params(), params(2)
    _, expected = jax.jit(partial(jax.jvp, jax.grad(objective)))((at,), (v,))
    rows, penalty = rows_and_penalty()
    rows = replace(rows, block=block)
    found = hessian_product(rows, penalty, point_at(rows, table_of(at)), table_of(v))
    close(found, table_of(expected))


def test_blocks_of_rows_have_the_mean_weight_of_the_classes() -> None:
    rows, _ = rows_and_penalty()
    whole = hessian_weight(rows, point_at(rows, table_of(params())))
    rows = replace(rows, block=4)
    parts = hessian_weight(rows, point_at(rows, table_of(params())))
    assert whole.shape == (CLASSES, 1, EXAMPLES)
    close(parts, whole.mean(0, keepdims=True))


def test_a_confident_loss_and_its_residual_keep_their_digits() -> None:
    z, tail = jnp.array([[40.0], [0.0], [-jnp.inf]], WIDE), np.exp(-40.0)
    for labels in (jnp.array([[0]]), jnp.array([[1.0], [0.0], [0.0]], WIDE)):
        losses, residuals, p = losses_and_residuals(z, labels)
        np.testing.assert_allclose(losses, [[tail]], rtol=1e-5)
        np.testing.assert_allclose(p, [[1.0], [tail], [0.0]], rtol=1e-5)
    np.testing.assert_allclose(residuals[1:], p[1:])
    _, residuals, _ = losses_and_residuals(z, jnp.array([[0]]))
    np.testing.assert_allclose(residuals[0], [-tail], rtol=1e-5)


@in_double
def test_derivatives_of_losses_and_residuals_equal_finite_differences() -> None:
    z = jnp.asarray(RNG.normal(size=(CLASSES, 2, 5)), WIDE)
    integers = jnp.asarray(RNG.integers(0, CLASSES, (1, 2, 5)))
    check_grads(jax.jit(lambda z: losses_and_residuals(z, integers)), (z,), order=2)

    @jax.jit
    def of_shares(z: jax.Array, logits: jax.Array) -> Any:
        return losses_and_residuals(z, jax.nn.softmax(logits, 0))

    check_grads(of_shares, (z, jnp.asarray(RNG.normal(size=z.shape), WIDE)), order=2)


@pytest.mark.parametrize("plan", [Plan(), Plan(block_features=4 * WIDTH)])
def test_coordinates_have_mean_zero_and_size_one_and_give_the_same_objective(plan: Plan) -> None:
    far = ARRAYS["features"] * jnp.array([1e-3, 1, 1, 1e3], WIDE) + 2
    data = problem(features=far)
    of = coordinates_of(far, data.share, plan)
    columns = of.standardise(far)
    close(data.share @ columns[:, :-1], jnp.zeros(WIDTH), 1e4)
    close(data.share @ jnp.abs(columns), jnp.ones(WIDTH + 1), 1e4)
    table = table_of(params())
    close(of.table(of.params(table)), table, 1e5)
    value, gradient = jax.value_and_grad(objective)(
        jax.tree.map(lambda v: v[0], of.params(table)), features=far
    )
    for design in (Dense(columns), Raw(far, of)):
        rows = Examples.of(data, design, CLASSES, EXAMPLES)
        penalty = Ridge.of(jnp.full(1, L2, WIDE), of.inverse)
        here, point = evaluate(rows, penalty, table)
        np.testing.assert_allclose(here[0], value, 1e-3 if jnp.float32 == WIDE else 1e-10)
        expected = of.pull_back(gradient.weights[:, None], gradient.bias[:, None, None])
        np.testing.assert_allclose(
            point.gradient, expected, 1e-2, 1e-2 * float(abs(expected).max())
        )
        norm = jnp.sqrt(jnp.sum(gradient.weights**2) + jnp.sum(gradient.bias**2))
        np.testing.assert_allclose(of.gradient_norm(point.gradient), norm[None], 1e-2)


def test_a_constant_column_has_no_deviation_whatever_its_size() -> None:
    features = ARRAYS["features"].at[:, 1].set(1e6 / 3)
    of = coordinates_of(features, problem().share, Plan())
    np.testing.assert_array_equal(of.inverse > 0, [True, False, True, True])
    assert not of.standardise(features)[:, 1].any()


def test_the_space_of_the_rows_has_the_same_objective() -> None:
    features = jnp.asarray(np.random.default_rng(0).normal(size=(EXAMPLES, 50)) + 1, WIDE)
    mean = problem().share @ features
    space, coordinates = jax.jit(RowSpace.of)(features, mean)
    assert coordinates.shape == (EXAMPLES, EXAMPLES)
    inner = jnp.asarray(np.random.default_rng(1).normal(size=(CLASSES, EXAMPLES)), WIDE)
    close((features - mean) @ space.outward(inner).T, coordinates @ inner.T, 1e4)
    close(space.inward(space.outward(inner)), inner, 1e4)


def standard_rows() -> Examples:
    data = problem()
    of = coordinates_of(data.features, data.share, Plan())
    return Examples.of(data, Dense(of.standardise(data.features)), CLASSES, EXAMPLES)


@pytest.mark.parametrize("plan", [Plan(), Plan(factor_entries=4 * (WIDTH + 1), factor_panel=2)])
def test_factors_of_all_rows_are_those_of_the_blocks_of_the_hessian(plan: Plan) -> None:
    rows = standard_rows()
    ridge = jnp.append(jnp.full(WIDTH, L2, WIDE), 0)
    mean = _preconditioner.covariance(rows, rows.share[0, 0], plan)
    weight = hessian_weight(rows, point_at(rows, table_of(params())))
    least = jnp.full((1, 1), L2, WIDE)
    factors = _preconditioner.inverse_blocks(
        rows, weight, mean, ridge[None, None], least, jnp.asarray(False), EXAMPLES, plan
    )
    x = rows.design.columns  # type: ignore[union-attr]
    v = jnp.arange(CLASSES * (WIDTH + 1.0), dtype=WIDE).reshape(CLASSES, 1, WIDTH + 1)
    applied = _preconditioner.apply(factors, v)
    for k in range(CLASSES):
        block = (x.T * weight[k, 0]) @ x + jnp.diag(ridge)
        np.testing.assert_allclose(block @ applied[k, 0], v[k, 0], 1e-3, 1e-3)


def test_rows_that_a_factor_leaves_out_count_as_the_mean_row() -> None:
    rows = standard_rows()
    ridge = jnp.append(jnp.full(WIDTH, L2, WIDE), 0)
    weight = jnp.where(jnp.arange(EXAMPLES) < 6, 1.0, 0.1).astype(WIDE)[None, None]
    mean = _preconditioner.covariance(rows, rows.share[0, 0], Plan())
    least = jnp.full((1, 1), L2, WIDE)
    inverse = _preconditioner.inverse_blocks(
        rows, weight, mean, ridge[None, None], least, jnp.asarray(False), 6, Plan()
    )[0, 0]
    x = rows.design.columns  # type: ignore[union-attr]
    block = x[:6].T @ x[:6] + 2.4 * (x.T * rows.share[0, 0]) @ x + jnp.diag(ridge)
    np.testing.assert_allclose(inverse @ block, np.eye(WIDTH + 1), atol=1e-3)


@pytest.mark.parametrize("groups", [1, CLASSES])
def test_the_first_factor_is_that_of_equal_weights(groups: int) -> None:
    rows = standard_rows()
    ridge = jnp.append(jnp.full(WIDTH, L2, WIDE), 0)
    mean = _preconditioner.covariance(rows, rows.share[0, 0], Plan())
    weight = hessian_weight(rows, point_at(rows, table_of(params())))[:groups]
    least = jnp.full((1, 1), L2, WIDE)
    inverse = _preconditioner.inverse_blocks(
        rows, weight, mean, ridge[None, None], least, jnp.asarray(True), EXAMPLES, Plan()
    )
    x, share = rows.design.columns, rows.share[0, 0]  # type: ignore[union-attr]
    block = (1 - 1 / CLASSES) / CLASSES * (x.T * share) @ x + jnp.diag(ridge)
    for k in range(groups):
        np.testing.assert_allclose(inverse[k, 0] @ block, np.eye(WIDTH + 1), atol=1e-3)


@pytest.mark.usefixtures("no_debug_nans")
def test_a_block_that_can_not_be_factorised_leaves_its_diagonal() -> None:
    block = jnp.array([[4.0, 100.0], [100.0, 9.0]], WIDE)
    inverse = _preconditioner._invert(block, jnp.zeros(2, WIDE))
    np.testing.assert_allclose(inverse, np.diag([1 / 4, 1 / 9]), 1e-6)


def test_the_plan_has_no_factors_above_its_bytes() -> None:
    plan = Plan().preconditioning
    assert plan(10000, 784, 10, kept=True).groups == 10
    assert plan(10000, 784, 2, kept=True).groups == 1
    assert plan(10000, 784, 1000, kept=True).groups == 1
    assert plan(10000, 784, 10, kept=False).groups == 1
    assert plan(10000, 9000, 10, kept=True).groups == 0


def system() -> tuple[jax.Array, jax.Array]:
    """A positive definite matrix and a right side, of tables with one row and one problem."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    b = jnp.asarray(rng.normal(size=(1, 1, 6)), WIDE)
    return jnp.asarray(root @ root.T + np.eye(6), WIDE), b


def stop_after(steps: int) -> Stop:
    one = jnp.ones(1, WIDE)
    return Stop(-one, eps(WIDE) ** 2 * one, 0 * one, 0 * one, jnp.inf * one, steps * one)


def test_conjugate_gradients_solve_a_system_and_its_decrement() -> None:
    matrix, b = system()
    nothing, one = jnp.zeros((2, 2, *b.shape), WIDE), jnp.ones((1, 1, 1), WIDE)
    solve = partial(conjugate_gradient, b=b, stop=stop_after(20), scale=one, memory=nothing)
    found = solve(lambda v: v @ matrix, lambda v: v / jnp.diag(matrix))
    expected = jnp.linalg.solve(matrix, b[0, 0])
    close(found.x[0, 0], expected, 1e4)
    close(found.numbers[2], b[0] @ expected, 1e4)
    broken = solve(lambda v: -v, lambda v: v)
    assert broken.numbers[3] == 0
    assert not broken.x.any()
    assert not broken.memory.any()


def test_remembered_directions_make_the_preconditioner_exact_along_them() -> None:
    matrix, b = system()
    nothing, one = jnp.zeros((2, 3, *b.shape), WIDE), jnp.ones((1, 1, 1), WIDE)
    close(informed(lambda v: 2 * v, nothing)(b), 2 * b)
    memory = conjugate_gradient(
        lambda v: v @ matrix, lambda v: v, b, stop_after(5), one, nothing
    ).memory
    directions, images = memory[:, :, 0, 0]
    close(directions @ matrix @ directions.T, jnp.eye(3), 1e5)
    close(images, directions @ matrix, 1e4)
    corrected = informed(lambda v: v, memory)
    for direction, image in zip(directions, images, strict=True):
        close(corrected(image[None, None])[0, 0], direction, 1e5)
    dense = jax.vmap(lambda v: corrected(v[None, None])[0, 0])(jnp.eye(6, dtype=WIDE))
    close(dense, dense.T, 1e4)
    assert jnp.linalg.eigvalsh(dense).min() > 0


def test_a_penalty_that_underflows_still_counts_in_the_gap() -> None:
    l2, inverse = np.array([1.0], np.float32), np.array([1e-24, 0.5], np.float32)
    scale = Ridge.of(l2, inverse).gap_scale
    np.testing.assert_allclose(scale[0, 0], [0.5**0.5 * 1e24, 2**0.5, 0], 1e-6)


@pytest.mark.parametrize("fit_bias", [True, False])
def test_the_hessian_is_solved_for(fit_bias: bool) -> None:
    rows, penalty = rows_and_penalty()
    table = table_of(params())
    wanted = params(3)
    wanted = Params(*(value - value.mean(0) for value in wanted))
    if not fit_bias:
        wanted = wanted._replace(bias=jnp.zeros_like(wanted.bias))
    right = hessian_product(rows, penalty, point_at(rows, table), table_of(wanted))
    found = jax.jit(solve_hessian, static_argnames="fit_bias")(
        table, rows, penalty, right, fit_bias=fit_bias
    )
    jax.tree.map(lambda a, b: close(a, b, 1e4), found, wanted)


def test_without_a_step_the_gap_is_the_least_duality_gap_of_the_bias() -> None:
    """At the optimal bias, the dual objective at the residuals p - y."""
    at = params()
    at = Params(*(value - value.mean(0) for value in at))
    with_bias = solved(offset=ARRAYS["offset"] + ARRAYS["features"] @ at.weights.T, l2=1e8)
    at = at._replace(bias=with_bias.params.bias)
    found = solved(init=at, max_iter=0)
    close(found.params.weights, at.weights)
    data = problem()
    logits = np.asarray(linear_logits(at, data.features) + ARRAYS["offset"], np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    share = np.asarray(data.share, np.float64)
    residuals = share[:, None] * (p - np.eye(CLASSES)[data.labels])
    gradient = residuals.T @ np.asarray(data.features) + L2 * np.asarray(at.weights)
    gap = (gradient**2).sum() / (2 * L2)
    np.testing.assert_allclose(found.gap * found.objective, gap, 1e-2)


def test_a_surplus_and_a_step_of_the_bias_give_the_shares_of_the_data() -> None:
    rng = np.random.default_rng(0)
    p, share = rng.dirichlet(np.ones(CLASSES), 50).T, rng.dirichlet(np.ones(50))
    target = np.array([0.2, 0.5, 0.3])[:, None, None]
    residual = (p @ share)[:, None, None] - target
    moves = moves_of(target, residual)[:, 0]
    fraction = np.maximum(-moves, 0)
    q = p * (1 - fraction) + np.maximum(moves, 0) * (fraction.T @ p)
    np.testing.assert_allclose(q.sum(0), 1)
    np.testing.assert_allclose(q @ share, target[:, 0, 0])
    products = ((share * p) @ p.T)[None]
    step, left = bias_step(products, residual / 50, target)
    moved = p * (step[:, 0] - step[:, 0].T @ p)
    np.testing.assert_allclose(moved @ share, (residual / 50)[:, 0, 0], atol=1e-12)
    np.testing.assert_allclose(left, 0, atol=1e-12)


def test_without_penalty_the_gap_is_half_the_squared_newton_decrement_near_the_optimum() -> None:
    best = solved(0.0)
    at = Params(*(a + 1e-2 * (b - b.mean(0)) for a, b in zip(best.params, params(), strict=True)))
    found = solved(0.0, init=at, max_iter=0, tol=1e-9)

    def flat_objective(flat: jax.Array) -> jax.Array:
        weights, bias = flat[: CLASSES * WIDTH], flat[CLASSES * WIDTH :]
        return objective(Params(weights.reshape(CLASSES, WIDTH), bias), 0.0)

    flat = jnp.concatenate([found.params.weights.ravel(), found.params.bias])
    gradient, hessian = (jax.jit(of(flat_objective))(flat) for of in (jax.grad, jax.hessian))
    expected = gradient @ np.linalg.pinv(hessian, rcond=1e-5) @ gradient / 2
    np.testing.assert_allclose(found.gap * found.objective, expected, rtol=2e-2)


@pytest.mark.parametrize("max_iter", [0, 1, 3])
@pytest.mark.parametrize("l2", [1e-3, 0])
def test_a_fit_that_is_cut_short_reports_where_it_is(max_iter: int, l2: float) -> None:
    best = solved(l2).objective
    found = solved(l2, max_iter=max_iter, tol=1e-9)
    assert found.status == Status.MAX_ITER
    assert found.iterations == max_iter
    close(found.objective, objective(found.params, l2))
    assert found.objective * (1 - found.gap) <= best * (1 + 10 * eps(WIDE))
