"""One entry at a time, with the quantile function of the standard library and exact fractions."""

from fractions import Fraction
from statistics import NormalDist

import torch


def outermost(bits):
    return float(1 - (Fraction(1, 2 ** (bits + 1)) + Fraction(1, 2 ** (bits + 1) - 2)) / 2)


def codebook(bits=4, offset=None):
    offset = offset or outermost(bits)
    top = NormalDist().inv_cdf(offset)
    entries = [0.0]
    for sign, count in ((1, 2 ** (bits - 1)), (-1, 2 ** (bits - 1) - 1)):
        for i in range(count):
            p = offset + (0.5 - offset) * i / count
            entries.append(sign * NormalDist().inv_cdf(p) / top)
    return torch.tensor(sorted(entries), dtype=torch.float32)
