"""Preconditioned conjugate gradients, with the quantities that its users stop by."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Progress(NamedTuple):
    """An approximate solution x of H x = b, for a positive semidefinite H.

    `squared` is r^T M r for the residual r and the preconditioner M, `decrement` is b^T x, which
    grows to b^T H^+ b. `broken` says that rounding left no positive curvature along a direction.
    """

    x: Array
    residual: Array
    direction: Array
    squared: Array
    decrement: Array
    steps: Array
    broken: Array


def conjugate_gradient(
    product: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    b: Array,
    proceed: Callable[[Progress, Array], Array],
) -> Progress:
    """Solve H x = b from x = 0 as long as `proceed(progress, squared at the start)` says so.

    Reference:
      Nocedal, Wright (2006), Numerical Optimization, algorithm 5.3.
    """

    def advance(at: Progress) -> Progress:
        image = product(at.direction)
        curvature = jnp.sum(at.direction * image)
        broken = ~(curvature > 0)
        alpha = jnp.where(broken, 0, at.squared / jnp.where(broken, 1, curvature))
        residual = at.residual - alpha * image
        preconditioned = precondition(residual)
        squared = jnp.sum(residual * preconditioned)
        return Progress(
            x=at.x + alpha * at.direction,
            residual=residual,
            direction=preconditioned + squared / at.squared * at.direction,
            squared=squared,
            decrement=at.decrement + alpha * at.squared,
            steps=at.steps + 1,
            broken=broken,
        )

    direction = precondition(b)
    squared = jnp.sum(b * direction)
    start = Progress(
        x=jnp.zeros_like(b),
        residual=b,
        direction=direction,
        squared=squared,
        decrement=jnp.zeros_like(squared),
        steps=jnp.zeros((), jnp.int32),
        broken=jnp.zeros((), bool),
    )
    end: Progress = lax.while_loop(
        lambda at: (at.squared > 0) & ~at.broken & proceed(at, squared), advance, start
    )
    return end
