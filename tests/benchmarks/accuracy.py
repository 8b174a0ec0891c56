"""Errors of values and derivatives beside jax.nn, optax, SciPy and torch, against mpmath.

    python -m tests.benchmarks.accuracy [dtype ...]

All four dtypes take about 10 minutes on two cores. Rows of logits by kind: normal ones of 3, 100
and 70000 entries; all equal; one dominant entry with a gap of 0 to 80 to the next; large common
offsets; entries that differ by a few eps; masked ones. An indented line is a derivative of the
function above it. "class" is the loss of an integer label, "probs" that of a row of probabilities.

A column shows the largest error and the 99.9 % quantile over all entries, in units of the eps of
the input's dtype times the scale of the quantity: a value's own size, for log-sum-exp the larger of
|value| and |maximum|, for the derivative J v of an entry i sum_j |J_ij| |v_j|. So 1 / eps or more
means that no digit is right. "-" is what a library does not have, or not in this dtype.

For our results "bound" is the largest error over what the test suite allows, and "rounded" the
share of entries that are the exact value rounded once, both in the dtype of the result, which for a
loss is never below float32.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

import jaxsoftmax
from tests import exact
from tests.benchmarks._measure import environment
from tests.exact import Inputs, Library, Quantity

torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None

jax.config.update("jax_enable_x64", True)

DTYPES = {name: getattr(jnp, name) for name in ("float64", "float32", "bfloat16", "float16")}
LONG = 70000
OURS, PEER = "jaxsoftmax", "jax.nn, optax"
LIBRARIES = {
    OURS: Library(
        jaxsoftmax.softmax,
        jaxsoftmax.log_softmax,
        jaxsoftmax.logsumexp,
        jaxsoftmax.cross_entropy,
        jaxsoftmax.cross_entropy,
    ),
    PEER: Library(
        jax.nn.softmax,
        jax.nn.log_softmax,
        jax.nn.logsumexp,
        optax.losses.softmax_cross_entropy_with_integer_labels,
        optax.losses.softmax_cross_entropy,
    ),
}


def by_scipy(quantity: Quantity, inputs: Inputs) -> Any:
    f = getattr(scipy.special, quantity.function, None)
    if f is None or quantity.transform or inputs.where is not None or inputs.x.dtype.itemsize < 4:
        return None
    return f(np.asarray(inputs.x), axis=-1)


def by_torch(torch: Any, quantity: Quantity, inputs: Inputs) -> Any:
    if inputs.where is not None:
        return None
    kind = getattr(torch, inputs.x.dtype.name)
    x, v, labels = (
        torch.tensor(exact.as_float64(part), dtype=kind)
        for part in (inputs.x, inputs.v, inputs.labels)
    )
    label = torch.tensor(np.asarray(inputs.label), dtype=torch.int64)
    cross_entropy = partial(torch.nn.functional.cross_entropy, reduction="none")
    functions: dict[str, Callable[..., Any]] = {
        "softmax": partial(torch.softmax, dim=-1),
        "log_softmax": partial(torch.log_softmax, dim=-1),
        "logsumexp": partial(torch.logsumexp, dim=-1),
        "class": lambda x: cross_entropy(x, label),
        "probabilities": lambda x: cross_entropy(x, labels),
    }
    f = functions[quantity.function]

    def gradient(x: Any) -> Any:
        return torch.func.grad(lambda x: f(x).sum())(x)

    transforms: dict[Any, Callable[..., Any]] = {
        None: lambda: f(x),
        exact.jvp: lambda: torch.func.jvp(f, (x,), (v,))[1],
        exact.vjp: lambda: torch.func.vjp(f, x)[1](v)[0],
        exact.gradient: lambda: gradient(x),
        exact.hvp: lambda: torch.func.jvp(gradient, (x,), (v,))[1],
    }
    try:
        return transforms[quantity.transform]().double().numpy()
    except (RuntimeError, NotImplementedError):
        return None


def main(names: list[str]) -> None:
    packages = ["jaxsoftmax", "jax", "jaxlib", "optax", "scipy", "mpmath"]
    print(__doc__)
    print(environment(*packages, *(["torch"] if torch else [])))
    columns = [*LIBRARIES, "scipy", *(["torch"] if torch else [])]
    for dtype_name in names or DTYPES:
        info = jnp.finfo(DTYPES[dtype_name])
        print(f"\n{dtype_name}, eps {float(info.eps):.2g}: largest error / 99.9 % quantile")
        header = "".join(f"{column:>18}" for column in columns)
        print(f"{'logits':16} {'quantity':20} {header}  bound  rounded")
        for family, inputs in exact.families(DTYPES[dtype_name], LONG).items():
            rows = exact.make_rows(inputs.x, inputs.where)
            for quantity in exact.QUANTITIES:
                arguments = inputs.vectors()[quantity.argument]
                expected = exact.reference(quantity.exact, rows, *arguments)
                results = {
                    name: jax.jit(partial(exact.compute, library, quantity))(inputs)
                    for name, library in LIBRARIES.items()
                }
                ours = results[OURS]
                results["scipy"] = by_scipy(quantity, inputs)
                if torch is not None:
                    results["torch"] = by_torch(torch, quantity, inputs)
                line = f"{family:16} {quantity.name:20} "
                for result in results.values():
                    if result is None:
                        line += f"{'-':>18}"
                    else:
                        # A loss is never below float32, but ought to have the digits of its input.
                        off = exact.units(result, expected, info)
                        line += f"{off.max():>10.3g} /{np.quantile(off, 0.999):6.3g}"
                bound = exact.bound(quantity, rows, np.asarray(inputs.label))
                used = (exact.units(ours, expected, jnp.finfo(ours.dtype)) / bound).max()
                rounded = exact.as_float64(jnp.asarray(expected.high).astype(ours.dtype))
                share = np.mean(exact.as_float64(ours) == rounded)
                print(f"{line}  {used:5.2f}   {share:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
