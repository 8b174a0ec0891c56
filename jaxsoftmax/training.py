"""Minibatch training of a softmax regression with any optax optimiser.

    optimizer = optax.adam(1e-2)
    state = training.init(features.shape[1], num_classes, optimizer=optimizer)
    state, losses = training.train(
        state, features, labels, optimizer=optimizer, key=jax.random.key(0), epochs=20,
        batch_size=128
    )
    metrics = training.evaluate(state.params, test_features, test_labels)

`fit` reaches the optimum in fewer passes where the data fit in memory; this is for data that do
not, and for optimisers of one's own. `train` is a loop over `train_step`, for those who write their
own loop.

Shapes are those of `jaxsoftmax.regression`. A batch is a problem of its own, with its mean loss.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Int, Shaped

from jaxsoftmax import _arrays, _checks
from jaxsoftmax._progress import progress_bar
from jaxsoftmax.losses import cross_entropy
from jaxsoftmax.regression._data import make_problem
from jaxsoftmax.regression._objective import as_they_came, table_of
from jaxsoftmax.regression._objective import evaluate as evaluate_objective
from jaxsoftmax.regression._params import Params, linear_logits


class TrainState(NamedTuple):
    """Parameters, optimiser state and the number of steps taken, a pytree."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """Mean cross-entropy in nats per example, and the fraction of examples classified right."""

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]


class Batch(NamedTuple):
    """Examples of one step; rows that only fill up the last batch have `sample_weight` 0."""

    features: Shaped[ArrayLike, "batch features"]
    labels: Shaped[ArrayLike, "batch *classes"]
    sample_weight: Float[ArrayLike, " batch"]


def init(
    num_features: int,
    num_classes: int,
    *,
    optimizer: optax.GradientTransformation,
    dtype: DTypeLike = jnp.float32,
) -> TrainState:
    """A state with parameters 0, the natural start of a convex problem.

    Args:
      num_features: number of features, at least 1.
      num_classes: number of classes, at least 2.
      optimizer: any optax optimiser.
      dtype: float32 or float64, of parameters and computation.

    Returns:
      The state at step 0.

    Raises:
      TypeError: a number is not an integer, or `dtype` is not float32 or float64.
      ValueError: a number is too small.
    """
    num_features = _checks.integer("num_features", num_features, least=1)
    num_classes = _checks.integer("num_classes", num_classes, least=2)
    if jnp.dtype(dtype) not in (jnp.dtype("float32"), jnp.dtype("float64")):
        raise TypeError(f"dtype must be float32 or float64, got {jnp.dtype(dtype)}")

    @jax.jit  # Results are memory of their own, even if an optimiser keeps the parameters.
    def start() -> TrainState:
        weights = jnp.zeros((num_classes, num_features), dtype)
        params = Params(weights, jnp.zeros(num_classes, dtype))
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return start()


@partial(jax.jit, static_argnames="optimizer", donate_argnames="state")
def train_step(
    state: TrainState,
    features: Shaped[ArrayLike, "batch features"],
    labels: Shaped[ArrayLike, "batch *classes"],
    sample_weight: Shaped[ArrayLike, " batch"] | None = None,
    *,
    optimizer: optax.GradientTransformation,
    l2: Shaped[ArrayLike, ""] = 0.0,
) -> tuple[TrainState, Float[Array, ""]]:
    """One step of the optimiser on the objective of one batch.

    It is compiled once per batch shape and optimiser: make the optimiser once, outside the loop.
    The memory of `state` is reused for the new state, so the old one is gone after the call.

    Args:
      state: what `init` or the last step gave.
      features: (batch, features), real.
      labels: integer classes (batch,), or probabilities (batch, classes).
      sample_weight: (batch,), not negative; None for 1.
      optimizer: the optimiser that made the state.
      l2: penalty on the weights per mean loss.

    Returns:
      The new state, and the batch's objective in nats before the step. The objective is NaN where a
      label is out of range, a probability label is negative or does not sum to 1, or `l2` or a
      weight is negative.

    Raises:
      TypeError: an array is not real, or `labels` is boolean or floating without a class axis.
      ValueError: a shape does not fit.
    """
    num_classes, width = state.params.weights.shape
    features, labels = _checks.examples(features, labels, num_classes, width)
    if sample_weight is not None:
        sample_weight = _checks.weights("sample_weight", sample_weight, features.shape[0])
    problem = make_problem(
        features.astype(state.params.weights.dtype),
        labels,
        sample_weight,
        num_classes=num_classes,
    )
    penalty = _checks.scalar("l2", l2)
    penalty = jnp.where(penalty < 0, jnp.nan, penalty)
    rows, ridge = as_they_came(problem, num_classes, penalty)
    # A class that this batch lacks is possible all the same.
    rows = replace(rows, target=jnp.ones_like(rows.target))

    def value_fn(params: Params) -> Array:
        value, _ = evaluate_objective(rows, ridge, table_of(params))
        return value[0]

    value, grad = jax.value_and_grad(value_fn)(state.params)
    # Some optimisers mix dtypes, which strict promotion, if a user has set it, refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grad, state.opt_state, state.params, value=value, grad=grad, value_fn=value_fn
        )
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), value


def evaluate(
    params: Params,
    features: Shaped[ArrayLike, "examples features"],
    labels: Shaped[ArrayLike, "examples *classes"],
) -> Metrics:
    """Mean loss and accuracy on all examples at once.

    Args:
      params: weights (classes, features) and bias (classes,).
      features: (examples, features), real.
      labels: integer classes (examples,), or probabilities (examples, classes), of which the
        largest counts as the right class.

    Returns:
      `Metrics`; the loss is without penalty.

    Raises:
      TypeError: an array is not real, or `labels` is boolean or floating without a class axis.
      ValueError: a shape does not fit, or, outside jit, a label is out of range.
    """
    features, labels = _checks.examples(features, labels, *params.weights.shape)
    return _evaluate(params, features, labels)


@jax.jit
def _evaluate(params: Params, features: Array, labels: Array) -> Metrics:
    logits = linear_logits(params, features)
    right = labels if labels.ndim == 1 else labels.argmax(-1)
    hits = logits.argmax(-1).astype(jnp.int32) == right.astype(jnp.int32)
    return Metrics(cross_entropy(logits, labels).mean(), hits.mean(dtype=logits.dtype))


def shuffled_batches(
    features: Shaped[ArrayLike, "examples features"],
    labels: Shaped[ArrayLike, "examples *classes"],
    *,
    batch_size: int,
    key: Shaped[Array, "..."],
) -> Iterator[Batch]:
    """One epoch: every example once, in an order that `key` fixes, in batches of one shape.

    Args:
      features: (examples, features), kept on the host; one batch at a time goes to the device.
      labels: integer classes (examples,), or probabilities (examples, classes).
      batch_size: examples a batch, at least 1; where it does not divide their number, rows of
        weight 0 fill up the last batch.
      key: random key, as `jax.random.key` makes it.

    Yields:
      `Batch`es of `batch_size` rows.

    Raises:
      TypeError: `batch_size` is not an integer.
      ValueError: `batch_size` is below 1, or features and labels differ in number.
    """
    batch_size = _checks.integer("batch_size", batch_size, least=1)
    features, labels = (
        np.asarray(_arrays.as_jax_takes_it(name, value))
        for name, value in (("features", features), ("labels", labels))
    )
    if len(features) != len(labels):
        raise ValueError(f"labels must be as many as features, {len(features)}, got {len(labels)}")
    order = np.asarray(jax.random.permutation(key, len(features)))
    filled = np.resize(order, -(-len(order) // batch_size) * batch_size)
    weight = (np.arange(len(filled)) < len(order)).astype(np.float32)
    for start in range(0, len(filled), batch_size):
        rows = slice(start, start + batch_size)
        yield Batch(features[filled[rows]], labels[filled[rows]], weight[rows])


def train(
    state: TrainState,
    features: Shaped[ArrayLike, "examples features"],
    labels: Shaped[ArrayLike, "examples *classes"],
    *,
    optimizer: optax.GradientTransformation,
    key: Shaped[Array, "..."],
    epochs: int,
    batch_size: int,
    l2: Shaped[ArrayLike, ""] = 0.0,
    progress: bool | None = None,
) -> tuple[TrainState, Float[Array, " steps"]]:
    """Train for some epochs over shuffled batches, with a progress bar.

    The same `key` gives the same result.

    Args:
      state: what `init` or an earlier call gave; its memory is reused, see `train_step`.
      features: (examples, features), real.
      labels: integer classes (examples,), or probabilities (examples, classes).
      optimizer: the optimiser that made the state.
      key: random key of the shuffles, as `jax.random.key` makes it.
      epochs: passes over the examples, at least 1.
      batch_size: examples a step, at least 1; at most all are taken.
      l2: penalty on the weights per mean loss.
      progress: show a tqdm progress bar with the mean objective of the last epoch, for which
        `jaxsoftmax[train]` brings tqdm; None for a bar where it is installed.

    Returns:
      The state after the last step, and the objective of every step in nats.

    Raises:
      TypeError: an array is not real, `labels` is boolean or floating without a class axis, or a
        number is not an integer.
      ValueError: a shape does not fit, a number is too small, or a label is out of range.
      ModuleNotFoundError: `progress` is True and tqdm is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxsoftmax import training
      >>> features, labels = jnp.array([[-1.0], [0.0], [1.0], [2.0]]), jnp.array([0, 0, 1, 1])
      >>> optimizer = optax.adam(0.1)
      >>> state = training.init(1, 2, optimizer=optimizer)
      >>> state, losses = training.train(
      ...     state, features, labels, optimizer=optimizer, key=jax.random.key(0), epochs=50,
      ...     batch_size=2, progress=False,
      ... )
      >>> losses.shape
      (100,)
      >>> float(training.evaluate(state.params, features, labels).accuracy)
      1.0
    """
    _checks.examples(features, labels, *state.params.weights.shape)
    _checks.scalar("l2", l2)
    epochs = _checks.integer("epochs", epochs, least=1)
    examples = np.shape(features)[0]
    batch_size = min(_checks.integer("batch_size", batch_size, least=1), examples)
    steps = -(-examples // batch_size)
    losses: list[Array] = []
    if progress is None:
        progress = find_spec("tqdm") is not None
    bar = progress_bar(epochs * steps, "step", "progress", False) if progress else None
    for epoch_key in jax.random.split(key, epochs):
        for batch in shuffled_batches(features, labels, batch_size=batch_size, key=epoch_key):
            state, loss = train_step(state, *batch, optimizer=optimizer, l2=l2)
            losses.append(loss)
            if bar is not None:
                bar.update()
        if bar is not None:
            bar.set_postfix(objective=f"{np.mean(losses[-steps:]):.4f}")
    if bar is not None:
        bar.close()
    return state, jnp.stack(losses)
