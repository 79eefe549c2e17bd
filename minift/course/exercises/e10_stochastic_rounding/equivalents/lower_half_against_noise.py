"""Splits the pattern in two halves and compares the lower one with noise made from torch.rand; no carry by addition."""

import torch


def stochastic_round(x, generator):
    halves = x.contiguous().view(torch.int16).reshape(*x.shape, 2).int() & 0xFFFF
    low, high = halves.unbind(-1)
    noise = torch.rand(x.numel(), generator=generator, dtype=torch.float64).reshape(x.shape) * 65536
    high = high + (noise < low).int()
    y = torch.where(high > 0x7FFF, high - 0x10000, high).to(torch.int16).view(torch.bfloat16)
    y[x.isnan()] = torch.nan
    return y
