"""e04 The NF4 codebook: quantiles of the normal distribution, seven below zero, eight above, and zero itself."""

import torch
from torch import Tensor


def outermost(bits: int) -> float:
    """Returns the probability whose quantile becomes the largest entry."""
    codes = 2**bits
    return 1 - (1 / (2 * codes) + 1 / (2 * (codes - 1))) / 2


def codebook(bits: int = 4, offset: float | None = None) -> Tensor:
    """Returns the 2 ** bits entries, ascending, float32, from -1 to 1."""
    offset = outermost(bits) if offset is None else offset
    up = 2 ** (bits - 1)
    down = up - 1
    above = torch.special.ndtri(torch.linspace(offset, 0.5, up + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, down + 1, dtype=torch.float64)[:-1])
    entries = torch.cat([below, above.new_zeros(1), above]).sort().values
    return (entries / entries.max()).float()
