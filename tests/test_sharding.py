"""Rows sharded over the axes of a mesh equal whole ones: values and every kind of derivative."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxsoftmax import Status, cross_entropy, fit, log_softmax, logsumexp, softmax
from tests.helpers import WIDE, eps

K = 24
LABELS = np.array([0, 13, 23])


def close(ours: Any, whole: Any) -> None:
    np.testing.assert_allclose(ours, whole, 0, 50 * eps(WIDE) * max(1, np.abs(whole).max()))


def mesh(**sizes: int) -> jax.sharding.Mesh:
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)


def logits() -> jax.Array:
    x = 3 * jax.random.normal(jax.random.key(0), (3, K), WIDE)
    return x.at[:, 3:6].set(-jnp.inf)  # the whole second shard of eight


def mask() -> jax.Array:
    return jnp.ones((3, K), bool).at[:, 6:10].set(False)  # the whole third one


def probabilities() -> jax.Array:
    p = jax.random.uniform(jax.random.key(1), (3, K), WIDE)
    p = jnp.where(mask() & (logits() > -jnp.inf), p, 0)
    return p / p.sum(-1, keepdims=True)


weights = jnp.linspace(0.5, 2, K, dtype=WIDE)
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01}

# Each takes logits, mask, class weights and probabilities, sharded over the classes alike.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": lambda x, where, w, q, name: softmax(x, where=where, axis_name=name),
    "softmax at a temperature": lambda x, where, w, q, name: softmax(
        x, where=where, temperature=jnp.array([[0.5], [0.0], [2.0]], WIDE), axis_name=name
    ),
    "log_softmax": lambda x, where, w, q, name: log_softmax(x, where=where, axis_name=name),
    "logsumexp": lambda x, where, w, q, name: logsumexp(x, -1, where=where, axis_name=name),
    "weighted logsumexp": lambda x, where, w, q, name: logsumexp(
        x, -1, w - 0.7, where=where, return_sign=True, axis_name=name
    )[0],
    "cross_entropy of classes": lambda x, where, w, q, name: cross_entropy(
        x, LABELS, class_weight=w, z_loss=0.01, axis_name=name
    ),
    "cross_entropy of ignored, smoothed classes": lambda x, where, w, q, name: cross_entropy(
        jnp.maximum(x, -9), LABELS, where=where, ignore_label=13, axis_name=name, **OPTIONS
    ),
    "cross_entropy of probabilities": lambda x, where, w, q, name: cross_entropy(
        jnp.maximum(x, -9), q, where=where, class_weight=w, axis_name=name, **OPTIONS
    ),
}
over_functions = pytest.mark.parametrize("name", FUNCTIONS)


def sharded(name: str, shards: jax.sharding.Mesh) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A function over the mesh, and the same on whole rows; infinite results are 0."""
    f, axes = FUNCTIONS[name], shards.axis_names
    axis_name = axes[0] if len(axes) == 1 else axes
    row, per_class = P(None, axes), P(axes)
    out = row if "softmax" in name else P(None)
    mapped = jax.shard_map(
        partial(f, name=axis_name), mesh=shards, in_specs=(row, row, per_class, row), out_specs=out
    )

    def finite(f: Callable[..., Any], x: jax.Array, w: jax.Array, q: jax.Array) -> jax.Array:
        y = f(x, mask(), w, q)
        return jnp.where(jnp.isfinite(y), y, 0)

    return partial(finite, mapped), partial(finite, partial(f, name=None))


