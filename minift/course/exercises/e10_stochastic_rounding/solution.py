"""e10 Stochastic rounding to bfloat16: random bits below the last bit that is kept, then cut off."""

import torch
from torch import Tensor


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """x float32 -> bfloat16 of the same shape: up or down by chance, so that the mean is x."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32)
    pattern = x.view(torch.int32) + noise
    # The lower 16 bits go; what is left is a bfloat16, so the conversion at the end rounds nothing.
    rounded = (pattern & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
