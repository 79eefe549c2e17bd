"""e05 NF4: the nearest of 16 entries, two of their numbers in a byte, and back."""

import torch
import torch.nn.functional as F
from torch import Tensor

FILLER = 7  # the number of 0.0 in NF4


def encode(x: Tensor, code: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Returns (codes uint8 (n,), absmax float32 (blocks,)); blocks run over the flattened tensor."""
    flat = x.reshape(-1)
    blocks = F.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    divisor = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
    middles = (code[1:] + code[:-1]) / 2
    codes = torch.bucketize(blocks / divisor.unsqueeze(1), middles)
    return codes.view(-1)[: flat.numel()].to(torch.uint8), absmax


def pack(codes: Tensor) -> Tensor:
    """Returns the bytes, uint8 (ceil(n / 2),): even elements in the high nibble, an odd number filled up with 7."""
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_tensor([FILLER])])
    high, low = codes[0::2], codes[1::2]
    return (high << 4) | low


def unpack(packed: Tensor, n: int) -> Tensor:
    """Returns the first n codes, uint8."""
    high, low = packed >> 4, packed & 15
    return torch.stack([high, low], dim=1).view(-1)[:n]


def dequantize(packed: Tensor, absmax: Tensor, n: int, code: Tensor, blocksize: int = 64) -> Tensor:
    """Returns the n values that the bytes stand for, float32."""
    scale = absmax.repeat_interleave(blocksize)[:n]
    return code[unpack(packed, n).long()] * scale
