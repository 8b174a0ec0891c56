"""The penalty on the weights."""

import math
from typing import NamedTuple

from jax.typing import DTypeLike
from jaxtyping import Float

from jaxsoftmax._runtime import Array, namespace


class Ridge(NamedTuple):
    r"""The penalty :math:`\sum_{kj} \lambda_j T_{kj}^2 / 2` of a table T.

    Attributes:
      weight: (1, problems or 1, columns), :math:`\lambda_j`, 0 for the bias.
      gap_scale: :math:`1 / \sqrt{2 \lambda_j}`, and 0 where nothing is penalised.
    """

    weight: Float[Array, "1 problems columns"]
    gap_scale: Float[Array, "1 problems columns"]

    @staticmethod
    def of(l2: Float[Array, " problems"], inverse: Float[Array, " features"]) -> "Ridge":
        """The penalty l2 on weights W = T * inverse.

        A column of size 1e-20 has a penalty that float32 cannot hold; its weight is 0 all the same.
        """
        xp = namespace(l2, inverse)
        root = xp.sqrt(l2)[:, None] * xp.where(inverse > 0, inverse, 1)[None]
        root = xp.minimum(root, 1e15)[None]
        scale = xp.where(root > 0, math.sqrt(0.5) / xp.where(root > 0, root, 1), 0)
        # Of the bias both are 0.
        weight, scale = (xp.pad(v, [(0, 0), (0, 0), (0, 1)]) for v in (root**2, scale))
        return Ridge(weight, scale.astype(root.dtype))

    def astype(self, dtype: DTypeLike) -> "Ridge":
        return Ridge(self.weight.astype(dtype), self.gap_scale.astype(dtype))

    def value(self, table: Array) -> Float[Array, " problems"]:
        return inner(self.weight * table, table) / 2

    def gradient(self, table: Array) -> Array:
        return self.weight * table

    def product(self, direction: Array) -> Array:
        """The penalty's Hessian times a direction."""
        return self.weight * direction

    def dual_gap(self, gradient: Array) -> Float[Array, " problems"]:
        r"""The part :math:`\sum_{kj} g_{kj}^2 / (2 \lambda_j)` of the duality gap.

        The gradient g is of loss and penalty, at residuals that are feasible in the dual problem.

        Reference:
          Boyd, Vandenberghe (2004), Convex Optimization, section 5.1.6.
        """
        scaled = gradient * self.gap_scale
        return inner(scaled, scaled)


def inner(a: Array, b: Array) -> Float[Array, " problems"]:
    """The inner product of each problem's tables."""
    return namespace(a, b).einsum("klj,klj->l", a, b)
