"""Classification losses: of logits, and of a linear layer without its logits."""

from jaxsoftmax.losses._cross_entropy import cross_entropy
from jaxsoftmax.losses._linear import linear_cross_entropy, linear_logsumexp

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_logsumexp"]
