"""The loss of a linear layer in blocks of classes equals that of its logits."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsoftmax import cross_entropy, linear_cross_entropy, linear_logsumexp, logsumexp
from tests.helpers import WIDE, eps

N, D, V = 9, 5, 37
inf, nan = np.inf, np.nan
LABELS = np.array([0, 36, 31, 32, 7, 8, 15, 16, 20])

# Of cross_entropy and of the linear one alike; the first example is the one that is ignored.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss and softcap": {"z_loss": 0.01, "softcap": 5.0},
    "all": {"label_smoothing": 0.2, "z_loss": 0.01, "ignore_label": 0, "softcap": 5.0},
}


def layer(scale: float = 4.0) -> tuple[jax.Array, ...]:
    """Features, weights, bias and class weights, with logits of some 4 * scale in size."""
    random = np.random.default_rng(0)
    x, w, b = (random.normal(size=size) for size in ((N, D), (V, D), V))
    return tuple(jnp.asarray(v, WIDE) for v in (scale * x, w, b, random.uniform(0.5, 2, V)))


def dense(x: Any, w: Any, b: Any, a: Any, softcap: float | None = None, **options: Any) -> Any:
    z = x @ w.T + b
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    return cross_entropy(z, LABELS, class_weight=a, **options)


def blockwise(x: Any, w: Any, b: Any, a: Any, **options: Any) -> Any:
    return linear_cross_entropy(x, w, LABELS, b, class_weight=a, reduction="none", **options)


def close(ours: Any, reference: Any, factor: float = 100) -> None:
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=factor * eps(WIDE) * scale)


def derivatives(f: Callable[..., Any], *arrays: Any) -> dict[str, Any]:
    """Value, gradients of a weighted sum, forward mode, and the gradients' own derivative."""
    weight = jnp.arange(1.0, N + 1, dtype=WIDE)
    tangents = tuple(jnp.cos(jnp.arange(v.size, dtype=WIDE)).reshape(v.shape) for v in arrays)
    indices = tuple(range(len(arrays)))

    def gradients(*arrays: Any) -> Any:
        return jax.grad(lambda *arrays: jnp.sum(weight * f(*arrays)), indices)(*arrays)

    value, forward = jax.jvp(f, arrays, tangents)
    gradient, second = jax.jvp(gradients, arrays, tangents)
    return {"value": value, "forward": forward, "gradient": gradient, "second": second}


@cache
def dense_derivatives(name: str, padding: int = 0) -> dict[str, Any]:
    """Derivatives of the dense loss with `padding` classes more, copies of the first ones."""
    arrays = pad_classes(layer(), padding)
    return cast(
        "dict[str, Any]", jax.jit(partial(derivatives, partial(dense, **OPTIONS[name])))(*arrays)
    )


def pad_classes(arrays: tuple[jax.Array, ...], padding: int) -> tuple[jax.Array, ...]:
    x, *of_classes = arrays
    return x, *(jnp.asarray(np.concatenate([v, v[:padding]])) for v in of_classes)


@pytest.mark.parametrize(
    ("name", "block_size"),
    [("all", block_size) for block_size in (1, 8, 100, None)]
    + [pytest.param(name, 8, marks=pytest.mark.single) for name in OPTIONS if name != "all"],
)
def test_values_and_derivatives_equal_those_of_the_dense_loss(
    name: str, block_size: int | None
) -> None:
    options = OPTIONS[name]
    ours = jax.jit(partial(derivatives, partial(blockwise, block_size=block_size, **options)))
    results, reference = ours(*layer()), dense_derivatives(name)
    for kind in reference:
        close(results[kind], reference[kind], factor=2000 if kind == "second" else 200)


