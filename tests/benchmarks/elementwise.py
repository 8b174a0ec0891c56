"""Time of the elementwise functions beside jax.nn, optax and torch; ours and the first two jitted.

    python -m tests.benchmarks.elementwise [dtype | function ...]

All of it takes about 20 minutes on two cores; the names of dtypes and functions select a part.

A ratio is the peer's time over ours: above 1, ours is faster. "vjp" is value and gradient of the
sum of the result times a constant. "copies" is our time over that of adding 1 to the input, which
reads and writes it once: the limit of what memory allows. "mask" allows four classes of five, the
label's among them. Labels are integers. Residuals are what `jax.vjp` keeps for the backward pass,
over the input's size.

At the end: means over all entries, the slowest entries, and the cost of a call, of which each
library's jitted softmax of 16 x 128 is an example, of accuracy, and of a compilation.
"""

import importlib.util
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax
from tests.benchmarks._measure import environment, medians

torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None

# Shape and the axis of the classes.
SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((262144, 3), -1),
    ((262144, 10), -1),
    ((65536, 26), -1),
    ((20000, 100), -1),
    ((4096, 1024), -1),
    ((64, 65536), -1),
    ((1, 1000000), -1),
    ((16, 128), -1),
    ((100, 20000), 0),
    ((32, 64, 64, 16), 1),
]
DTYPES = ["float32", "bfloat16", "float64"]

Function = Callable[..., Any]


def ours(name: str, axis: int, labels: jax.Array) -> Function:
    """A function of logits and mask."""
    if name == "cross_entropy":
        return lambda x, where: jaxsoftmax.cross_entropy(x, labels, axis=axis, where=where)
    return lambda x, where: getattr(jaxsoftmax, name)(x, axis=axis, where=where)


def peer(name: str, axis: int, labels: jax.Array) -> Function:
    if name == "cross_entropy":
        loss = optax.losses.softmax_cross_entropy_with_integer_labels
        return lambda x, where: loss(x, labels, axis=axis, where=where)
    return lambda x, where: getattr(jax.nn, name)(x, axis=axis, where=where)


def in_torch(name: str, axis: int, labels: Any) -> Function:
    def f(x: Any, where: Any) -> Any:
        x = x if where is None else x.masked_fill(~where, -math.inf)
        if name == "cross_entropy":
            return torch.nn.functional.cross_entropy(x.movedim(axis, 1), labels, reduction="none")
        return getattr(torch, name)(x, axis)

    return f


NAMES = ["softmax", "log_softmax", "logsumexp", "cross_entropy"]


def with_gradient(f: Function) -> Function:
    def total(x: jax.Array, where: Any, weight: jax.Array) -> jax.Array:
        return jnp.sum((f(x, where) * weight).astype(jnp.float32))

    return jax.value_and_grad(total)


def torch_gradient(f: Function, x: Any, where: Any, weight: Any) -> Any:
    x.grad = None
    total = (f(x, where) * weight).float().sum()
    total.backward()
    return x.grad


def to_torch(x: jax.Array) -> Any:
    return torch.utils.dlpack.from_dlpack(x).clone()


def entry(name: str, shape: tuple[int, ...], axis: int, dtype: str, masked: bool) -> dict[str, Any]:
    """Seconds of every contender, and bytes that are kept."""
    x = 3 * jax.random.normal(jax.random.key(0), shape, dtype)
    classes = jax.lax.broadcasted_iota(jnp.int32, shape, axis % len(shape))
    batch = shape[:axis] + shape[axis % len(shape) + 1 :]
    labels = jax.random.randint(jax.random.key(2), batch, 0, shape[axis], jnp.int32)
    where = None
    if masked:
        allowed = jax.random.bernoulli(jax.random.key(3), 0.8, shape)
        where = allowed | (classes == jnp.expand_dims(labels, axis))
    f, g = ours(name, axis, labels), peer(name, axis, labels)
    weight = jax.random.normal(jax.random.key(1), jax.eval_shape(f, x, where).shape, dtype)
    contenders = {
        "copy": partial(jax.jit(lambda x: x + 1), x),
        "ours": partial(jax.jit(f), x, where),
        "peer": partial(jax.jit(g), x, where),
        "ours vjp": partial(jax.jit(with_gradient(f)), x, where, weight),
        "peer vjp": partial(jax.jit(with_gradient(g)), x, where, weight),
    }
    if torch:
        h = in_torch(name, axis, to_torch(labels).long())
        args = to_torch(x), None if where is None else to_torch(where), to_torch(weight)
        leaf = args[0].clone().requires_grad_()
        contenders["torch"] = partial(h, *args[:2])
        contenders["torch vjp"] = partial(torch_gradient, h, leaf, *args[1:])
    result: dict[str, Any] = dict(medians(contenders, repeats=9))
    result["ours kept"], result["peer kept"] = (kept(function, x, where) for function in (f, g))
    return result


def kept(f: Function, x: jax.Array, where: Any) -> float:
    """Bytes that are kept for the backward pass, over those of x."""
    _, vjp = jax.vjp(lambda x: jax.jit(f)(x, where), x)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) / x.nbytes


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def call_overhead() -> None:
    x = jnp.zeros((16, 128))
    seconds = medians(
        {
            "ours": partial(jax.jit(jaxsoftmax.softmax), x),
            "peer": partial(jax.jit(jax.nn.softmax), x),
        },
        repeats=101,
    )
    print("a call on (16, 128):", ", ".join(f"{k} {1e6 * s:.1f} us" for k, s in seconds.items()))


