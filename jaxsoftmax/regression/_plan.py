"""Every threshold of size of the regression wing."""

from dataclasses import dataclass
from typing import NamedTuple


class Preconditioning(NamedTuple):
    """A preconditioner for problems of one shape.

    Attributes:
      groups: the number of classes if each has its own factor, 1 if they share one, 0 for none.
      rows: how many examples, those of largest weight, make a factor.
      price: cost of the factors, in products with the Hessian.
      memory: how many directions of conjugate gradients correct it.
      shared: whether problems side by side share it.
    """

    groups: int
    rows: int
    price: int
    memory: int
    shared: bool


@dataclass(frozen=True)
class Plan:
    """Thresholds of size: arrays formed at once or kept, and the faster of two ways.

    They were measured on two CPU cores.

    Attributes:
      kept_logits: the most that are formed at once, if it is more than an eighth of the features.
      block_logits: logits of a block of examples, where they are not formed at once.
      block_features: entries of features of a block, in passes over the features alone.
      examples_first: entries of features from which on logits are computed with the examples first,
        and transposed: XLA:CPU is 2 to 6 times faster at that product.
      narrow: entries of float64 features from which on products are computed in float32.
      remembered: entries of features from which on directions are remembered.
      factor_bytes: the most that the factors may take, if it is more than an eighth of the
        features.
      factor_entries: entries of features that are multiplied at a time to make a factor.
      factor_panel: columns that are multiplied at a time.
      factor_all: columns up to which a factor is made of all examples: to choose them takes longer.
      lanes: problems side by side.
      lane_logits: logits of all of them.
      lane_bytes: bytes of their preconditioners.
      leaving: multiplications in products after which those that are done leave the others.
    """

    kept_logits: int = 2**22
    block_logits: int = 2**20
    block_features: int = 2**20
    examples_first: int = 2**19
    narrow: int = 2**16
    remembered: int = 2**20
    factor_bytes: int = 2**26
    factor_entries: int = 2**19
    factor_panel: int = 256
    factor_all: int = 64
    lanes: int = 16
    lane_logits: int = 2**23
    lane_bytes: int = 2**28
    leaving: int = 2**37

    def block(self, examples: int, width: int, classes: int) -> int:
        """The number of examples whose logits are formed at a time."""
        if examples * classes <= max(self.kept_logits, examples * width // 8):
            return examples
        return max(self.block_logits // classes, 1)

    def preconditioning(
        self,
        examples: int,
        width: int,
        classes: int,
        *,
        kept: bool,
        problems: int = 1,
        alike: bool = True,
    ) -> Preconditioning:
        """The preconditioner that suits a shape; `kept` says that probabilities are.

        One factor per class cuts the products of a fit to a half (digits, DNA) to a seventh
        (Fashion-MNIST, 10000 rows: 667 to 104) of those with a shared one. 2 N / K examples for
        each, which is twice what a class has, serve almost as well as all N: all of Fashion-MNIST
        takes 314 products with a quarter of that, 167 with half of it, 116, and 103 with twice as
        much. Of two classes the blocks are equal, and one block is the whole Hessian.

        Making the factors took as long as 66 products on 10000 rows of Fashion-MNIST, 24 on all
        60000, 36 on DNA, 27 on the digits, 23 on letter, 14 on satellite.

        8 directions of conjugate gradients save as many products as 64: a sixth on Fashion-MNIST,
        half with standardised columns, none where a fit takes few: small problems have no memory.

        `alike` problems side by side make them once, and take about half the time of as many
        single ones for a product.
        """
        budget = max(self.factor_bytes, examples * width * 4 // 8)
        size = 4 * (width + 1) ** 2
        groups = classes if kept and classes > 2 else 1
        if groups * size > budget:
            groups = 1 if size <= budget else 0
        rows = min(examples, max(2 * examples // max(groups, 4), width, 1))
        rows = examples if width <= self.factor_all else rows
        side = max(problems // 2, 1) if alike else 1
        price = 20 + groups * width * (rows + 8 * width) // (20 * classes * examples * side)
        memory = max(min(8, budget // (8 * classes * (width + 1))), 1)
        memory = memory if examples * width >= self.remembered else 0
        return Preconditioning(groups, rows, price, memory, alike)

    def groups_of(self, count: int, alike: bool, examples: int, width: int, classes: int) -> int:
        """The number of problems, of `count`, that memory and cache allow side by side."""
        least = max(
            1 / self.lanes,
            classes * examples / self.lane_logits,
            0 if alike else 4 * classes * width**2 / self.lane_bytes,
        )
        chunks = max(-int(-count * least // 1), 1)
        return -(-count // chunks)


DEFAULT = Plan()