@pytest.mark.single
@pytest.mark.parametrize(("block_size", "softcap"), [(1, 5.0), (8, None), (V, None), (None, 5.0)])
def test_logsumexp_equals_the_dense_one(block_size: int | None, softcap: float | None) -> None:
    def whole(x: Any, w: Any, b: Any) -> Any:
        z = x @ w.T + b
        return logsumexp(z if softcap is None else softcap * jnp.tanh(z / softcap), -1)

    def ours(x: Any, w: Any, b: Any) -> Any:
        return linear_logsumexp(x, w, b, block_size=block_size, softcap=softcap)

    results = jax.jit(partial(derivatives, ours))(*layer()[:3])
    close(results, jax.jit(partial(derivatives, whole))(*layer()[:3]), factor=1000)


def test_a_last_block_is_not_padded() -> None:
    x, w = jnp.ones((2, 3), WIDE), jnp.zeros((130, 3), WIDE)
    close(linear_logsumexp(x, w, block_size=128), np.full(2, np.log(130)))
    x, w, b = jnp.ones((1, 1), WIDE), jnp.zeros((5, 1), WIDE), jnp.full(5, -30.0, WIDE)
    close(linear_logsumexp(x, w, b, block_size=4, softcap=1.0), [np.log(5) + np.tanh(-30)])


def test_any_cotangent_and_reduction() -> None:
    x, w, b, a = layer()
    cotangent = jnp.array([0.0, 1, 2, 3, 0, 0, 1, 0, 5], WIDE)

    @jax.jit
    def pull(x: Any, w: Any, b: Any) -> Any:
        ours = jax.vjp(lambda x, w, b: blockwise(x, w, b, a, block_size=8), x, w, b)[1]
        theirs = jax.vjp(lambda x, w, b: dense(x, w, b, a), x, w, b)[1]
        return ours(cotangent), theirs(cotangent)

    close(*pull(x, w, b))
    loss = partial(linear_cross_entropy, labels=LABELS, block_size=8, ignore_label=0)
    each = loss(x, w, bias=b, reduction="none")
    close(loss(x, w, bias=b, reduction="sum"), each.sum())
    close(loss(x, w, bias=b), each.sum() / 8)
    factored = jax.jit(jax.grad(lambda x, w, b, c: c * loss(x, w, bias=b), (0, 1, 2)))
    once, thrice = (factored(x, w, b, jnp.asarray(c, WIDE)) for c in (1.0, 3.0))
    close(thrice, [3 * np.asarray(v) for v in once])


@pytest.mark.single
def test_frozen_arguments_have_no_derivative_and_the_others_theirs() -> None:
    @jax.jit
    def gradients(*arrays: Any) -> Any:
        return [
            [
                jax.grad(lambda *v, f=f: f(*v, label_smoothing=0.1).sum(), argument)(*arrays)
                for argument in range(4)
            ]
            for f in (partial(blockwise, block_size=8), dense)
        ]

    close(*gradients(*layer()))


def test_a_mean_over_no_counted_example_is_0() -> None:
    x, w, _, _ = layer()
    f = partial(linear_cross_entropy, labels=np.full(N, -1), ignore_label=-1)
    value, gradients = jax.value_and_grad(lambda x, w: f(x, w), (0, 1))(x.at[0].set(inf), w)
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)
    assert linear_cross_entropy(jnp.ones((0, D), WIDE), w, np.zeros(0, int)) == 0


@pytest.mark.usefixtures("no_debug_nans")
@pytest.mark.parametrize("label", [-1, V, 2**31 - 1])
def test_a_label_out_of_range_is_nan_for_its_example_alone(label: int) -> None:
    x, w, b, _ = layer()
    labels = np.where(np.arange(N) == 3, label, LABELS)
    f = partial(linear_cross_entropy, labels=labels, bias=b, block_size=8, reduction="none")
    assert (np.isnan(f(x, w)) == (np.arange(N) == 3)).all()
    gradient = jax.grad(lambda x: f(x, w).sum())(x)
    assert (np.isnan(gradient).all(-1) == (np.arange(N) == 3)).all()


