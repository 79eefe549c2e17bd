"""Fields cut out of a text of binary digits, one number at a time; the cast compares the lower half with the middle."""

import math

import torch


def cut(number, exponent_bits, mantissa_bits):
    digits = format(number, f"0{1 + exponent_bits + mantissa_bits}b")
    return int(digits[0]), int(digits[1 : 1 + exponent_bits], 2), int(digits[1 + exponent_bits :], 2)


def meaning(sign, exponent, mantissa, exponent_bits, mantissa_bits):
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 2**exponent_bits - 1:
        size = math.nan if mantissa else math.inf
    elif exponent == 0:
        size = math.ldexp(mantissa, 1 - bias - mantissa_bits)
    else:
        size = math.ldexp(mantissa + 2**mantissa_bits, exponent - bias - mantissa_bits)
    return -size if sign else size


def fields(pattern, exponent_bits, mantissa_bits):
    rows = [cut(number, exponent_bits, mantissa_bits) for number in pattern.flatten().tolist()]
    return tuple(torch.tensor(column).view(pattern.shape) for column in zip(*rows, strict=True))


def decode(pattern, exponent_bits, mantissa_bits):
    widths = exponent_bits, mantissa_bits
    values = [meaning(*cut(number, *widths), *widths) for number in pattern.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).view(pattern.shape)


def to_bf16(x):
    halves = x.contiguous().view(torch.int16).view(*x.shape, 2).long() % 65536
    low, high = halves[..., 0], halves[..., 1]
    up = (low > 0x8000) | ((low == 0x8000) & (high % 2 == 1))
    nan = (high % 0x8000 > 0x7F80) | ((high % 0x8000 == 0x7F80) & (low > 0))
    return torch.where(nan, torch.full_like(high, 0x7FC0), high + up.long())
