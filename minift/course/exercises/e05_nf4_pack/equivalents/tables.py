"""Counts the middles below each value, packs with Python's own bytes, unpacks with a table of 256 pairs; float64."""

import torch


def encode(x, code, blocksize=64):
    line = x.flatten().double()
    block = torch.arange(len(line)) // blocksize
    absmax = torch.zeros(int(block.max()) + 1, dtype=torch.float64).scatter_reduce(0, block, line.abs(), "amax")
    middles = (code.double()[:-1] + code.double()[1:]) / 2
    stretched = middles * torch.where(absmax > 0, absmax, 1.0)[block, None]
    return (line[:, None] > stretched).sum(dim=1).to(torch.uint8), absmax.float()


def pack(codes):
    digits = codes.tolist() + [7] * (len(codes) % 2)
    return torch.tensor(list(bytes.fromhex("".join(f"{digit:x}" for digit in digits))), dtype=torch.uint8)


def unpack(packed, n):
    table = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    return table[packed.long()].flatten()[:n]


def dequantize(packed, absmax, n, code, blocksize=64):
    codes = unpack(packed, n)
    return (
        code.double()[codes.long()] * absmax.double()[torch.arange(n).div(blocksize, rounding_mode="floor")]
    ).float()
