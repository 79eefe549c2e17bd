"""Goes through the blocks one by one in float64, finds the nearest level by its distance, counts with math.ceil."""

import math

import torch


def quantize_scales(absmax, levels, blocksize=256):
    offset = absmax.double().sum() / absmax.numel()
    codes, tops = [], []
    for piece in (absmax.double() - offset).split(blocksize):
        top = max(-piece.min(), piece.max())
        ratio = piece / top if top > 0 else piece
        codes.append((ratio.unsqueeze(1) - levels.double()).abs().min(dim=1).indices)
        tops.append(top)
    return torch.cat(codes).byte(), torch.stack(tops).float(), offset.float()


def dequantize_scales(q, nested, offset, levels, blocksize=256):
    pieces = [levels[piece.int()] * top + offset for piece, top in zip(q.split(blocksize), nested, strict=True)]
    return torch.cat(pieces)


def stored_bytes(n, blocksize=64, nested_blocksize=256):
    blocks = math.ceil(n / blocksize)
    return math.ceil(n / 2) + blocks + 4 * (math.ceil(blocks / nested_blocksize) + 1)
