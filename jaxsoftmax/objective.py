r"""The objective of softmax regression: its value, gradient and Hessian.

.. math:: f(W, b) = \sum_i c_i\, \ell(W x_i + b + o_i,\; y_i) + \tfrac{\lambda}{2} \|W\|^2,
          \qquad \sum_i c_i = 1

with the cross-entropy :math:`\ell`, examples x (rows of `features`), labels y, shares c (normalised
`sample_weight`), offsets o and the penalty :math:`\lambda` (`l2`). The bias is not penalised.

Shapes: `features` (examples, features), `weights` (classes, features), `bias` (classes,), `labels`
(examples,) integers or (examples, classes) probabilities, `sample_weight` (examples,), `offset`
(examples, classes).

Solvers and trainers know a problem only through this module.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Shaped

from jaxsoftmax import _checks
from jaxsoftmax._rows import compute_dtype
from jaxsoftmax.functional import softmax
from jaxsoftmax.losses import cross_entropy


class Params(NamedTuple):
    """Parameters of a linear softmax model, a pytree."""

    weights: Float[Array, "*problems classes features"]
    bias: Float[Array, "*problems classes"]


class Problem(NamedTuple):
    """The data of one objective, a pytree; made by `make_problem`.

    Arrays of examples and classes have the classes first: sums over a few classes are then sums of
    long rows. `l2` may have one entry per feature.
    """

    features: Float[Array, "examples features"]
    labels: Shaped[Array, "*classes examples"]
    share: Float[Array, " examples"]
    offset: Float[Array, "classes examples"] | None
    classes: Bool[Array, " classes"] | None
    l2: Float[Array, "*features"]


def linear_logits(
    params: Params, features: Shaped[ArrayLike, "*batch features"]
) -> Float[Array, "*batch classes"]:
    r"""Logits of a linear model, :math:`z = W x + b`.

    Args:
      params: weights (classes, features) and bias (classes,), real.
      features: (..., features), real; cast to the dtype of the weights.

    Returns:
      Logits (..., classes) in the dtype of the weights; `softmax` of them gives the class
      probabilities.

    Raises:
      TypeError: `features`, the weights or the bias are not real.
      ValueError: the weights have not rank 2, or the bias or `features` do not fit them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import Params, linear_logits
      >>> params = Params(weights=jnp.array([[1.0, 0.0], [0.0, 2.0]]), bias=jnp.array([0.5, 0.0]))
      >>> linear_logits(params, jnp.array([[3.0, 1.0]]))
      Array([[3.5, 2. ]], dtype=float32)
    """
    weights, bias = (_checks.real_array(*part) for part in params._asdict().items())
    if weights.ndim != 2:
        raise ValueError(f"weights must have shape (classes, features), got shape {weights.shape}")
    classes, width = weights.shape
    _checks.has_shape("bias", bias, (classes,), "(classes,)")
    x = _checks.real_array("features", features)
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"features must have shape (..., {width}) to fit weights of shape {weights.shape}, "
            f"got shape {x.shape}"
        )
    return x.astype(weights.dtype) @ weights.T + bias


def make_problem(
    features: Array,
    labels: Array,
    *,
    l2: Array,
    sample_weight: Array | None = None,
    offset: Array | None = None,
    classes: Array | None = None,
) -> Problem:
    """A problem from checked arrays; `classes` masks those that take part, None is all.

    Values that no one can check under jit make the objective NaN here: a negative `l2` or weight, a
    probability label that is negative or does not sum to 1.
    """
    dtype = compute_dtype(features.dtype)
    if sample_weight is None:
        sample_weight = jnp.ones(features.shape[0])
    share = jnp.where(sample_weight < 0, jnp.nan, sample_weight).astype(dtype)
    share = share / share.max()  # so that the sum neither overflows nor underflows
    if labels.ndim == 2:
        share = jnp.where(_checks.are_probabilities(labels), share, jnp.nan)
        labels = labels.astype(dtype).T
    return Problem(
        features=features,
        labels=labels,
        share=share / share.sum(),
        offset=None if offset is None else offset.astype(dtype).T,
        classes=classes,
        l2=jnp.where(l2 < 0, jnp.nan, l2).astype(dtype),
    )


def present_classes(
    labels: Array, sample_weight: Array | None, num_classes: int
) -> Bool[Array, " classes"]:
    """The classes that some example of positive weight has."""
    if labels.ndim == 2:
        members = labels > 0
    else:
        members = labels.astype(jnp.int32)[:, None] == jnp.arange(num_classes, dtype=jnp.int32)
    if sample_weight is not None:
        members &= (sample_weight > 0)[:, None]
    return jnp.any(members, 0)


def objective(params: Params, problem: Problem, *, fit_bias: bool = True) -> Float[Array, ""]:
    """The objective f(W, b) of the module's formula, in nats; constant in b without `fit_bias`."""
    if not fit_bias:
        params = params._replace(bias=lax.stop_gradient(params.bias))
    return _mean_loss(params, problem) + _penalty(params, problem)


