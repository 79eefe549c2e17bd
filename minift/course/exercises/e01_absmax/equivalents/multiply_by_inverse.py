"""Multiplies by 127 / absmax instead of dividing, and clamps, which is not needed."""

import torch


def quantize(x, dim=None):
    absmax = x.abs().max() if dim is None else x.abs().max(dim=dim, keepdim=True).values
    absmax = absmax.masked_fill(absmax == 0, 127.0)
    q = (x * (127.0 / absmax)).round().clamp(-127, 127)
    return q.to(torch.int8), absmax / 127.0


def dequantize(q, scale):
    return scale * q