@pytest.mark.single
@over_functions
def test_values_and_derivatives_equal_those_of_whole_rows(name: str) -> None:
    arguments = logits(), weights, probabilities()
    tangents = tuple(jnp.cos(part * 7 + 1) for part in (jnp.arange(K, dtype=WIDE),) * 3)
    tangents = tuple(jnp.broadcast_to(t, a.shape) for t, a in zip(tangents, arguments, strict=True))

    @partial(jax.jit, static_argnums=0)
    def everything(f: Callable[..., Any], *arguments: jax.Array) -> Any:
        def total(*arguments: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(f(*arguments)))

        gradient = jax.grad(total, (0, 1, 2))
        forward = jax.jvp(f, arguments, tangents)
        second = jax.jvp(gradient, arguments, tangents)[1]
        hessian = jax.hessian(lambda x: total(x, *arguments[1:]))(arguments[0])
        return forward, gradient(*arguments), second, hessian

    ours, whole = (everything(f, *arguments) for f in sharded(name, mesh(classes=8)))
    jax.tree.map(close, ours, whole)


@pytest.mark.single
@over_functions
def test_a_row_may_be_sharded_over_two_axes(name: str) -> None:
    ours, whole = sharded(name, mesh(data=2, classes=4))
    close(
        jax.jit(ours)(logits(), weights, probabilities()), whole(logits(), weights, probabilities())
    )


@pytest.mark.single
def test_a_gradient_inside_the_map_is_that_of_whole_rows() -> None:
    def gradient(x: jax.Array, name: str | None) -> jax.Array:
        return jax.grad(lambda x: cross_entropy(x, LABELS, axis_name=name).sum())(x)

    x = jnp.maximum(logits(), -9)
    row = P(None, "classes")
    inside = jax.shard_map(
        partial(gradient, name="classes"), mesh=mesh(classes=8), in_specs=row, out_specs=row
    )
    close(jax.jit(inside)(x), gradient(x, None))


@pytest.mark.single
@pytest.mark.usefixtures("no_debug_nans")
def test_a_label_beyond_all_shards_is_nan() -> None:
    labels = np.array([K, -1, K - 1])
    loss: Any = jax.shard_map(
        lambda x: cross_entropy(x, labels, axis_name="classes"),
        mesh=mesh(classes=8),
        in_specs=P(None, "classes"),
        out_specs=P(None),
    )
    np.testing.assert_array_equal(jnp.isnan(loss(logits())), [True, True, False])


@pytest.mark.single
@over_functions
def test_one_number_per_row_travels(name: str) -> None:
    ours, _ = sharded(name, mesh(classes=8))
    gradient = jax.jit(jax.grad(lambda x, w, q: ours(x, w, q).sum(), (0, 1, 2)))
    sizes = _collectives(gradient.trace(logits(), weights, probabilities()).jaxpr.jaxpr)
    assert sizes
    assert max(sizes) == len(LABELS)


def _collectives(jaxpr: Any) -> list[int]:
    """Sizes of what reductions over a mesh reduce."""
    sizes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(("psum", "pmax", "all_gather", "all_to_all")):
            sizes += [variable.aval.size for variable in equation.invars]
        for part in jax.tree.leaves(equation.params):
            if hasattr(part, "eqns"):
                sizes += _collectives(part)
            elif hasattr(part, "jaxpr"):
                sizes += _collectives(part.jaxpr)
    return sizes


@pytest.mark.single
def test_an_axis_of_vmap_may_span_the_row() -> None:
    x = logits()[0]
    p = jax.vmap(lambda x: softmax(x, axis=(), axis_name="k"), axis_name="k")(x)
    close(p, softmax(x))


@pytest.mark.single
@pytest.mark.parametrize("shape", [(3, 8), (24, 3)])
def test_classes_may_be_sharded_over_an_explicit_axis(shape: tuple[int, int]) -> None:
    """Short rows, and rows that lie across the memory, which a CPU takes in forms of their own."""
    axis = shape.index(max(shape))
    x = jax.random.normal(jax.random.key(0), shape, WIDE)
    explicit = jax.make_mesh((8,), ("k",), axis_types=(AxisType.Explicit,))
    spec = P(*("k" if a == axis else None for a in range(2)))
    f = jax.jit(jax.grad(lambda x: (x * log_softmax(x, axis) + softmax(x, axis)).sum()))
    with jax.set_mesh(explicit):
        close(f(jax.device_put(x, jax.NamedSharding(explicit, spec))), f(x))


