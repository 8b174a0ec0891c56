"""Preconditioned conjugate gradients with a stopping rule of the caller."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxsoftmax._runtime import ALONE, Lanes

Product = Callable[[Array, Array], Array]  # with H, of a vector; needed where the flag is set

_Value = TypeVar("_Value")


class Memory(NamedTuple):
    """Directions d of conjugate gradients, of length d^T H d = 1, and their images H d."""

    directions: Array
    images: Array


class Progress(NamedTuple):
    """An approximate solution x of H x = b, for a positive semidefinite H.

    `squared` is r^T M r for the residual r and the preconditioner M, and was `first` at the start;
    `decrement` is b^T x, which grows to b^T H^+ b. `broken` says that rounding left no positive
    curvature along a direction, or so little that the step overflows, or that M b is no number.
    `memory` has the last directions.
    """

    x: Array
    residual: Array
    direction: Array
    first: Array
    squared: Array
    decrement: Array
    steps: Array
    broken: Array
    running: Array
    memory: Memory | None


def conjugate_gradient(
    product: Product,
    precondition: Callable[[Array], Array],
    b: Array,
    proceed: Callable[[Progress], Array],
    memory: Memory | None = None,
    lanes: Lanes = ALONE,
) -> Progress:
    """Solve H x = b from x = 0 as long as `proceed` says so. `memory` is written over.

    Reference:
      Nocedal, Wright (2006), Numerical Optimization, algorithm 5.3.
    """

    def step(at: Progress) -> Progress:
        image = product(at.direction, at.running)
        curvature = jnp.sum(at.direction * image)
        curved = (curvature > 0) & (curvature < jnp.inf)
        alpha = at.squared / jnp.where(curved, curvature, 1)
        broken = ~(curved & jnp.isfinite(alpha * at.squared))
        alpha = jnp.where(broken, 0, alpha)
        scale = jnp.where(broken, 0, lax.rsqrt(jnp.where(broken, 1, curvature)))
        new = at._replace(
            x=at.x + alpha * at.direction,
            residual=at.residual - alpha * image,
            decrement=at.decrement + alpha * at.squared,
            steps=at.steps + 1,
            broken=broken,
            memory=None,
        )
        new = lanes.only(at.running, new, at._replace(memory=None))
        return new._replace(memory=written(at, image * scale, scale))

    def written(at: Progress, image: Array, scale: Array) -> Memory | None:
        """The memory with the direction and its image instead of the oldest ones."""
        if at.memory is None:
            return None
        slot = lanes.most(at.steps) % len(at.memory.images)

        def put(old: Array, new: Array) -> Array:
            new = new.astype(old.dtype)
            if lanes.axis_name is not None:
                new = jnp.where(
                    at.running, new, lax.dynamic_index_in_dim(old, slot, keepdims=False)
                )
            return lax.dynamic_update_index_in_dim(old, new, slot, 0)

        return Memory(put(at.memory.directions, at.direction * scale), put(at.memory.images, image))

    def advance(at: Progress) -> Progress:
        preconditioned = precondition(at.residual)
        squared = jnp.sum(at.residual * preconditioned)
        start = at.steps == 0
        new = at._replace(
            direction=preconditioned + jnp.where(start, 0, squared / at.squared) * at.direction,
            first=jnp.where(start, squared, at.first),
            squared=squared,
            broken=at.broken | ~(squared >= jnp.where(start, 0, -jnp.inf)),
        )
        new = new._replace(running=(squared > 0) & ~new.broken & proceed(new), memory=None)
        new = lanes.only(at.running, new, at._replace(memory=None))._replace(memory=at.memory)
        return once(lanes.any(new.running), step, new)

    one = jnp.ones((), b.dtype)
    start = Progress(
        x=jnp.zeros_like(b),
        residual=b,
        direction=jnp.zeros_like(b),
        first=one,
        squared=one,
        decrement=jnp.zeros_like(one),
        steps=jnp.zeros((), jnp.int32),
        broken=jnp.zeros((), bool),
        running=jnp.ones((), bool),
        memory=memory,
    )
    end: Progress = lax.while_loop(lambda at: lanes.any(at.running), advance, start)
    return end


def empty_memory(size: int, like: Array, dtype: DTypeLike) -> Memory:
    zeros = jnp.zeros((size, *like.shape), dtype)
    return Memory(zeros, zeros)


def informed(precondition: Callable[[Array], Array], memory: Memory) -> Callable[[Array], Array]:
    r"""The preconditioner M, made exact along the directions S of `memory`, with images Y = H S:

    .. math:: (I - S Y^T)\, M\, (I - Y S^T) + S S^T.

    It is positive definite whatever H they were computed with.

    Reference:
      Gratton, Sartenaer, Tshimanga (2011), On a class of limited memory preconditioners for large
      scale linear systems with multiple right-hand sides, SIAM Journal on Optimization 21.
    """
    size = len(memory.directions)
    directions, images = (part.reshape(size, -1) for part in memory)

    def apply(residual: Array) -> Array:
        along = directions @ residual.ravel()
        rest = precondition(residual - (along @ images).reshape(residual.shape))
        along -= images @ rest.ravel()
        return rest + (along @ directions).reshape(residual.shape)

    return apply


def once(wanted: Array, f: Callable[[_Value], _Value], value: _Value) -> _Value:
    """f(value) if `wanted`, else `value`: a `cond` that under vmap is run only if one wants it."""
    return lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), f(carry[1])),
        (wanted, value),
    )[1]
