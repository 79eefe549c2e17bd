"""Reads the magnitudes off the byte itself: the leading one says which decade, the bits after it which bin; argmin."""

import torch


def dynamic_map(signed=True):
    values = {0.0, 1.0}
    for byte in range(1, 128 if signed else 256):
        # Unsigned bytes have no sign bit, so one bit more for the bin; byte 1 would be a decade without bins.
        decade = byte.bit_length() - 1
        bins = 1 << decade
        middle = 0.1 + 0.9 * (byte - bins + 0.5) / bins
        if signed:
            values |= {middle * 10.0 ** (decade - 6), -middle * 10.0 ** (decade - 6)}
        elif decade > 0:
            values.add(middle * 10.0 ** (decade - 7))
    return torch.tensor(sorted(values), dtype=torch.float64).float()


def encode(x, code):
    return (x.unsqueeze(-1) - code).abs().argmin(-1).to(torch.uint8)
