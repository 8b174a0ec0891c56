"""Softmax, log-softmax, log-sum-exp, entropy and divergence, with derivatives of every order.

Shapes: an input has any shape; `axis` (an integer, several, or None for all) spans the classes, the
other axes are batch axes, and a *row* is one batch entry. `where` is a boolean array that
broadcasts to the input's shape. `axis_name` names the mesh axis, or axes, over which a row is
sharded: under `jax.shard_map` each device then holds a part of every row, and only one maximum and
one or two sums per row travel.

Conventions, the same in the whole module:

* A masked entry (`where` False) has softmax 0 and log-softmax -inf. Whatever stands there, NaN and
  inf included, reaches neither a value nor a derivative. A row that is masked throughout has
  log-sum-exp -inf, and all its derivatives are 0.
* A row whose allowed entries are all -inf has softmax NaN and log-sum-exp -inf; one with an allowed
  +inf or NaN has softmax NaN.
* Integers and booleans are converted to the default float. bfloat16 and float16 are computed in
  float32 and returned in their own dtype, `entropy` and `kl_divergence` in float32.
* Values and derivatives keep their relative accuracy in the tails, where one entry holds almost all
  of the mass.
"""

from jaxsoftmax.functional._divergence import entropy, kl_divergence
from jaxsoftmax.functional._logsumexp import logsumexp
from jaxsoftmax.functional._softmax import log_softmax, softmax, softmax_jacobian

__all__ = [
    "entropy",
    "kl_divergence",
    "log_softmax",
    "logsumexp",
    "softmax",
    "softmax_jacobian",
]
