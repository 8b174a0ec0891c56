"""Errors of values and derivatives beside jax.nn, optax, SciPy and torch, against mpmath.

    python -m tests.benchmarks.accuracy [dtype ...]

Each column shows the largest error and the 99.9 % quantile over all entries, in units of the
dtype's eps times the scale of the quantity (tests/exact.py): a value's own size, the larger of
|value| and |maximum| for log-sum-exp, and sum_j |J_ij| |v_j| for a derivative. Entries whose scale
is no normal number of the dtype are left out. "rounded" is the share of our entries that are the
exact value rounded once. The vectors v are random, or 1 at the largest entry and 0 elsewhere.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

import jaxsoftmax
from tests import exact
from tests.benchmarks._measure import environment

try:
    import torch
except ImportError:
    torch = None

jax.config.update("jax_enable_x64", True)

DTYPES = {
    "float64": jnp.float64,
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
}


def families(dtype: Any) -> dict[str, tuple[Any, Any]]:
    """Logits (rows, classes) in `dtype` and their mask, by kind."""
    random = np.random.default_rng(0)
    eps, largest = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).max)
    dominant = random.normal(size=(81, 100))
    dominant[np.arange(81), random.integers(100, size=81)] = 4 + np.arange(81.0)
    pairs = np.stack([np.arange(0, 80, 0.25), np.zeros(320), np.full(320, -3.0)], -1)
    offsets = np.array([offset for offset in 10.0 ** np.arange(4, 31) if offset < largest / 4])
    steps = random.integers(-20, 21, size=(len(offsets), 100))
    ties = 1 + eps * random.integers(-3, 4, size=(30, 100))
    mask = random.random((30, 100)) < 0.7
    x = {
        "normal, 3": (3 * random.normal(size=(200, 3)), None),
        "normal, 100": (3 * random.normal(size=(50, 100)), None),
        "normal, 70000": (3 * random.normal(size=(1, 70000)), None),
        "equal, 70000": (np.zeros((1, 70000)), None),
        "dominant, 3": (pairs, None),
        "dominant, 100": (dominant, None),
        "offset 1e4-1e30": (offsets[:, None] * (1 + eps * steps), None),
        "near ties": (ties, None),
        "masked": (3 * random.normal(size=(30, 100)), mask),
    }
    return {name: (jnp.asarray(rows).astype(dtype), where) for name, (rows, where) in x.items()}


class Inputs(NamedTuple):
    x: jax.Array
    where: Any
    v: jax.Array
    label: jax.Array
    labels: jax.Array


def jvp(f: Callable[..., Any], inputs: Inputs) -> Any:
    return jax.jvp(f, (inputs.x,), (inputs.v,))[1]


def vjp(f: Callable[..., Any], inputs: Inputs) -> Any:
    return jax.vjp(f, inputs.x)[1](inputs.v)[0]


def gradient(f: Callable[..., Any], inputs: Inputs) -> Any:
    return jax.grad(lambda x: jnp.sum(f(x)))(inputs.x)


def hessian_product(f: Callable[..., Any], inputs: Inputs) -> Any:
    return jax.jvp(jax.grad(lambda x: jnp.sum(f(x))), (inputs.x,), (inputs.v,))[1]


class Quantity(NamedTuple):
    name: str
    exact: Callable[..., Any]
    argument: str | None  # the field of Inputs that the reference takes
    sign: int
    function: str  # of a library
    transform: Callable[..., Any] | None


QUANTITIES = [
    Quantity("softmax", exact.softmax, None, 1, "softmax", None),
    Quantity("softmax jvp", exact.softmax_product, "v", 1, "softmax", jvp),
    Quantity("softmax vjp", exact.softmax_product, "v", 1, "softmax", vjp),
    Quantity("log_softmax", exact.log_softmax, None, 1, "log_softmax", None),
    Quantity("log_softmax jvp", exact.log_softmax_jvp, "v", 1, "log_softmax", jvp),
    Quantity("log_softmax vjp", exact.log_softmax_vjp, "v", 1, "log_softmax", vjp),
    Quantity("logsumexp", exact.logsumexp, None, 1, "logsumexp", None),
    Quantity("logsumexp gradient", exact.softmax, None, 1, "logsumexp", gradient),
    Quantity("logsumexp hvp", exact.softmax_product, "v", 1, "logsumexp", hessian_product),
    Quantity("cross_entropy, class", exact.cross_entropy, "one_hot", 1, "integer", None),
    Quantity("  gradient", exact.log_softmax_vjp, "one_hot", -1, "integer", gradient),
    Quantity("  hvp", exact.softmax_product, "v", 1, "integer", hessian_product),
    Quantity("cross_entropy, probs", exact.cross_entropy, "labels", 1, "probabilities", None),
    Quantity("  gradient", exact.log_softmax_vjp, "labels", -1, "probabilities", gradient),
    Quantity("  hvp", exact.softmax_product, "v", 1, "probabilities", hessian_product),
]


def bind(name: str, library: Any, losses: Any, inputs: Inputs) -> Callable[..., Any]:
    """A library's function of the logits alone."""
    where = None if inputs.where is None else jnp.asarray(inputs.where)
    return {
        "softmax": partial(library.softmax, where=where),
        "log_softmax": partial(library.log_softmax, where=where),
        "logsumexp": partial(library.logsumexp, axis=-1, where=where),
        "integer": lambda x: losses[0](x, inputs.label, where=where),
        "probabilities": lambda x: losses[1](x, inputs.labels.astype(x.dtype), where=where),
    }[name]