@pytest.mark.single
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_any_integer_dtype_names_classes(dtype: Any) -> None:
    """300 classes, more than the smallest dtypes count."""
    x, w = layer()[0], jnp.sin(jnp.arange(300 * D, dtype=WIDE)).reshape(300, D)
    labels = LABELS + 80
    close(linear_cross_entropy(x, w, labels.astype(dtype)), linear_cross_entropy(x, w, labels))


@pytest.mark.single
def test_class_weights_of_any_dtype_and_of_no_effect_where_no_example_counts() -> None:
    x, w, _, a = layer()
    rounded = a.astype(jnp.bfloat16)

    def result(class_weight: Any, **options: Any) -> Any:
        def loss(x: Any, w: Any) -> Any:
            return linear_cross_entropy(x, w, LABELS, class_weight=class_weight, **options)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)

    close(result(rounded, label_smoothing=0.1), result(rounded.astype(WIDE), label_smoothing=0.1))
    unused = jnp.where(jnp.arange(V) == 0, inf, a)
    close(result(unused, ignore_label=0), result(a, ignore_label=0))


def test_a_bias_of_minus_inf_excludes_a_class() -> None:
    x, w, b, _ = layer()
    excluded = np.where((np.arange(V) >= 10) & (np.arange(V) < 20), -inf, b).astype(WIDE)
    labels = np.where((LABELS >= 10) & (LABELS < 20), 0, LABELS)

    def f(x: Any, w: Any) -> Any:
        return linear_cross_entropy(x, w, labels, excluded, block_size=4)

    def g(x: Any, w: Any) -> Any:
        kept = np.r_[:10, 20:V]
        return linear_cross_entropy(x, w[kept], np.searchsorted(kept, labels), b[kept])

    ours, theirs = (jax.jit(jax.value_and_grad(h, (0, 1)))(x, w) for h in (f, g))
    close(ours, theirs)
    impossible = linear_cross_entropy(x, w, np.full(N, 12), excluded, block_size=4)
    assert impossible == inf


def test_large_equal_logits_are_exact() -> None:
    x, w = jnp.full((1, 1), 1e4, WIDE), jnp.ones((6, 1), WIDE)
    for smoothing in (0.0, 0.5):
        loss = linear_cross_entropy(x, w, np.array([3]), block_size=4, label_smoothing=smoothing)
        close(loss, np.log(6), factor=2)


def test_a_confident_label_keeps_the_digits_of_its_loss_and_gradient() -> None:
    x, w = jnp.ones((1, 1), WIDE), jnp.array([[30.0], [0.0], [0.0]], WIDE)
    loss, gradient = jax.value_and_grad(
        lambda w: linear_cross_entropy(x, w, np.array([0]), block_size=2)
    )(w)
    p = np.exp(-30.0)
    np.testing.assert_allclose(loss, 2 * p, rtol=1e-5)
    np.testing.assert_allclose(gradient[:, 0], [-2 * p, p, p], rtol=1e-5)


@pytest.mark.single
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_accumulated_in_float32(dtype: Any) -> None:
    x, w, b, _ = (v.astype(dtype) for v in layer(scale=1.0))
    wide = [v.astype(jnp.float32) for v in (x, w, b)]
    f = partial(linear_cross_entropy, labels=LABELS, block_size=2)
    both = jax.jit(jax.value_and_grad(lambda x, w, b: f(x, w, bias=b), (0, 1, 2)))
    (ours, gradients), (value, expected) = both(x, w, b), both(*wide)
    assert ours.dtype == jnp.float32
    close(ours, value)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        off = np.abs(np.asarray(gradient, np.float32) - reference)
        # In the input's dtype only once, at the end.
        assert (off <= eps(dtype) * np.abs(reference) + 1e-6).all()


