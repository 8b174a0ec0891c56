"""Problems as the solver sees them: examples in standard coordinates, with what fits share."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoftmax._runtime import Array, precise
from jaxsoftmax.regression._coordinates import Coordinates, RowSpace
from jaxsoftmax.regression._data import Arguments, Problem, make_problem
from jaxsoftmax.regression._penalty import Ridge
from jaxsoftmax.regression._plan import Plan, Preconditioning
from jaxsoftmax.regression._rows import Dense, Examples, Raw
from jaxsoftmax.regression.solver import _preconditioner
from jaxsoftmax.regression.solver._state import Model

NARROW = jnp.float32


class Setting(NamedTuple):
    """The static arguments of fits side by side.

    Attributes:
      num_classes: number of classes.
      fit_bias: whether there is a bias; without, columns keep their means.
      problems: how many fits there are.
      side: which of the `Arguments` have a leading axis of them, as a tree of booleans.
      uniform: whether probabilities at the start are equal: it is 0, and there are no offsets.
      penalised: whether every penalty is known to be above 0, which spares what only a fit without
        a penalty needs.
      narrow: whether products are computed in float32.
      sizes: the preconditioner.
      plan: thresholds of size.
    """

    num_classes: int
    fit_bias: bool
    problems: int
    side: Any
    uniform: bool
    penalised: bool
    narrow: bool
    sizes: Preconditioning
    plan: Plan


class Frame(NamedTuple):
    """The part of a `Model` that is the same under every penalty."""

    exact: Examples
    narrow: Examples | None
    coordinates: Coordinates
    free: Array
    centre: Array
    covariance: Array | None


def model_of(frame: Frame, l2: Array, *, penalised: bool) -> Model:
    """The model under a penalty, or penalties of problems side by side; `penalised` as in
    `Setting`."""
    inverse = frame.coordinates.inverse
    nothing = np.zeros(len(l2), inverse.dtype)
    offset_range = nothing if penalised else frame.exact.offset_range()
    return Model(
        exact=frame.exact,
        narrow=frame.narrow,
        coordinates=frame.coordinates,
        penalty=Ridge.of(l2, inverse),
        penalised=np.ones(len(l2), bool) if penalised else l2 > 0,
        separable=nothing if penalised else frame.exact.separable(offset_range),
        offset_range=offset_range,
        free=frame.free,
        centre=frame.centre,
        covariance=frame.covariance,
    )


@partial(jax.jit, static_argnames="setting")
@precise
def make_frame(arguments: Arguments, *, setting: Setting) -> Frame:
    """Standard coordinates, and the examples in them."""
    fit_bias, plan = setting.fit_bias, setting.plan
    problem = problems_side_by_side(arguments, setting)
    features = problem.features
    share = problem.share if problem.share.ndim == 1 else _mean_share(problem.share)
    dtype = share.dtype
    space = None
    if features.shape[1] > features.shape[0]:
        wide = features.astype(dtype)
        mean = _mean(wide, share) if fit_bias else jnp.zeros(features.shape[1], dtype)
        space, features = RowSpace.of(wide, mean)
    coordinates = standard_coordinates(features, share, space, fit_bias=fit_bias, plan=plan)
    block = plan.block(len(features), features.shape[1], setting.num_classes)
    columns = coordinates.standardise(features).astype(NARROW if setting.narrow else dtype)
    fast = exact = Examples.of(problem, Dense(columns), setting.num_classes, block)
    if setting.narrow:
        fast = jax.tree.map(_narrow, fast)
        exact = replace(exact, design=Raw(features, coordinates))
    varies = jnp.pad(coordinates.inverse > 0, (0, 1), constant_values=fit_bias)[None, None]
    if problem.share.ndim == 2 and space is None:
        # A column may vary, and yet not in each of the problems.
        varied = lax.map(lambda own: _varies(features, own, fit_bias=fit_bias), problem.share)
        varies &= jnp.concatenate([varied, jnp.ones_like(varied[:, :1])], 1)[None]
    free = (exact.present & varies).astype(dtype)
    return Frame(
        exact=exact,
        narrow=fast if setting.narrow else None,
        coordinates=coordinates,
        free=free,
        centre=1 / jnp.sum(exact.present.astype(dtype), 0, keepdims=True),
        covariance=_preconditioner.covariance(fast, share.astype(columns.dtype), plan)
        if setting.sizes.groups
        else None,
    )


def problems_side_by_side(arguments: Arguments, setting: Setting) -> Problem:
    """Problems whose arrays have a leading axis where they differ."""
    make = partial(make_problem, num_classes=setting.num_classes)
    data = arguments.features, arguments.labels, arguments.sample_weight, arguments.offset
    of = setting.side
    own = of.features, of.labels, of.sample_weight, of.offset
    if not any(jax.tree.leaves(own)):
        return make(*data)
    axes = jax.tree.map(lambda is_own: 0 if is_own else None, own, is_leaf=lambda v: v is None)
    lead: Any = {True: 0, False: None}
    out = Problem(
        features=None,
        labels=lead[bool(of.labels)],
        share=lead[bool(of.labels or of.sample_weight)],
        offset=lead[bool(of.offset)],
    )
    return jax.vmap(make, axes, out)(*data)


def _narrow(values: Any) -> Any:
    return values.astype(NARROW) if jnp.issubdtype(values.dtype, jnp.floating) else values


def _mean_share(shares: Array) -> Array:
    """The mean over problems; one that has no weights is no reason for the others to have none."""
    return jnp.mean(jnp.where(jnp.isfinite(shares), shares, 0), 0)


def _mean(features: Array, share: Array) -> Array:
    """Twice, so that what rounding leaves is small beside the deviations."""
    mean = share @ features
    return mean + share @ (features - mean[None])


def _typical(features: Array, share: Array) -> Array:
    """The features of an example that counts."""
    # Without the barrier XLA looks for the largest of equal shares as it compiles, for seconds.
    return features[jnp.argmax(lax.optimization_barrier(share))]


def standard_coordinates(
    features: Array, share: Array, rows: RowSpace | None = None, *, fit_bias: bool, plan: Plan
) -> Coordinates:
    """The coordinates in which columns have mean 0 and mean absolute deviation 1."""
    dtype, width = share.dtype, features.shape[1]
    mean = jnp.zeros(width, dtype)
    if fit_bias:
        # From an example that counts, so that the mean of a constant column is exact.
        first = _typical(features, share).astype(dtype)
        mean = first + _weighted_sum(features, share, lambda x: x - first[None], plan)
    scale = _weighted_sum(features, share, lambda x: jnp.abs(x - mean[None]), plan)
    deviates = scale > 0
    inverse = jnp.where(deviates, 1 / jnp.where(deviates, scale, 1), 0)
    return Coordinates(mean, inverse, jnp.asarray(fit_bias, dtype), rows)


def _weighted_sum(features: Array, share: Array, f: Any, plan: Plan) -> Array:
    """The sum of share_i f(x_i), a block of rows at a time."""
    count, width = features.shape
    size = min(max(plan.block_features // max(width, 1), 1), count)
    if size == count:
        return share @ f(features.astype(share.dtype))

    def add(i: Array, total: Array) -> Array:
        start = jnp.minimum(i * size, count - size)
        own = lax.dynamic_slice_in_dim(share, start, size)
        own = jnp.where(start + jnp.arange(size) >= i * size, own, 0)
        x = lax.dynamic_slice_in_dim(features, start, size).astype(share.dtype)
        return total + own @ f(x)

    return lax.fori_loop(0, -(-count // size), add, jnp.zeros(width, share.dtype))


def _varies(features: Array, share: Array, *, fit_bias: bool) -> Array:
    """Whether a column differs between examples that count; without a bias, from 0."""
    one = _typical(features, share) if fit_bias else jnp.zeros_like(features[0])
    return jnp.any((features != one[None]) & (share > 0)[:, None], 0)