LIBRARIES: dict[str, tuple[Any, tuple[Any, Any]]] = {
    "jaxsoftmax": (jaxsoftmax, (jaxsoftmax.cross_entropy, jaxsoftmax.cross_entropy)),
    "jax.nn, optax": (
        jax.nn,
        (
            optax.losses.softmax_cross_entropy_with_integer_labels,
            optax.losses.softmax_cross_entropy,
        ),
    ),
}


def by_jax(library: str, quantity: Quantity, inputs: Inputs) -> Any:
    def compute(inputs: Inputs) -> Any:
        f = bind(quantity.function, *LIBRARIES[library], inputs)
        return f(inputs.x) if quantity.transform is None else quantity.transform(f, inputs)

    return jax.jit(compute)(inputs)


def by_scipy(quantity: Quantity, inputs: Inputs) -> Any:
    f = getattr(scipy.special, quantity.function, None)
    if f is None or quantity.transform or inputs.where is not None or inputs.x.dtype.itemsize < 4:
        return None
    return f(np.asarray(inputs.x), axis=-1)


def by_torch(quantity: Quantity, inputs: Inputs) -> Any:
    if torch is None or inputs.where is not None:
        return None
    kind = getattr(torch, inputs.x.dtype.name)
    x, v, labels = (
        torch.tensor(exact_float(part), dtype=kind) for part in (inputs.x, inputs.v, inputs.labels)
    )
    label = torch.tensor(np.asarray(inputs.label), dtype=torch.int64)
    cross_entropy = partial(torch.nn.functional.cross_entropy, reduction="none")
    f: Callable[..., Any] = {
        "softmax": partial(torch.softmax, dim=-1),
        "log_softmax": partial(torch.log_softmax, dim=-1),
        "logsumexp": partial(torch.logsumexp, dim=-1),
        "integer": lambda x: cross_entropy(x, label),
        "probabilities": lambda x: cross_entropy(x, labels),
    }[quantity.function]
    try:
        result = {
            None: lambda: f(x),
            jvp: lambda: torch.func.jvp(f, (x,), (v,))[1],
            vjp: lambda: torch.func.vjp(f, x)[1](v)[0],
            gradient: lambda: torch.func.grad(lambda x: f(x).sum())(x),
            hessian_product: lambda: torch.func.jvp(
                torch.func.grad(lambda x: f(x).sum()), (x,), (v,)
            )[1],
        }[quantity.transform]()
    except (RuntimeError, NotImplementedError):
        return None
    return result.double().numpy()


def exact_float(x: Any) -> Any:
    return np.asarray(x).astype(np.float64)


def main(names: list[str]) -> None:
    packages = ["jaxsoftmax", "jax", "jaxlib", "optax", "scipy", "mpmath"]
    print(environment(*packages, *(["torch"] if torch else [])))
    worst: dict[tuple[str, str, str], float] = {}
    columns = [*LIBRARIES, "scipy", *(["torch"] if torch else [])]
    for dtype_name in names or DTYPES:
        dtype = DTYPES[dtype_name]
        info = jnp.finfo(dtype)
        print(f"\n{dtype_name}, eps {float(info.eps):.2g}: largest error / 99.9 % quantile")
        print(
            f"{'logits':16} {'quantity':20} " + "".join(f"{c:>18}" for c in columns) + "  rounded"
        )
        for family, (x, where) in families(dtype).items():
            rows = exact.make_rows(exact_float(x), where)
            random = np.random.default_rng(1)
            v = random.normal(size=x.shape)
            largest = np.argmax(
                exact_float(x) if where is None else np.where(where, x, -np.inf), -1
            )
            one_hot = (np.arange(x.shape[1]) == largest[:, None]).astype(float)
            v[::2] = one_hot[::2]
            allowed = np.ones(x.shape) if where is None else np.where(where, 1.0, 0.0)
            labels = allowed * random.random(x.shape)
            labels = jnp.asarray(labels / labels.sum(-1, keepdims=True)).astype(dtype)
            inputs = Inputs(
                x, where, jnp.asarray(v * allowed).astype(dtype), jnp.asarray(largest), labels
            )
            vectors = {
                "v": exact_float(inputs.v),
                "labels": exact_float(labels),
                "one_hot": one_hot,
            }
            for quantity in QUANTITIES:
                arguments = [] if quantity.argument is None else [vectors[quantity.argument]]
                expected = exact.reference(quantity.exact, rows, *arguments)
                results = {name: by_jax(name, quantity, inputs) for name in LIBRARIES}
                results["scipy"] = by_scipy(quantity, inputs)
                results["torch"] = by_torch(quantity, inputs)
                line = f"{family:16} {quantity.name:20} "
                for name in columns:
                    if results[name] is None:
                        line += f"{'-':>18}"
                        continue
                    result = quantity.sign * exact_float(results[name])
                    off = exact.units(result, expected, info)
                    key = (dtype_name, quantity.name, name)
                    worst[key] = max(worst.get(key, 0), off.max())
                    line += f"{off.max():>10.3g} /{np.quantile(off, 0.999):6.3g}"
                ours = quantity.sign * exact_float(results["jaxsoftmax"])
                rounded = exact_float(
                    jnp.asarray(expected.high).astype(results["jaxsoftmax"].dtype)
                )
                print(f"{line}  {np.mean(ours == rounded):.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
