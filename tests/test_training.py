"""The minibatch trainer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression

from jaxsoftmax import Params, training
from tests.fits import make_problem, objective
from tests.helpers import WIDE

pytestmark = [pytest.mark.single, pytest.mark.slow]

EXAMPLES, WIDTH, CLASSES, L2 = 50, 3, 4, 1e-2
OPTIMIZERS = {
    "sgd": optax.sgd(0.5, momentum=0.9),
    "adam": optax.adam(0.05),
    "adamw with a schedule": optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 400), weight_decay=1e-4
    ),
    "one that needs the value": optax.chain(
        optax.adam(0.05), optax.contrib.reduce_on_plateau(patience=50)
    ),
}


def data() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(EXAMPLES, WIDTH))
    scores = features @ rng.normal(size=(WIDTH, CLASSES)) + rng.gumbel(size=(EXAMPLES, CLASSES))
    return features.astype(WIDE), scores.argmax(-1)


def start(optimizer: optax.GradientTransformation) -> training.TrainState:
    return training.init(WIDTH, CLASSES, optimizer=optimizer, dtype=WIDE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimiser_comes_near_the_optimum(name: str) -> None:
    features, labels = data()
    optimizer = OPTIMIZERS[name]
    state, losses = training.train(
        start(optimizer),
        features,
        labels,
        optimizer=optimizer,
        key=jax.random.key(0),
        epochs=80,
        batch_size=10,
        l2=L2,
        progress=False,
    )
    peer = LogisticRegression(C=1 / (L2 * EXAMPLES), solver="newton-cg", tol=1e-6)
    peer.fit(features, labels)
    best = Params(jnp.asarray(peer.coef_, WIDE), jnp.asarray(peer.intercept_, WIDE))
    problem = make_problem(jnp.asarray(features), jnp.asarray(labels), num_classes=CLASSES)
    assert losses.shape == (400,)
    assert state.step == 400
    minimum = objective(best, problem, jnp.asarray(L2))
    assert (
        minimum * (1 - 1e-4) <= objective(state.params, problem, jnp.asarray(L2)) < 1.05 * minimum
    )


def test_a_step_is_the_optimisers_own_on_the_mean_loss() -> None:
    features, labels = data()
    optimizer = optax.sgd(0.1)
    state, loss = training.train_step(
        start(optimizer), features, labels, optimizer=optimizer, l2=L2
    )
    problem = make_problem(jnp.asarray(features), jnp.asarray(labels), num_classes=CLASSES)
    zero = Params(jnp.zeros((CLASSES, WIDTH), WIDE), jnp.zeros(CLASSES, WIDE))
    value, gradient = jax.value_and_grad(objective)(zero, problem, jnp.asarray(L2))
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    np.testing.assert_allclose(state.params.weights, -0.1 * gradient.weights, rtol=1e-5)
    np.testing.assert_allclose(state.params.bias, -0.1 * gradient.bias, rtol=1e-5, atol=1e-7)


def test_a_batch_without_some_class_still_trains_that_class() -> None:
    optimizer = optax.sgd(1.0)
    features, labels = np.ones((2, WIDTH), WIDE), np.array([0, 0])
    state, _ = training.train_step(start(optimizer), features, labels, optimizer=optimizer)
    assert (state.params.bias[1:] < 0).all()


@pytest.mark.usefixtures("no_debug_nans")
def test_a_step_is_compiled_once_and_reuses_the_memory_of_the_state() -> None:
    features, labels = data()
    optimizer = optax.adam(0.1)
    first = state = start(optimizer)
    size = training.train_step._cache_size()  # type: ignore[attr-defined]
    for batch in training.shuffled_batches(features, labels, batch_size=8, key=jax.random.key(0)):
        state, _ = training.train_step(state, *batch, optimizer=optimizer, l2=L2)
    assert training.train_step._cache_size() == size + 1  # type: ignore[attr-defined]
    assert first.params.weights.is_deleted()
    assert not state.params.weights.is_deleted()


@pytest.mark.parametrize("batch_size", [1, 7, 10, 50])
def test_an_epoch_has_every_example_once_in_batches_of_one_shape(batch_size: int) -> None:
    index = np.arange(EXAMPLES)
    batches = list(
        training.shuffled_batches(
            index[:, None], index, batch_size=batch_size, key=jax.random.key(1)
        )
    )
    assert {np.shape(batch.labels) for batch in batches} == {(batch_size,)}
    labels, weight = (
        np.concatenate([np.asarray(getattr(batch, name)) for batch in batches])
        for name in ("labels", "sample_weight")
    )
    np.testing.assert_array_equal(np.sort(labels[weight == 1]), index)
    assert weight.sum() == EXAMPLES
    assert batch_size == 1 or (labels[:EXAMPLES] != index).any()


def test_the_key_fixes_the_result() -> None:
    features, labels = data()
    optimizer = optax.adam(0.1)

    def losses(seed: int) -> jax.Array:
        return training.train(
            start(optimizer),
            features,
            labels,
            optimizer=optimizer,
            key=jax.random.key(seed),
            epochs=2,
            batch_size=8,
            progress=False,
        )[1]

    np.testing.assert_array_equal(losses(0), losses(0))
    assert (losses(0) != losses(1)).any()


def test_a_batch_size_above_the_number_of_examples_takes_all() -> None:
    features, labels = data()
    optimizer = optax.sgd(0.1)
    _, losses = training.train(
        start(optimizer),
        features,
        labels,
        optimizer=optimizer,
        key=jax.random.key(0),
        epochs=2,
        batch_size=1000,
        progress=False,
    )
    assert losses.shape == (2,)


def test_the_progress_bar_tells_the_steps_and_the_objective(
    capsys: pytest.CaptureFixture[str],
) -> None:
    features, labels = data()
    optimizer = optax.sgd(0.1)
    _, losses = training.train(
        start(optimizer),
        features,
        labels,
        optimizer=optimizer,
        key=jax.random.key(0),
        epochs=3,
        batch_size=25,
    )
    printed = capsys.readouterr().err
    assert "6/6" in printed
    assert f"objective={losses[-2:].mean():.4f}" in printed


def test_evaluation_counts_loss_and_hits() -> None:
    params = Params(jnp.eye(2, dtype=WIDE), jnp.zeros(2, WIDE))
    features = np.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    metrics = training.evaluate(params, features, np.array([0, 1, 1]))
    np.testing.assert_allclose(metrics.accuracy, 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics.loss, np.log1p(np.exp(-2)) + 2 / 3, rtol=1e-6)
    wide = Params(jnp.zeros((300, 2), WIDE), jnp.arange(300).astype(WIDE))
    narrow = training.evaluate(wide, features[:1], np.array([43], np.uint8))
    assert narrow.accuracy == 0  # the likeliest class is 299, which is 43 modulo 256
    rows = np.array([[1.0, 0.0], [0.2, 0.8], [0.4, 0.6]])
    metrics = training.evaluate(params, features, rows)
    np.testing.assert_allclose(metrics.accuracy, 2 / 3, rtol=1e-6)


@pytest.mark.usefixtures("no_debug_nans")
def test_a_bad_value_inside_a_step_gives_nan() -> None:
    features, labels = data()
    optimizer = optax.sgd(0.1)
    bad = np.where(np.arange(EXAMPLES) == 3, CLASSES, labels)
    state, loss = training.train_step(start(optimizer), features, bad, optimizer=optimizer)
    assert jnp.isnan(loss)
    assert jnp.isnan(state.params.weights).all()


@pytest.mark.usefixtures("no_jaxtyping")
def test_bad_arguments_are_named() -> None:
    features, labels = data()
    optimizer = optax.sgd(0.1)
    state = start(optimizer)
    good: dict[str, Any] = {
        "optimizer": optimizer,
        "key": jax.random.key(0),
        "epochs": 1,
        "batch_size": 8,
        "progress": False,
    }
    for arguments, kwargs, error, message in (
        (
            (features[:, :2], labels),
            {},
            ValueError,
            r"features must have shape \(examples, 3\), got",
        ),
        ((features, labels[1:]), {}, ValueError, r"labels must have shape \(examples,\) = \(50,\)"),
        ((features, labels + 1), {}, ValueError, r"labels must be in \[0, 4\)"),
        ((features, labels * 1.0), {}, TypeError, "must have an integer dtype"),
        ((features, labels), {"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ((features, labels), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ((features, labels), {"batch_size": 1.5}, TypeError, "batch_size must be an integer"),
    ):
        with pytest.raises(error, match=message):
            training.train(state, *arguments, **(good | kwargs))
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(examples,\)"):
        training.train_step(state, features, labels, np.ones(3), optimizer=optimizer)
    with pytest.raises(ValueError, match=r"features must have shape \(examples, 3\)"):
        training.evaluate(state.params, features[0], labels)
    with pytest.raises(ValueError, match="labels must be as many as features, 50, got 49"):
        next(training.shuffled_batches(features, labels[1:], batch_size=5, key=good["key"]))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(training.shuffled_batches(features, labels, batch_size=0, key=good["key"]))
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        training.init(0, 2, optimizer=optimizer)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        training.init(3, 1, optimizer=optimizer)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got bfloat16"):
        training.init(3, 2, optimizer=optimizer, dtype=jnp.bfloat16)
