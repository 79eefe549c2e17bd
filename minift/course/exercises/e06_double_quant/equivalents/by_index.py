"""No padding: numbers every scale's block; multiplies the middles by nested instead of dividing; counts bits."""

import torch


def quantize_scales(absmax, levels, blocksize=256):
    block = torch.arange(absmax.shape[0]).div(blocksize, rounding_mode="floor")
    offset = torch.mean(absmax)
    away = absmax.sub(offset)
    nested = torch.zeros(int(block[-1]) + 1).index_reduce(0, block, away.abs(), "amax", include_self=True)
    reach = nested[block].masked_fill(nested[block] == 0, 1.0)
    middles = 0.5 * levels[:-1] + 0.5 * levels[1:]
    q = (away[:, None] > reach[:, None] * middles[None, :]).sum(1)
    return q.to(torch.uint8), nested, offset


def dequantize_scales(q, nested, offset, levels, blocksize=256):
    block = torch.arange(q.shape[0]) // blocksize
    return torch.addcmul(offset.expand(q.shape[0]), torch.take(levels, q.long()), nested[block])


def stored_bytes(n, blocksize=64, nested_blocksize=256):
    scales = (n + blocksize - 1) // blocksize
    nested = (scales + nested_blocksize - 1) // nested_blocksize
    bits = 4 * (n + n % 2) + 8 * scales + 32 * nested + 32
    return bits // 8
