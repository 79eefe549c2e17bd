"""e04 The NF4 codebook: README.md says what to write. Check with: minift-course check e04"""

import torch
from torch import Tensor


def outermost(bits: int) -> float:
    """Returns the probability whose quantile becomes the largest entry."""
    # TODO
    raise NotImplementedError


def codebook(bits: int = 4, offset: float | None = None) -> Tensor:
    """Returns the 2 ** bits entries, ascending, float32, from -1 to 1."""
    # TODO: the two sides of zero, zero itself, sorted, divided by the largest
    raise NotImplementedError
