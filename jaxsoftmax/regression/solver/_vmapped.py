"""The fit as a primitive of JAX: which driver solves it, and what `jax.vmap` makes of it.

| arguments | driver |
|---|---|
| concrete, also under `jax.vmap` outside `jit` | a Python loop over compiled phases |
| traced: `jit`, `scan`, a part of a larger program | one compiled loop |

| `vmap` over | becomes |
|---|---|
| `l2` alone | a path: one fit after the other, from strong to weak penalties |
| weights, labels, offsets, starts, limits | problems side by side, in groups, with one product |
| these and `l2` together | the same, each problem with its penalty |
| `l2`, in a `vmap` over weights and so on, or around it | paths side by side |
| `features`, or a second `vmap` over weights and so on | one after the other |

Side by side under the Python loop, problems that are done leave the others once so much has been
multiplied that programs for fewer problems are worth compiling (`_leaving`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxsoftmax import _arrays
from jaxsoftmax._runtime import Array
from jaxsoftmax.functional._stable import compute_dtype
from jaxsoftmax.regression._data import Arguments
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._plan import DEFAULT, Plan
from jaxsoftmax.regression._result import Fit
from jaxsoftmax.regression.solver._drivers import solve_on_host, solve_traced
from jaxsoftmax.regression.solver._model import Setting
from jaxsoftmax.regression.solver._state import Limits


def minimise(
    arguments: Arguments,
    *,
    num_classes: int,
    fit_bias: bool,
    penalised: bool = False,
    plan: Plan = DEFAULT,
) -> Fit:
    """Fit a problem by Newton's method; `penalised` says that l2 is known to be above 0."""
    leaves, tree = jax.tree.flatten(arguments)
    fit = newton_p.bind(
        *leaves,
        tree=tree,
        side=(False,) * len(leaves),
        path=False,
        num_classes=num_classes,
        fit_bias=fit_bias,
        penalised=penalised,
        plan=plan,
    )
    return jax.tree.unflatten(_FIT, fit)


def is_penalised(l2: Any) -> bool:
    """Whether every penalty is known to be above 0."""
    values = _arrays.known(l2)
    return values is not None and bool((values > 0).all())


newton_p = Primitive("softmax_regression")
newton_p.multiple_results = True
_LEAF: Any = 0
_FIT = jax.tree.structure(Fit(Params(_LEAF, _LEAF), *[_LEAF] * 5))


def _solve(
    *leaves: Array,
    driver: Any,
    tree: Any,
    side: Any,
    path: bool,
    num_classes: int,
    fit_bias: bool,
    penalised: bool,
    plan: Plan,
) -> list[Array]:
    """The fits by one of the drivers, in groups of problems side by side.

    Args:
      leaves: of the `Arguments`.
      driver: `solve_on_host` or `solve_traced`.
      tree: of the leaves.
      side: which of them have a leading axis of problems; features do not.
      path: whether l2 has a last axis of penalties.
      num_classes: number of classes.
      fit_bias: whether there is a bias.
      penalised: whether every penalty is known to be above 0.
      plan: thresholds of size.
    """
    count = next((len(v) for v, is_own in zip(leaves, side, strict=True) if is_own), 1)
    own: Arguments = jax.tree.unflatten(tree, side)
    whole: Arguments = jax.tree.unflatten(tree, leaves)
    dtype = compute_dtype(whole.features.dtype)
    on_host = driver is solve_on_host
    examples, width = whole.features.shape
    setting = _setting(whole, own, count, num_classes=num_classes, fit_bias=fit_bias, plan=plan)
    setting = setting._replace(
        penalised=penalised or setting.penalised,
        narrow=on_host and jnp.finfo(dtype).bits > 32 and examples * width >= plan.narrow,
    )
    size = setting.problems
    xp = np if on_host else jnp

    def solve(leaves: list[Array]) -> Fit:
        arguments: Arguments = jax.tree.unflatten(tree, leaves)
        l2, tol, max_iter = (
            xp.asarray(v) for v in (arguments.l2, arguments.tol, arguments.max_iter)
        )
        l2s = l2.astype(dtype).reshape(-1, l2.shape[-1] if path else 1)
        limits = Limits(*(xp.atleast_1d(v.astype(dtype)) for v in (tol, max_iter)))
        return driver(arguments, l2s, limits, setting)

    if size == count:
        fits = solve(list(leaves))
    else:
        some = np.arange(-(-count // size) * size).reshape(-1, size) % count
        cut = [xp.asarray(v)[some] if o else v for v, o in zip(leaves, side, strict=True)]
        fits = _one_by_one(solve, cut, side)
        fits = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:])[:count], fits)
    dropped = tuple(axis for axis, kept in enumerate((any(side), path)) if not kept)
    leaves_of_fits = [v.squeeze(dropped) for v in jax.tree.leaves(fits)]
    return jax.device_put(leaves_of_fits) if on_host else leaves_of_fits


