"""e06 Double quantization: the scales, less their mean, in 8 bits, with one scale for 256 of them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize_scales(absmax: Tensor, levels: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (q uint8 (m,), nested float32 (blocks,), offset float32 ())."""
    m = len(absmax)
    offset = absmax.mean()
    centered = absmax - offset
    blocks = F.pad(centered, (0, -m % blocksize)).view(-1, blocksize)
    nested = blocks.abs().amax(dim=1)
    divisor = torch.where(nested == 0, torch.ones_like(nested), nested)
    ratio = blocks / divisor.unsqueeze(1)
    q = torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2)
    return q.view(-1)[:m].to(torch.uint8), nested, offset


def dequantize_scales(q: Tensor, nested: Tensor, offset: Tensor, levels: Tensor, blocksize: int = 256) -> Tensor:
    """Returns the scales that the codes stand for, float32 (m,)."""
    centered = levels[q.long()] * nested.repeat_interleave(blocksize)[: len(q)]
    return centered + offset


def stored_bytes(n: int, blocksize: int = 64, nested_blocksize: int = 256) -> int:
    """Returns the bytes of n weights: packed codes, 8-bit scales, nested scales, offset."""
    packed = -(-n // 2)
    scales = -(-n // blocksize)
    nested = -(-scales // nested_blocksize)
    return packed + scales + 4 * nested + 4
