"""Multiplies by 1 / scale, clamps the steps to their own range, and decodes with a table of 256."""

import torch


def parameters(x):
    zero = torch.zeros((), dtype=x.dtype)
    high, low = torch.maximum(x.max(), zero), torch.minimum(x.min(), zero)
    if not x.any():
        return torch.ones((), dtype=x.dtype), torch.zeros((), dtype=torch.int32)
    scale = (high - low) * (1 / 255)
    return scale, 255 - (high / scale).round().int()


def quantize(x, scale, zero_point):
    below = int(zero_point)
    steps = (x * (1 / scale)).round().clamp(-below, 255 - below)
    return (steps.int() + below).to(torch.uint8)


def dequantize(q, scale, zero_point):
    table = (torch.arange(256) - zero_point).to(scale.dtype) * scale
    return table[q.long()]
