"""e03 Blockwise int8: one line of values, cut every blocksize values, one absmax a piece."""

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize(x: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Returns (q int8 with the shape of x, absmax float32 (blocks,)); blocks run over the flattened tensor."""
    flat = x.reshape(-1)
    lacking = -flat.numel() % blocksize
    blocks = F.pad(flat, (0, lacking)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    divisor = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
    q = torch.round(127 * blocks / divisor.unsqueeze(1)).to(torch.int8)
    return q.view(-1)[: flat.numel()].view(x.shape), absmax


def dequantize(q: Tensor, absmax: Tensor, blocksize: int = 64) -> Tensor:
    """Returns what the codes stand for, float32 with the shape of q."""
    flat = q.reshape(-1)
    scale = absmax.repeat_interleave(blocksize)[: flat.numel()] / 127
    return (flat * scale).view(q.shape)