def value_and_gradient(params: Params, problem: Problem) -> tuple[Float[Array, ""], Params]:
    """The objective and its gradient, summed over blocks of rows if there are many logits."""

    def block(rows: Problem) -> tuple[Array, Params]:
        value: tuple[Array, Params] = jax.value_and_grad(_mean_loss)(params, rows)
        return value

    loss, gradient = sum_over_rows(block, problem, _block_size(params, problem))
    weights = gradient.weights + problem.l2 * params.weights
    return loss + _penalty(params, problem), Params(weights, gradient.bias)


class Curvature(NamedTuple):
    r"""The Hessian of the objective at a point.

    `product` gives its product with a vector, for the change dz = V x of the logits

    .. math:: H V = \sum_i c_i\, (\mathrm{diag}(p_i) - p_i p_i^T)\, V x_i x_i^T + \lambda V.

    `spread` is c_i p_ik (1 - p_ik), the factor of x_i x_i^T in the Hessian's diagonal blocks; where
    the logits are too many to be kept, the mean of it over the classes. `bias` gives the Hessian
    with respect to the bias alone.
    """

    product: Callable[[Params], Params]
    spread: Float[Array, "groups examples"]
    bias: Callable[[], Float[Array, "classes classes"]]


def curvature(params: Params, problem: Problem, wanted: Array | None = None) -> Curvature:
    """The Hessian at `params`. The probabilities are kept if there are not too many of them.

    Where not `wanted`, it costs little and means nothing.
    """
    size = _block_size(params, problem)

    def logits(rows: Problem) -> Array:
        if wanted is None:
            return _logits(params, rows)
        nothing = jnp.zeros((params.bias.size, len(rows.share)), params.bias.dtype)
        return lax.cond(wanted, lambda: _logits(params, rows), lambda: nothing)

    def probabilities(rows: Problem) -> tuple[Array, Callable[[Array], Array]]:
        where = _column(rows.classes)
        p: Array
        change: Callable[[Array], Array]
        p, change = jax.linearize(lambda z: softmax(z, 0, where=where), logits(rows))
        return p, change

    def weighted(rows: Problem, change: Callable[[Array], Array], v: Params) -> Params:
        dz = _linear(v, rows.features)
        u = rows.share * change(dz)
        return Params(u @ rows.features.astype(u.dtype), jnp.sum(u, 1))

    def with_penalty(data_term: Params, v: Params) -> Params:
        return data_term._replace(weights=data_term.weights + problem.l2 * v.weights)

    def covariance(rows: Problem, p: Array) -> Array:
        weighted = rows.share * p
        return jnp.diag(jnp.sum(weighted, 1)) - weighted @ p.T

    if size >= problem.features.shape[0]:
        p, change = probabilities(problem)
        return Curvature(
            product=lambda v: with_penalty(weighted(problem, change, v), v),
            spread=problem.share * p * (1 - p),
            bias=lambda: covariance(problem, p),
        )

    def product(v: Params) -> Params:
        def block(rows: Problem) -> Params:
            return weighted(rows, probabilities(rows)[1], v)

        return with_penalty(sum_over_rows(block, problem, size), v)

    def block_spread(rows: Problem) -> Array:
        p = probabilities(rows)[0]
        return rows.share * jnp.mean(p * (1 - p), 0)

    def bias() -> Array:
        return sum_over_rows(lambda rows: covariance(rows, probabilities(rows)[0]), problem, size)

    return Curvature(product, map_rows(block_spread, problem, size)[None], bias)


# More logits than this, and than an eighth of the features, are formed in blocks of this many
# quarters: 16 MiB in float32.
_LOGITS = 2**22


