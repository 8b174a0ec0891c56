r"""Log-sum-exp and cross-entropy of a linear layer without its logits.

With N examples, D features and V classes the logits :math:`z = X W^T + b` are an N x V array, for a
large vocabulary by far the largest of a training step. Here they exist for one block of classes at
a time, forward and in every derivative, which computes them again. Between the two one or two
numbers per example are kept.

Shapes: `features` (N, D), `weights` (V, D), `bias` (V,), `labels` (N,). Products are accumulated in
float32 or wider, and the rest is computed in the same dtype. Losses are in nats.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from jaxsoftmax import _arrays, _checks
from jaxsoftmax._checks import AxisName
from jaxsoftmax.functional._reductions import Rows
from jaxsoftmax.functional._stable import nan_unless
from jaxsoftmax.losses import _labels
from jaxsoftmax.losses._class_blocks import Form, logits_dtype, statistics


def linear_logsumexp(
    features: Shaped[ArrayLike, "examples features"],
    weights: Shaped[ArrayLike, "classes features"],
    bias: Shaped[ArrayLike, " classes"] | None = None,
    *,
    block_size: int | None = None,
    softcap: float | None = None,
    axis_name: AxisName = None,
) -> Float[Array, " examples"]:
    r"""Log-sum-exp over the classes of the logits of a linear layer.

    .. math:: L_i = \log\sum_k \exp(z_{ik}), \qquad z = X W^T + b, \qquad
              dL_i = \sum_k \sigma(z_i)_k \, dz_{ik}

    or of :math:`c \tanh(z / c)` with a `softcap` c.

    Args:
      features: X, (examples, features), real.
      weights: W, (classes, features), real.
      bias: b, (classes,), real; None for 0.
      block_size: the number of classes whose logits are formed at a time; None for one that suits
        the shapes.
      softcap: the bound c of the logits, a number above 0; None for none.
      axis_name: the mesh axis or axes over which the classes of `weights` and `bias` are sharded,
        inside `jax.shard_map`.

    Returns:
      Log-sum-exp per example, in float32, or in float64 if an input has it.

    Raises:
      TypeError: an array is not real, `block_size` is not an integer, or `axis_name` not a string.
      ValueError: the shapes do not fit, `block_size` is below 1, or `softcap` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax import linear_logsumexp
      >>> print(f"{linear_logsumexp(jnp.ones((1, 3)), jnp.zeros((130, 3)), block_size=128)[0]:.4f}")
      4.8675
    """
    x, w, b = _check_layer(features, weights, bias)
    form = _check_form(block_size, softcap, axis_name)._replace(log_z=True)
    return _logsumexp(x, w, b, form)


def linear_cross_entropy(
    features: Shaped[ArrayLike, "examples features"],
    weights: Shaped[ArrayLike, "classes features"],
    labels: Shaped[ArrayLike, " examples"],
    bias: Shaped[ArrayLike, " classes"] | None = None,
    *,
    block_size: int | None = None,
    softcap: float | None = None,
    label_smoothing: Shaped[ArrayLike, ""] = 0.0,
    class_weight: Shaped[ArrayLike, " classes"] | None = None,
    z_loss: Shaped[ArrayLike, ""] = 0.0,
    ignore_label: int | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    axis_name: AxisName = None,
) -> Float[Array, "*examples"]:
    r"""Cross-entropy of integer labels under the softmax of a linear layer.

    .. math:: \ell_i = -\sum_k w_k y'_{ik} \log\sigma(z_i)_k
              + \zeta \Bigl(\log\sum_k \exp(z_{ik})\Bigr)^2, \qquad z = X W^T + b

    the same loss as `cross_entropy(features @ weights.T + bias, labels, ...)`, whose docstring
    explains `label_smoothing`, `class_weight`, `z_loss` and `ignore_label`, with the same
    derivatives of every order.

    Args:
      features: X, (examples, features), real.
      weights: W, (classes, features), real.
      labels: integer classes in [0, classes), (examples,).
      bias: b, (classes,), real; None for 0. At -inf it excludes a class.
      block_size: the number of classes whose logits are formed at a time; None for one that suits
        the shapes.
      softcap: the bound c of the logits, which become :math:`c \tanh(z / c)`, a number above 0;
        None for none.
      label_smoothing: the share of each label that goes to the classes, in [0, 1].
      class_weight: w, (classes,), real; None for 1.
      z_loss: the factor :math:`\zeta` of the squared log-sum-exp, at least 0.
      ignore_label: the label of examples that do not count.
      reduction: "mean" over the examples that count, which is 0 over none of them; "sum"; or "none"
        for one loss per example. `class_weight` does not enter the divisor of the mean.
      axis_name: the mesh axis or axes over which the classes of `weights`, `bias` and
        `class_weight` are sharded inside `jax.shard_map`. Labels then count over all shards.

    Returns:
      The loss in nats, a scalar or (examples,), in float32, or in float64 if an input has it. An
      example whose label is out of range has loss NaN and NaN derivatives.

    Raises:
      TypeError: an array is not real, `labels` is not integer, `block_size` or `ignore_label` is
        not an integer, or `axis_name` not a string.
      ValueError: the shapes do not fit, `block_size` is below 1, `softcap` is not above 0,
        `label_smoothing` is not in [0, 1], `z_loss` is negative, or `reduction` is none of the
        three.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import linear_cross_entropy
      >>> features, weights = jnp.eye(2), jnp.array([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
      >>> losses = linear_cross_entropy(features, weights, jnp.array([0, 2]), reduction="none")
      >>> [f"{loss:.3f}" for loss in losses]
      ['0.240', '2.240']
      >>> jax.grad(linear_cross_entropy, 1)(features, weights, jnp.array([0, 2])).shape
      (3, 2)

    Reference:
      Wijmans et al. (2025), Cut your losses in large-vocabulary language models, section 4.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')
    x, w, b = _check_layer(features, weights, bias)
    if ignore_label is not None:
        ignore_label = _checks.integer("ignore_label", ignore_label)
    y = _arrays.label_array(labels, ignore_label)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integer classes, got dtype {y.dtype}")
    _checks.has_shape("labels", y, x.shape[:1], "(examples,)")
    options = _labels.check_options(label_smoothing, class_weight, z_loss, w.shape[0])
    form = _check_form(block_size, softcap, axis_name)._replace(
        log_z=options.z_loss is not None, smoothing=options.label_smoothing is not None
    )
    return _cross_entropy(x, w, y, b, options, ignore_label, reduction, form)


def _check_layer(
    features: ArrayLike, weights: ArrayLike, bias: ArrayLike | None
) -> tuple[Array, Array, Array | None]:
    """Check the arrays of a linear layer and their shapes."""
    x, w = _arrays.real_array("features", features), _arrays.real_array("weights", weights)
    if x.ndim != 2:
        raise ValueError(f"features must have shape (examples, features), got shape {x.shape}")
    if w.ndim != 2 or w.shape[0] == 0 or w.shape[1] != x.shape[1]:
        raise ValueError(
            f"weights must have shape (classes, {x.shape[1]}) for features of shape {x.shape}, "
            f"got shape {w.shape}"
        )
    if bias is None:
        return x, w, None
    b = _arrays.real_array("bias", bias)
    return x, w, _checks.has_shape("bias", b, w.shape[:1], "(classes,)")


def _check_form(block_size: int | None, softcap: float | None, axis_name: AxisName) -> Form:
    """Check the static arguments."""
    if block_size is not None:
        block_size = _checks.integer("block_size", block_size, least=1)
    if softcap is not None:
        _checks.scalar("softcap", softcap, positive=True)
        if (known := _arrays.known(softcap)) is None:
            raise TypeError("softcap must be a number known to the trace, got a tracer")
        softcap = float(known)
    return Form(block_size, softcap, _checks.axis_names(axis_name))


@partial(jax.jit, static_argnums=(3,))
def _logsumexp(x: Array, w: Array, b: Array | None, form: Form) -> Array:
    log_z: Array = statistics(x, w, b, None, None, form).log_z
    return log_z


@partial(jax.jit, static_argnums=(5, 6, 7))
def _cross_entropy(
    x: Array,
    w: Array,
    y: Array,
    b: Array | None,
    options: _labels.Options,
    ignore_label: int | None,
    reduction: str,
    form: Form,
) -> Array:
    """Evaluate the formula above on checked arrays."""
    dtype = logits_dtype(x, w, b)
    rows = Rows((1,), form.axis_name)
    y, counted = _labels.find_counted(y, ignore_label)
    if counted is None:
        counted = jnp.ones(y.shape, bool)
    else:
        x = jnp.where(counted[:, None], x, 0)
    label = _labels.locate(y, (*y.shape, w.shape[0]), rows)
    class_weight = options.class_weight
    if class_weight is not None:
        class_weight = class_weight.astype(dtype)

    position = jnp.where(label.here, label.position, -1)[:, 0]
    log_z, label_loss, smoothing_loss = statistics(x, w, b, position, class_weight, form)
    if options.label_smoothing is not None:
        smoothing = _labels.smoothing_share(options.label_smoothing, dtype)
        classes = _labels.count_classes(w.shape[0], rows)
        smoothing_loss = _labels.scale(smoothing / classes, smoothing_loss)
    coefficient = _labels.label_coefficient(options, label, counted[:, None], rows, dtype)
    if class_weight is not None:
        coefficient = coefficient[:, 0]
    loss = _labels.total_loss(options, label_loss, coefficient, smoothing_loss, log_z)
    loss = jnp.where(counted, nan_unless(label.valid[:, 0], loss), 0)
    if reduction == "none":
        return loss
    total = jnp.sum(loss)
    if reduction == "sum":
        return total
    return total / jnp.maximum(jnp.sum(counted.astype(dtype)), 1)
