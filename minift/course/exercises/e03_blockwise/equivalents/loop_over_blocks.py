"""Splits the line into pieces and goes through them one by one; in float64."""

import torch


def quantize(x, blocksize=64):
    codes, largest = [], []
    for piece in x.contiguous().view(-1).split(blocksize):
        top = piece.abs().max()
        factor = 0.0 if top == 0 else 127.0 / float(top)
        codes.append((piece.double() * factor).round().char())
        largest.append(top)
    return torch.cat(codes).reshape(x.shape), torch.stack(largest)


def dequantize(q, absmax, blocksize=64):
    pieces = q.contiguous().view(-1).split(blocksize)
    values = [piece.double() * float(top) / 127 for piece, top in zip(pieces, absmax, strict=True)]
    return torch.cat(values).float().reshape(q.shape)
