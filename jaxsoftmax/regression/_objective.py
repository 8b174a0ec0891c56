r"""The objective of softmax regression: its value, gradient and Hessian.

.. math:: f(T) = \sum_i c_i\, \ell(T x_i + o_i,\; y_i) + \sum_{kj} \tfrac{\lambda_j}{2} T_{kj}^2,
          \qquad \sum_i c_i = 1

with the cross-entropy :math:`\ell`, examples x, labels y, shares c, offsets o and penalties
:math:`\lambda`. Problems side by side have a table T each; shapes are those of `_rows`.

Values and derivatives of the objective are computed only here.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jaxsoftmax._runtime import Array
from jaxsoftmax.functional._reductions import Rows as ClassRows
from jaxsoftmax.regression._coordinates import Coordinates
from jaxsoftmax.regression._data import Problem
from jaxsoftmax.regression._params import Params
from jaxsoftmax.regression._penalty import Ridge
from jaxsoftmax.regression._plan import DEFAULT
from jaxsoftmax.regression._rows import Examples, Raw, Rows

_SHORT = 4096
_FEW = 12  # classes whose rows are read side by side
_CLASSES = ClassRows((0,))


class Point(NamedTuple):
    """A table with the gradient of the objective and, where they are kept, probabilities there."""

    table: Array
    gradient: Array
    probabilities: Array | None


def objective(
    params: Params, problem: Problem, l2: Array, *, fit_bias: bool = True
) -> Float[Array, ""]:
    """The objective of parameters of the features as they came, constant in b if not `fit_bias`."""
    bias = params.bias if fit_bias else lax.stop_gradient(params.bias)
    return evaluate(
        *as_they_came(problem, params.bias.size, l2), table_of(params._replace(bias=bias))
    )[0][0]


def table_of(params: Params) -> Float[Array, "classes 1 columns"]:
    """Parameters of the features as they came, as a table of their own."""
    return jnp.concatenate([params.weights, params.bias[:, None]], 1)[:, None]


def as_they_came(problem: Problem, num_classes: int, l2: Array) -> tuple[Examples, Ridge]:
    """One problem with its features as they came, and its penalty on their weights."""
    examples, width = problem.features.shape
    one = jnp.ones(width, problem.share.dtype)
    design = Raw(problem.features, Coordinates(0 * one, one, jnp.ones((), one.dtype), None))
    block = DEFAULT.block(examples, width, num_classes)
    weight = jnp.append(l2.astype(one.dtype) * one, 0)[None, None]
    return Examples.of(problem, design, num_classes, block), Ridge(weight, 0 * weight)


def evaluate(rows: Rows, penalty: Ridge, table: Array) -> tuple[Array, Point]:
    """The objective at a table, its gradient and the probabilities in one pass."""
    p = None
    if rows.kept:
        loss, slope, p = rows.total(_loss_slope_probabilities, table)
    else:
        loss, slope = rows.total(_loss_and_slope, table)
    return loss + penalty.value(table), Point(table, slope + penalty.gradient(table), p)


def _loss_and_slope(rows: Examples, table: Array) -> tuple[Array, Array]:
    return _loss_slope_probabilities(rows, table)[:2]


def _loss_slope_probabilities(rows: Examples, table: Array) -> tuple[Array, Array, Array]:
    loss, residuals, p = mean_loss_and_residuals(rows, rows.logits(table))
    return loss, rows.transpose(rows.share * residuals), p


def mean_loss_and_residuals(rows: Examples, z: Array) -> tuple[Array, Array, Array]:
    """The mean loss (problems,) of logits z, and residuals and probabilities of all examples."""
    losses, residuals, p = losses_and_residuals(z, rows.labels)
    # An example of share 0 is dropped, be its loss finite or not.
    return mean(rows, jnp.where(rows.share == 0, 0, losses)), residuals, p


def mean(rows: Examples, values: Array) -> Array:
    """The mean (problems,) of a value (1, problems, examples) of each example."""
    if rows.shape[0] <= _SHORT:
        return jnp.einsum("aln,aln->l", jnp.broadcast_to(rows.share, values.shape), values)
    # XLA:CPU adds products of longer vectors in too few accumulators.
    return jnp.sum(rows.share * values, (0, 2))


@jax.custom_jvp
def losses_and_residuals(z: Array, labels: Array) -> tuple[Array, Array, Array]:
    r"""Losses (1, ...), residuals p - y and probabilities p (classes, ...) of logits, in one pass.

    The label's own term is kept apart from the others, of which :math:`p_y - 1` is the negative
    share. So loss and residual keep their digits for a confident label.

    Args:
      z: (classes, ...), -inf for absent classes.
      labels: integers (1, ...), or probabilities of the shape of `z`.
    """
    m = jnp.maximum(lax.stop_gradient(_CLASSES.max(z)), jnp.finfo(z.dtype).min)
    # The minimum keeps the subtraction out of a fused multiply-add (jax#37234).
    d = jnp.minimum(z, m) - m
    e = jnp.exp(d)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        total, excess, own = _CLASSES.sums(
            e, e - jnp.floor(e), labels * jnp.where(labels > 0, d, 0)
        )
        log_total = jnp.log1p(jnp.where(jnp.abs(total - 1) < 0.5, excess, total - 1))
        p = e / total
        return log_total - own, p - labels, p
    classes = jnp.arange(len(z), dtype=labels.dtype).reshape(-1, *[1] * (z.ndim - 1))
    is_label = classes == labels
    others, own = _CLASSES.sums(jnp.where(is_label, 0, e), jnp.where(is_label, d, 0))
    total = others + jnp.exp(own)
    losses = jnp.log1p(jnp.where(own == 0, others, total - 1)) - own
    share = 1 / total
    p = e * share
    return losses, jnp.where(is_label, -others * share, p), p


@losses_and_residuals.defjvp
def _losses_and_residuals_jvp(primals: Any, tangents: Any) -> Any:
    """d l = sum_k (p - y)_k dz_k - sum_k log p_k dy_k, and d p_k = p_k (dz_k - sum_j p_j dz_j)."""
    (z, labels), (dz, dlabels) = primals, tangents
    losses, residuals, p = losses_and_residuals(z, labels)
    dz = jnp.where(jnp.isneginf(z), 0, dz)
    dp = p * centre(p, dz)
    dlosses, dresiduals = jnp.sum(residuals * dz, 0, keepdims=True), dp
    if jnp.issubdtype(labels.dtype, jnp.floating):
        log_p = jax.nn.log_softmax(z, 0)
        dlosses -= jnp.sum(jnp.where(jnp.isneginf(z), 0, log_p) * dlabels, 0, keepdims=True)
        dresiduals = dresiduals - dlabels
    return (losses, residuals, p), (dlosses, dresiduals, dp)


def hessian_product(rows: Rows, penalty: Ridge, point: Point, direction: Array) -> Array:
    r"""The Hessian times a direction D, for the change dz = D x of the logits

    .. math:: H D = \sum_i c_i\, (\mathrm{diag}(p_i) - p_i p_i^T)\, D x_i x_i^T + \lambda D.
    """
    if point.probabilities is None:
        data = rows.total(_product_anew, point.table, direction)
    else:
        data = rows.total(_product, point.probabilities, direction)
    return data + penalty.product(direction)


def _product_anew(rows: Examples, table: Array, direction: Array) -> Array:
    return _product(rows, _probabilities(rows, table), direction)


def _product(rows: Examples, p: Array, direction: Array) -> Array:
    dz = centre(p, rows.design.logits(direction))
    return rows.transpose(rows.share * (p * dz))


def _probabilities(rows: Examples, table: Array) -> Array:
    return losses_and_residuals(rows.logits(table.astype(rows.dtype)), rows.labels)[2]


def point_at(rows: Examples, table: Array) -> Point:
    """A table and its probabilities, if they are kept, for products with the Hessian there."""
    p = _probabilities(rows, table) if rows.kept else None
    return Point(table, jnp.zeros_like(table), p)


def centre(p: Array, values: Array) -> Array:
    """`values` less their mean under the probabilities p.

    Twice, as in softmax's own derivative: the second restores what the first one rounded.
    """
    for _ in range(2):
        values = values - sum_over_classes(p, values)[None]
    return values


def sum_over_classes(p: Array, values: Array) -> Array:
    """The sum of p_k v_k over the classes, which come first.

    XLA:CPU's own reduction over them takes 2 to 8 times as long.
    """

    def by_class(p: Array, values: Array) -> Array:
        def add(k: Array | int, total: Array) -> Array:
            return total + p[k] * values[k]

        if len(p) <= _FEW:
            return functools.reduce(
                lambda total, k: add(k, total), range(1, len(p)), p[0] * values[0]
            )
        return lax.fori_loop(0, len(p), add, jnp.zeros_like(values[0]))

    return lax.platform_dependent(
        p, values, cpu=by_class, default=lambda p, values: jnp.sum(p * values, 0)
    )


def hessian_weight(rows: Examples, point: Point) -> Array:
    """c_i p_ik (1 - p_ik), the factor of x_i x_i^T in the Hessian's diagonal blocks.

    It has shape (classes, problems, examples); where probabilities are not kept it is the mean over
    the classes, of shape (1, problems, examples).
    """
    p = point.probabilities
    if p is not None:
        return rows.share * p * (1 - p)

    def of_block(block: Examples) -> Array:
        p = _probabilities(block, point.table)
        return block.share * jnp.mean(p * (1 - p), 0, keepdims=True)

    return rows.each(of_block)


def curvature(rows: Rows, point: Point) -> Array:
    """The sums (classes or 1, problems, 1) of `hessian_weight` over the examples."""
    if point.probabilities is None:
        return rows.total(_curvature_anew, point.table)
    return rows.total(_curvature, point.probabilities)


def _curvature(rows: Examples, p: Array) -> Array:
    return jnp.sum(rows.share * p * (1 - p), 2, keepdims=True)


def _curvature_anew(rows: Examples, table: Array) -> Array:
    return jnp.mean(_curvature(rows, _probabilities(rows, table)), 0, keepdims=True)
