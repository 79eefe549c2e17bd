"""Measures the distance to all 16 entries, block by block; makes bytes with a product, splits them with / and %."""

import torch


def encode(x, code, blocksize=64):
    codes, largest = [], []
    for piece in x.contiguous().view(-1).split(blocksize):
        top = piece.abs().max()
        ratio = piece * (1 / top) if top > 0 else torch.zeros_like(piece)
        codes.append((ratio[:, None] - code[None, :]).abs().argmin(dim=1))
        largest.append(top)
    return torch.cat(codes).byte(), torch.stack(largest)


def pack(codes):
    both = torch.full((len(codes) + len(codes) % 2,), 7, dtype=torch.uint8)
    both[: len(codes)] = codes
    return (both.view(-1, 2).int() * torch.tensor([16, 1])).sum(1).to(torch.uint8)


def unpack(packed, n):
    codes = torch.empty(2 * len(packed), dtype=torch.uint8)
    codes[::2] = packed // 16
    codes[1::2] = packed % 16
    return codes[:n].clone()


def dequantize(packed, absmax, n, code, blocksize=64):
    values = code[unpack(packed, n).int()]
    return torch.cat([piece * top for piece, top in zip(values.split(blocksize), absmax, strict=True)])
