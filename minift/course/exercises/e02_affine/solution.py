"""e02 Affine uint8: the range that occurs onto 0..255, with a code of its own for 0.0."""

import torch
from torch import Tensor


def parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale, in the dtype of x, and zero_point, int32, both of shape ()."""
    low = x.amin().clamp(max=0)
    high = x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(high == low, torch.ones_like(scale), scale)
    zero_point = torch.round(-low / scale).to(torch.int32)
    return scale, zero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns the codes, uint8 with the shape of x."""
    q = torch.round(x / scale) + zero_point
    return q.clamp(0, 255).to(torch.uint8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns what the codes stand for, in the dtype of scale."""
    steps = q.to(torch.int32) - zero_point
    return steps.to(scale.dtype) * scale