def _setting(
    whole: Arguments, own: Arguments, count: int, *, num_classes: int, fit_bias: bool, plan: Plan
) -> Setting:
    """The setting of a group of `count` problems, without products in float32; `own` says which
    arguments have a leading axis of problems."""
    examples, width = whole.features.shape
    columns = min(examples, width)
    alike = not (own.labels or own.offset)
    size = plan.groups_of(count, alike, examples, columns, num_classes)
    sizes = plan.preconditioning(
        examples,
        columns,
        num_classes,
        kept=plan.block(examples, columns, num_classes) >= examples,
        problems=size,
        alike=alike,
    )
    return Setting(
        num_classes=num_classes,
        fit_bias=fit_bias,
        problems=size,
        side=own,
        uniform=own.init is None and own.offset is None,
        penalised=is_penalised(whole.l2),
        narrow=False,
        sizes=sizes,
        plan=plan,
    )


def _one_by_one(solve: Any, leaves: list[Array], mapped: Any) -> Any:
    """`solve` for one entry of the mapped leaves after the other."""
    own = [v for v, is_own in zip(leaves, mapped, strict=True) if is_own]

    def one(values: list[Array]) -> Any:
        rest = iter(values)
        return solve([next(rest) if m else v for v, m in zip(leaves, mapped, strict=True)])

    if any(isinstance(v, jax.core.Tracer) for v in leaves):
        return lax.map(one, own)
    entries = [one([np.asarray(v)[i] for v in own]) for i in range(len(own[0]))]
    return jax.tree.map(lambda *values: np.stack([np.asarray(v) for v in values]), *entries)


def _shapes(
    *leaves: Any, tree: Any, side: Any, path: bool, num_classes: int, **_: Any
) -> list[Any]:
    arguments: Arguments = jax.tree.unflatten(tree, leaves)
    lead: tuple[int, ...] = ()
    if any(side):
        lead += (next(v.shape[0] for v, is_own in zip(leaves, side, strict=True) if is_own),)
    if path:
        lead += arguments.l2.shape[-1:]
    width = arguments.features.shape[-1]
    ends = [(num_classes, width), (num_classes,), (), (), (), (), ()]
    dtypes = [compute_dtype(arguments.features.dtype)] * 5 + [jnp.int32] * 2
    return [
        jax.core.ShapedArray((*lead, *e), jnp.dtype(d)) for e, d in zip(ends, dtypes, strict=True)
    ]


def _batch(leaves: Any, axes: Any, *, tree: Any, side: Any, path: bool, **options: Any) -> Any:
    """The table above."""
    mapped = [axis is not None for axis in axes]
    leaves = [
        jnp.moveaxis(v, axis, 0) if m and axis else v
        for v, axis, m in zip(leaves, axes, mapped, strict=True)
    ]
    of: Arguments = jax.tree.unflatten(tree, mapped)
    bind = partial(newton_p.bind, tree=tree, **options)
    if of.l2 and sum(mapped) == 1:
        index = mapped.index(True)
        l2 = jnp.moveaxis(leaves[index], 0, -1)
        count = l2.shape[-1]
        if path:
            l2 = l2.reshape(*l2.shape[:-2], -1)
        leaves[index] = l2
        axis = int(any(side))
        fits = bind(*leaves, side=side, path=True)
        if path:
            fits = [v.reshape(*v.shape[:axis], -1, count, *v.shape[axis + 1 :]) for v in fits]
        return fits, [axis + path] * len(fits)
    if not of.features and not any(side):
        fits = bind(*leaves, side=tuple(mapped), path=path)
    else:
        fits = _one_by_one(lambda some: bind(*some, side=side, path=path), leaves, mapped)
    return fits, [0] * len(fits)


newton_p.def_impl(partial(_solve, driver=solve_on_host))
newton_p.def_abstract_eval(_shapes)
batching.primitive_batchers[newton_p] = _batch
mlir.register_lowering(
    newton_p, mlir.lower_fun(partial(_solve, driver=solve_traced), multiple_results=True)
)
