"""e01 Absmax int8: one number per row decides how the row is stretched onto -127..127."""

import torch
from torch import Tensor


def quantize(x: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns (q int8 with the shape of x, scale); one scale for everything, or one for each slice along dim."""
    magnitude = x.abs()
    absmax = magnitude.amax() if dim is None else magnitude.amax(dim, keepdim=True)
    scale = absmax / 127
    scale = torch.where(absmax == 0, torch.ones_like(scale), scale)
    return torch.round(x / scale).to(torch.int8), scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Returns what the codes stand for, in the dtype of scale."""
    return q.to(scale.dtype) * scale