def price() -> None:
    """What two guards of accuracy cost: of the shift, and of the projection of a derivative."""

    def shares(x: jax.Array, guarded: bool) -> jax.Array:
        m = jnp.max(x, -1, keepdims=True)
        e = jnp.exp((jnp.minimum(x, m) if guarded else x) - m)
        return e / jnp.sum(e, -1, keepdims=True)

    def projected(t: jax.Array, p: jax.Array, times: int) -> jax.Array:
        for _ in range(times):
            t = t - jnp.sum(p * t, -1, keepdims=True)
        return p * t

    for shape in [(65536, 26), (20000, 100), (4096, 1024)]:
        x = 3 * jax.random.normal(jax.random.key(0), shape)
        p = jax.nn.softmax(x)
        t = medians(
            {
                "minimum(x, m) - m": partial(jax.jit(partial(shares, guarded=True)), x),
                "x - m": partial(jax.jit(partial(shares, guarded=False)), x),
                "two projections": partial(jax.jit(partial(projected, times=2)), x, p),
                "one": partial(jax.jit(partial(projected, times=1)), x, p),
            }
        )
        guard, projection = (
            f"{a} takes {t[a] / t[b]:.2f} of {b}"
            for a, b in [("minimum(x, m) - m", "x - m"), ("two projections", "one")]
        )
        print(f"price at {shape}: in a softmax {guard}; in its derivative {projection}")


def compile_times(selected: list[str]) -> None:
    """Median over shapes of the time to trace and compile value and gradient."""
    for name in selected:
        ratios, ours_s = [], []
        for shape, axis in SHAPES:
            x = jnp.zeros(shape)
            batch = shape[:axis] + shape[axis % len(shape) + 1 :]
            labels = jnp.zeros(batch, jnp.int32)
            weight = jnp.zeros(jax.eval_shape(ours(name, axis, labels), x, None).shape)
            taken = []
            for make in (ours, peer):
                least = []
                for _ in range(3):
                    jax.clear_caches()
                    f = jax.jit(with_gradient(make(name, axis, labels)))
                    start = time.perf_counter()
                    f.lower(x, None, weight).compile()
                    least.append(time.perf_counter() - start)
                taken.append(min(least))
            ours_s.append(taken[0])
            ratios.append(taken[0] / taken[1])
        print(
            f"compiling {name} vjp: ours {1e3 * statistics.median(ours_s):.0f} ms, over the peer's"
            f" {statistics.median(ratios):.2f}, at most {max(ratios):.2f}"
        )


def main(selected: list[str]) -> None:
    names = [name for name in NAMES if name in selected] or NAMES
    dtypes = [dtype for dtype in DTYPES if dtype in selected] or DTYPES
    print(environment("jaxsoftmax", "jax", "jaxlib", "optax", *(["torch"] if torch else [])))
    print(f"{'value':>56}{'vjp':>29}")
    print(
        f"{'function':14} {'dtype':9} {'shape, axis':26}"
        "      ms copies    jax torch      ms   jax torch   kept  (jax)"
    )
    rows: list[tuple[str, int, str, float]] = []
    for name in names:
        for dtype in dtypes:
            for shape, axis in SHAPES:
                for masked in (False, True):
                    with jax.enable_x64(dtype == "float64"):
                        t = entry(name, shape, axis, dtype, masked)
                    label = (
                        f"{name:14} {dtype:9} {f'{shape}, {axis}':22}{'mask' if masked else '':4}"
                    )
                    line = [label, f"{1e3 * t['ours']:7.2f} {t['ours'] / t['copy']:5.1f} "]
                    for kind in ("", " vjp"):
                        if kind:
                            line.append(f"{1e3 * t['ours' + kind]:7.2f}")
                        for other in ("peer", "torch") if torch else ("peer",):
                            ratio = t[other + kind] / t["ours" + kind]
                            rows.append((label + kind, shape[axis], other, ratio))
                            line.append(f"{ratio:5.2f}")
                    line.append(f"{t['ours kept']:6.2f} {t['peer kept']:5.2f}")
                    print(" ".join(line), flush=True)
    others = ("peer", "torch") if torch else ("peer",)
    for dtype, other in itertools.product((*dtypes, "") if len(dtypes) > 1 else dtypes, others):
        chosen = [row for row in rows if row[2] == other and dtype in row[0]]
        mean = geometric_mean([row[3] for row in chosen])
        short = geometric_mean([row[3] for row in chosen if row[1] <= 32])
        behind = sum(row[3] < 0.95 for row in chosen)
        print(
            f"geometric mean of the ratios, {dtype or 'all'}, {other}: {mean:.2f} (rows of up to"
            f" 32: {short:.2f}); below 0.95: {behind} of {len(chosen)}"
        )
        for label, _, _, ratio in sorted(chosen, key=lambda row: row[3])[:8]:
            print(f"  {ratio:5.2f} {label}")
    call_overhead()
    price()
    compile_times(names)


if __name__ == "__main__":
    main(sys.argv[1:])