@pytest.mark.single
def test_p_less_1_of_a_confident_label_in_bfloat16() -> None:
    """p = 0.9995, whose nearest bfloat16 number is 1."""
    gap = float(np.log(0.9995 / 0.0005))
    x, b = jnp.ones((1, 1), jnp.bfloat16), jnp.array([gap, 0.0], jnp.float32)
    w = jnp.zeros((2, 1), jnp.bfloat16)
    gradient = jax.grad(lambda w: linear_cross_entropy(x, w, np.array([0]), b))(w)
    np.testing.assert_allclose(np.asarray(gradient, np.float32)[:, 0], [-5e-4, 5e-4], rtol=0.01)


@pytest.mark.single
@pytest.mark.parametrize("argument", ["features", "weights", "labels"])
def test_vmap_equals_a_loop(argument: str) -> None:
    x, w, _, _ = layer()
    batched = {
        "features": jnp.stack([x, 2 * x, x - 1]),
        "weights": jnp.stack([w, w[::-1], w + 1]),
        "labels": jnp.stack([jnp.asarray(LABELS), jnp.asarray(LABELS[::-1]), jnp.zeros(N, int)]),
    }[argument]
    arguments = {"features": x, "weights": w, "labels": jnp.asarray(LABELS)}

    @jax.jit
    def f(value: Any) -> Any:
        def loss(x: Any, w: Any, labels: Any) -> Any:
            return linear_cross_entropy(x, w, labels, block_size=8, label_smoothing=0.1)

        values = {**arguments, argument: value}
        return jax.value_and_grad(loss, (0, 1))(*values.values())

    loop = [f(value) for value in np.asarray(batched)]
    close(jax.jit(jax.vmap(f))(batched), jax.tree.map(lambda *v: np.stack(v), *loop))


def sizes(jaxpr: Any) -> list[int]:
    """Sizes of all arrays that a program makes."""
    found = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
    for equation in jaxpr.eqns:
        for part in jax.tree.leaves(equation.params):
            if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                found += sizes(getattr(part, "jaxpr", part))
    return found


@pytest.mark.single
def test_no_derivative_makes_an_array_of_the_size_of_the_logits() -> None:
    examples, features, classes = 64, 8, 512
    arrays = jnp.ones((examples, features)), jnp.ones((classes, features))
    labels = np.zeros(examples, int)

    def f(x: Any, w: Any) -> Any:
        return linear_cross_entropy(x, w, labels, block_size=32, label_smoothing=0.1, z_loss=0.1)

    def second(x: Any, w: Any) -> Any:
        return jax.jvp(jax.grad(f, (0, 1)), (x, w), (x, w))

    for program in (f, jax.grad(f, (0, 1)), lambda x, w: jax.jvp(f, (x, w), (x, w)), second):
        # Were a block no checkpoint, the scan would keep what its backward pass needs of each.
        assert max(sizes(jax.make_jaxpr(program)(*arrays).jaxpr)) < examples * classes


def temporary_bytes(examples: int, features: int, classes: int, dtype: Any) -> tuple[int, int]:
    """What loss and gradient need beside their arguments and results: blockwise, and dense."""
    x, w = (jax.ShapeDtypeStruct((n, features), dtype) for n in (examples, classes))
    labels = jax.ShapeDtypeStruct((examples,), jnp.int32)

    def whole(x: Any, w: Any, labels: Any) -> Any:
        return cross_entropy(x @ w.T, labels).mean()

    programs = (jax.jit(jax.value_and_grad(f, (0, 1))) for f in (linear_cross_entropy, whole))
    analyses = (program.lower(x, w, labels).compile().memory_analysis() for program in programs)
    ours, theirs = (cast(Any, analysis).temp_size_in_bytes for analysis in analyses)
    return ours, theirs


@pytest.mark.single
def test_memory_does_not_grow_with_the_number_of_classes() -> None:
    ours, theirs = temporary_bytes(2048, 64, 16384, jnp.float32)
    assert ours <= 10 * 2**20
    more, more_of_theirs = temporary_bytes(2048, 64, 32768, jnp.float32)
    assert more - ours <= 0.1 * (more_of_theirs - theirs)


