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
    largest = jnp.max(jnp.abs(b))
    scale = jnp.where(largest > 0, largest, 1)  # the squares must not underflow

    def unscaled(at: Progress) -> Progress:
        return at._replace(
            x=at.x * scale,
            residual=at.residual * scale,
            squared=at.squared * scale * scale,
            decrement=at.decrement * scale * scale,
        )

    def advance(at: Progress) -> Progress:
        image = product(at.direction)
        curvature = jnp.sum(at.direction * image)
        broken = ~(curvature > 0)
        alpha = jnp.where(broken, 0, at.squared / jnp.where(broken, 1, curvature))
        residual = at.residual - alpha * image
        preconditioned = precondition(residual)
        squared = jnp.sum(residual * preconditioned)
        ratio = squared / jnp.where(at.squared > 0, at.squared, 1)
        return Progress(
            x=at.x + alpha * at.direction,
            residual=residual,
            direction=preconditioned + ratio * at.direction,
            squared=squared,
            decrement=at.decrement + alpha * at.squared,
            steps=at.steps + 1,
            broken=broken,
        )

    residual = b / scale
    direction = precondition(residual)
    squared = jnp.sum(residual * direction)
    start = Progress(
        x=jnp.zeros_like(b),
        residual=residual,
        direction=direction,
        squared=squared,
        decrement=jnp.zeros_like(squared),
        steps=jnp.zeros((), jnp.int32),
        broken=jnp.zeros((), bool),
    )
    first = squared * scale * scale
    end: Progress = lax.while_loop(
        lambda at: (at.squared > 0) & ~at.broken & proceed(unscaled(at), first), advance, start
    )
    return unscaled(end)
