"""Preconditioned conjugate gradients for problems side by side."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jaxsoftmax._runtime import Array
from jaxsoftmax.regression._penalty import inner

# Directions d of conjugate gradients, of length d^T H d = 1, and their images H d.
Memory = Float[Array, "2 size classes problems columns"]


class Stop(NamedTuple):
    """When to stop, for each problem.

    Attributes:
      precise: a decrement up to which only `enough` counts.
      forcing: the part of r^T M r, for the residual r and the preconditioner M, that may be left.
      enough: the squared 2-norm of the scaled residual that may be left,
      decrement: if r^T M r is no larger than this.
      largest: a decrement that is beyond belief.
      most: the most steps; below 0, the problem needs no direction.
    """

    precise: Array
    forcing: Array
    enough: Array
    decrement: Array
    largest: Array
    most: Array


class Progress(NamedTuple):
    """Approximate solutions x of H x = b, for a positive semidefinite H.

    `numbers` (5, problems) are r^T M r for the residual r and the preconditioner M at the start and
    now, the decrement b^T x, which grows to b^T H^+ b, the number of steps, and 1 for a problem
    that goes on. It ends, too, where rounding leaves no positive curvature along its direction.
    """

    x: Array
    residual: Array
    direction: Array
    memory: Array
    numbers: Array


def conjugate_gradient(
    product: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    b: Array,
    stop: Stop,
    scale: Array,
    memory: Array,
    while_loop: Callable[..., Any] = lax.while_loop,
) -> Progress:
    """Solve H x = b from x = 0.

    Args:
      product: H times a table.
      precondition: M times a table.
      b: (classes, problems, columns).
      stop: when to stop.
      scale: of residuals, for `stop.enough`.
      memory: is written over.
      while_loop: runs the iteration, `lax.while_loop` or a Python loop.

    Reference:
      Nocedal, Wright (2006), Numerical Optimization, algorithm 5.3.
    """

    def advance(at: Progress) -> Progress:
        z = precondition(at.residual)
        first, before, decrement, steps, running = at.numbers
        squared, scaled = inner(at.residual, z), at.residual * scale
        first = jnp.where(steps == 0, squared, first)
        beta = jnp.where(steps == 0, 0, squared / before)
        left = inner(scaled, scaled)
        far = (decrement > stop.precise) | ((steps == 0) & (stop.precise < jnp.inf))
        enough = (left <= stop.enough) & (squared <= stop.decrement) & (steps > 0)
        done = (far & (squared <= stop.forcing * first)) | enough
        most = jnp.where(far | (stop.most < 0), stop.most, _PRECISE)
        going = (running > 0) & (squared > 0) & (squared < jnp.inf) & ~done & (steps < most)
        going &= decrement <= stop.largest
        numbers = jnp.stack([first, squared, decrement, steps, going.astype(z.dtype)])
        direction = jnp.where(_over(going), z + _over(beta) * at.direction, at.direction)
        at = at._replace(direction=direction, numbers=numbers)
        return _cond(jnp.any(going), step, at)

    size = memory.shape[1]

    def step(at: Progress) -> Progress:
        image = product(at.direction)
        first, squared, decrement, steps, running = at.numbers
        curvature = inner(at.direction, image)
        curved = (running > 0) & (curvature > 0) & (curvature < jnp.inf)
        safe = jnp.where(curved, curvature, 1)
        alpha = jnp.where(curved, squared / safe, 0)
        length = jnp.where(curved, lax.rsqrt(safe), 0)
        curved = curved.astype(b.dtype)
        return Progress(
            x=at.x + _over(alpha) * at.direction,
            residual=at.residual - _over(alpha) * image,
            direction=at.direction,
            memory=_remember(at.memory, at.direction, image, length, steps) if size else at.memory,
            numbers=jnp.stack(
                [first, squared, decrement + alpha * squared, steps + curved, curved]
            ),
        )

    nothing, one = jnp.zeros_like(b), jnp.ones(b.shape[1], b.dtype)
    numbers = jnp.stack([one, one, 0 * one, 0 * one, one])
    start = Progress(nothing, b, nothing, memory, numbers)
    end: Progress = while_loop(lambda at: jnp.any(at.numbers[4] > 0), advance, start)
    return end


_PRECISE = 500  # steps of a direction that is to be found well


def _cond(condition: Array, f: Callable[[Progress], Progress], at: Progress) -> Progress:
    """f(at) on a condition, which is known where a Python loop runs the iteration."""
    if not isinstance(condition, jax.core.Tracer):
        return f(at) if condition else at
    result: Progress = lax.cond(condition, f, lambda at: at, at)
    return result


def _remember(memory: Array, direction: Array, image: Array, length: Array, steps: Array) -> Array:
    """The memory with a direction and its image in place of the oldest ones; 0 of a problem that
    took no step."""
    slot = jnp.max(steps).astype(jnp.int32) % memory.shape[1]
    pair = jnp.stack([direction, image])[:, None] * length[None, None, None, :, None]
    return lax.dynamic_update_slice_in_dim(memory, pair, slot, 1)


def informed(precondition: Callable[[Array], Array], memory: Array) -> Callable[[Array], Array]:
    r"""The preconditioner M, made exact along the directions S of `memory`, with images Y = H S:

    .. math:: (I - S Y^T)\, M\, (I - Y S^T) + S S^T.

    It is positive definite whatever H they were computed with.

    Reference:
      Gratton, Sartenaer, Tshimanga (2011), On a class of limited memory preconditioners for large
      scale linear systems with multiple right-hand sides, SIAM Journal on Optimization 21.
    """
    directions, images = memory

    def along(vectors: Array, table: Array) -> Array:
        return jnp.einsum("sklj,klj->ls", vectors, table)

    def combine(factors: Array, vectors: Array) -> Array:
        return jnp.einsum("ls,sklj->klj", factors, vectors)

    def apply(residual: Array) -> Array:
        part = along(directions, residual)
        rest = precondition(residual - combine(part, images))
        part = part - along(images, rest)
        return rest + combine(part, directions)

    return apply


def _over(scalar: Array) -> Array:
    """A number of each problem, to be multiplied with tables."""
    return scalar[None, :, None]