@pytest.mark.single
def test_memory_of_a_large_head_in_bfloat16() -> None:
    ours, theirs = temporary_bytes(8192, 1024, 131072, jnp.bfloat16)
    if jax.__version_info__ < (0, 11) and jax.default_backend() == "cpu":
        # Here XLA has no products in bfloat16, and widens all the weights before the loop.
        ours -= 4 * 1024 * 131072
    assert ours <= 0.04 * theirs


@pytest.mark.single
def test_many_examples_of_few_classes_are_taken_in_blocks_of_examples() -> None:
    ours, theirs = temporary_bytes(200_003, 8, 64, jnp.float32)
    assert ours <= 0.5 * theirs
    x = jnp.sin(jnp.arange(20_003.0 * 4)).reshape(-1, 4)
    w, labels = jnp.cos(jnp.arange(64.0 * 4)).reshape(64, 4), jnp.arange(20_003) % 64
    f = jax.jit(jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, labels), (0, 1)))
    g = jax.jit(jax.value_and_grad(lambda x, w: cross_entropy(x @ w.T, labels).mean(), (0, 1)))
    close(f(x, w), g(x, w))


@pytest.mark.single
@pytest.mark.parametrize("name", OPTIONS)
def test_sharded_classes_equal_whole_ones(name: str) -> None:
    """Eight shards of 5 classes in blocks of 3 and 2."""
    options, arrays = OPTIONS[name], pad_classes(layer(), 3)
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    split = P("classes")

    def ours(x: Any, w: Any, b: Any, a: Any) -> Any:
        f: Any = partial(blockwise, block_size=3, axis_name="classes", **options)
        return jax.shard_map(f, mesh=mesh, in_specs=(P(), split, split, split), out_specs=P())(
            x, w, b, a
        )

    results = jax.jit(partial(derivatives, ours))(*arrays)
    close(results, dense_derivatives(name, padding=3), factor=2000)


@pytest.mark.single
def test_sharded_examples_equal_whole_ones() -> None:
    x, w, _, _ = layer()
    x = jnp.concatenate([x, x[:7]])
    labels = jnp.concatenate([LABELS, LABELS[:7]])
    mesh = jax.make_mesh((8,), ("examples",), axis_types=(jax.sharding.AxisType.Auto,))
    f = jax.jit(
        jax.value_and_grad(lambda x, w, y: linear_cross_entropy(x, w, y, block_size=8), (0, 1))
    )
    put = partial(jax.device_put, device=jax.NamedSharding(mesh, P("examples")))
    close(f(put(x), w, put(labels)), f(x, w, labels))


@pytest.mark.usefixtures("no_jaxtyping")
@pytest.mark.single
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 2.5}, TypeError, "block_size must be an integer"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0, got 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be above 0, got -1"),
        ({"reduction": "max"}, ValueError, '"none", "mean" or "sum", got \'max\''),
        ({"labels": np.zeros(N)}, TypeError, "labels must be integer classes, got dtype float"),
        ({"labels": np.zeros(3, int)}, ValueError, r"labels must have shape \(examples,\)"),
        ({"features": np.ones((N, 4))}, ValueError, r"weights must have shape \(classes, 4\)"),
        ({"features": np.ones(D)}, ValueError, r"features must have shape \(examples, features\)"),
        ({"bias": np.ones(3)}, ValueError, r"bias must have shape \(classes,\)"),
        ({"class_weight": np.ones(3)}, ValueError, r"class_weight must have shape \(classes,\)"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be at most 1"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0"),
        ({"ignore_label": 0.5}, TypeError, "ignore_label must be an integer"),
        ({"axis_name": 3}, TypeError, "axis_name must be a string"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, w, _, _ = layer()
    arguments = {"features": x, "weights": w, "labels": LABELS, **change}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)