def in_blocks(classes: int, problem: Problem) -> bool:
    """Whether the logits are too many to be formed at once."""
    examples, width = problem.features.shape
    return examples * classes > max(_LOGITS, examples * width // 8)


def _block_size(params: Params, problem: Problem) -> int:
    """How many rows' logits are formed at a time."""
    classes = params.bias.size
    return max(_LOGITS // 4 // classes, 1) if in_blocks(classes, problem) else len(problem.share)


_Sum = TypeVar("_Sum")


def sum_over_rows(f: Callable[[Problem], _Sum], problem: Problem, size: int) -> _Sum:
    """f(problem) for an f that is a sum over the examples, in blocks of `size` of them."""
    examples = problem.features.shape[0]
    if size >= examples:
        return f(problem)
    count = -(-examples // size)
    size = -(-examples // count)

    def add(i: Array, total: _Sum) -> _Sum:
        rows, start = _rows(problem, i * size, size)
        # The last block begins within the one before it, whose examples count no more.
        fresh = start + jnp.arange(size) >= i * size
        rows = rows._replace(share=jnp.where(fresh, rows.share, 0))
        added: _Sum = jax.tree.map(jnp.add, total, f(rows))
        return added

    shapes = jax.eval_shape(lambda: f(_rows(problem, 0, size)[0]))
    zero: _Sum = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
    total: _Sum = lax.fori_loop(0, count, add, zero)
    return total


def map_rows(f: Callable[[Problem], Array], problem: Problem, size: int) -> Array:
    """f(problem) for an f that gives each example one value, in blocks of `size` of them."""
    examples = problem.features.shape[0]

    def put(i: Array, values: Array) -> Array:
        rows, start = _rows(problem, i * size, size)
        return lax.dynamic_update_slice_in_dim(values, f(rows), start, 0)

    return lax.fori_loop(0, -(-examples // size), put, jnp.zeros_like(problem.share))


def thinned(problem: Problem, stride: int) -> Problem:
    """One example of each `stride` successive ones, which counts for all of them.

    It is another one each time, lest order in the data be met by order in the choice: the number of
    the group times the golden ratio of 2^32, whose upper bits look like chance.
    """
    group = jnp.arange(problem.features.shape[0] // stride, dtype=jnp.uint32)
    chosen = (group * jnp.uint32(2654435769)) >> jnp.uint32(16)
    index = group * jnp.uint32(stride) + chosen % jnp.uint32(stride)

    def take(value: Array, axis: int = -1) -> Array:
        return jnp.take(value, index, axis, mode="clip")

    return problem._replace(
        features=take(problem.features, 0),
        labels=take(problem.labels),
        share=take(problem.share) * stride,
        offset=None if problem.offset is None else take(problem.offset),
    )


def _rows(problem: Problem, start: Array | int, size: int) -> tuple[Problem, Array]:
    """`size` examples from `start` on, or the last ones; and the number of the first."""
    start = jnp.minimum(start, problem.features.shape[0] - size)

    def cut(value: Array, axis: int = -1) -> Array:
        return lax.dynamic_slice_in_dim(value, start, size, axis)

    rows = problem._replace(
        features=cut(problem.features, 0),
        labels=cut(problem.labels),
        share=cut(problem.share),
        offset=None if problem.offset is None else cut(problem.offset),
    )
    return rows, start


def _linear(params: Params, features: Array) -> Array:
    weights, bias = params
    return weights @ features.astype(weights.dtype).T + bias[:, None]


def _logits(params: Params, problem: Problem) -> Float[Array, "classes examples"]:
    logits = _linear(params, problem.features)
    return logits if problem.offset is None else logits + problem.offset


def _column(classes: Array | None) -> Array | None:
    return None if classes is None else classes[:, None]


def _mean_loss(params: Params, problem: Problem) -> Array:
    where = _column(problem.classes)
    losses = cross_entropy(_logits(params, problem), problem.labels, axis=0, where=where)
    # An example of share 0 is dropped, be its loss finite or not.
    return jnp.sum(problem.share * jnp.where(problem.share == 0, 0, losses))


def _penalty(params: Params, problem: Problem) -> Array:
    return jnp.sum(problem.l2 / 2 * params.weights**2)


def centred(params: Params, classes: Bool[Array, " classes"]) -> Params:
    """The representative with sum 0 over the present classes, and 0 for the absent ones.

    It has the same probabilities, and of all such it has the least norm.
    """
    return Params(*(sum_zero(value, classes) for value in params))


def sum_zero(value: Array, classes: Bool[Array, " classes"]) -> Array:
    """`value` (classes, ...) less its mean over the present classes; 0 for the absent ones."""
    mask = classes.reshape(-1, *[1] * (value.ndim - 1))
    count = jnp.sum(classes).astype(value.dtype)
    return jnp.where(mask, value - jnp.sum(jnp.where(mask, value, 0), 0) / count, 0)