@pytest.mark.single
def test_examples_may_be_sharded_over_an_explicit_axis() -> None:
    """What `jax.make_mesh` makes by default."""
    z, labels = jnp.tile(jnp.maximum(logits(), -9), (8, 1)), jnp.tile(jnp.asarray(LABELS), 8)
    options: dict[str, Any] = {"class_weight": weights, "ignore_label": 13, **OPTIONS}

    def value_and_gradient(z: jax.Array, labels: jax.Array) -> Any:
        def total(z: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(cross_entropy(z, labels, **options)))

        return cross_entropy(z, labels, **options), jax.value_and_grad(total)(z)

    shards = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    whole = value_and_gradient(z, labels)
    with jax.set_mesh(shards):
        arguments = (
            jax.device_put(part, jax.NamedSharding(shards, P("data"))) for part in (z, labels)
        )
        ours = jax.jit(value_and_gradient)(*arguments)
    assert ours[1][1].sharding.spec == P("data", None)
    jax.tree.map(close, jax.device_get(ours), whole)


def examples() -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(0), (64, 3), WIDE)
    return x, jnp.argmax(x + jax.random.gumbel(jax.random.key(1), x.shape, WIDE), 1)


@pytest.mark.single
@pytest.mark.parametrize(
    ("kind", "solver", "inside"),
    [
        (AxisType.Auto, "newton_cg", True),
        (AxisType.Explicit, "newton_cg", True),
        (AxisType.Explicit, "newton_cg", False),
        pytest.param(AxisType.Explicit, "lbfgs", False, marks=pytest.mark.slow),
    ],
)
def test_a_fit_of_sharded_examples_is_that_of_whole_ones(
    kind: AxisType, solver: str, inside: bool
) -> None:
    """`inside`: of `jax.set_mesh` and jit."""

    def probabilities(x: jax.Array, labels: jax.Array) -> Any:
        result = fit(x, labels, num_classes=3, l2=1e-2, solver=solver)
        return result.status, softmax(result.params.bias), result.objective

    shards = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    whole = probabilities(*examples())
    arguments = (jax.device_put(part, jax.NamedSharding(shards, P("data"))) for part in examples())
    with jax.set_mesh(shards) if inside else contextlib.nullcontext():
        ours = jax.jit(probabilities)(*arguments) if inside else probabilities(*arguments)
    np.testing.assert_array_equal(ours[0], Status.CONVERGED)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3), jax.device_get(ours), whole)


@pytest.mark.single
def test_derivatives_of_a_fit_of_explicitly_sharded_examples() -> None:
    def objective(x: jax.Array, labels: jax.Array) -> jax.Array:
        return fit(x, labels, num_classes=3, l2=1e-2).objective

    x, labels = examples()
    shards = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(shards):
        spread = jax.device_put(x, P("data")), jax.device_put(labels, P("data"))
        ours = jax.jit(jax.grad(objective))(*spread)
    np.testing.assert_allclose(jax.device_get(ours), jax.grad(objective)(x, labels), 1e-3, 1e-6)


@pytest.mark.single
def test_each_shard_may_have_a_fit_of_its_own() -> None:
    x, labels = (part.reshape(8, 8, *part.shape[1:]) for part in examples())
    f = partial(fit, num_classes=3, l2=0.1)

    def one(x: jax.Array, labels: jax.Array) -> Any:
        return f(x[0], labels[0]).objective[None]

    # check_vma does not let loops begin from constants.
    shards = mesh(data=8)
    each = jax.shard_map(one, mesh=shards, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    ours = jax.jit(each)(x, labels)
    np.testing.assert_allclose(ours, jax.vmap(f)(x, labels).objective, 1e-5)
