"""e20 LoRA forward and backward by hand: README.md says what to write. Check with: minift-course check e20"""

import torch
from torch import Tensor


def init(in_features: int, out_features: int, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns a (r, in_features) and b (out_features, r) of a new adapter."""
    # TODO: one of them is uniform in +-1 / sqrt(in_features), the other is zero
    raise NotImplementedError


def forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float, mask: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in) -> y (..., out); mask (..., in) multiplies what goes into the adapter."""
    # TODO
    raise NotImplementedError


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients (dx, da, db), each with the shape of what it belongs to."""
    # TODO
    raise NotImplementedError
