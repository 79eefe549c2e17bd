"""Q(p) = sqrt(2) erfinv(2p - 1), where the sqrt(2) cancels; both sides from arange, already in order; in float32."""

import torch


def outermost(bits):
    half = 2.0**-bits / 2
    return 1.0 - half / 2 - 0.25 / (2**bits - 1)


def codebook(bits=4, offset=None):
    reach = 2 * (outermost(bits) if offset is None else offset) - 1
    n = 2 ** (bits - 1)
    right = torch.erfinv(reach * torch.arange(0, n + 1) / n)
    left = torch.erfinv(reach * torch.arange(n - 1, 0, -1) / (n - 1)).neg()
    entries = torch.cat((left, right))
    return entries / entries[-1]
