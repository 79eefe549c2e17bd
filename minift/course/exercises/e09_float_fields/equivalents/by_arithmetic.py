"""No bit operation: division and remainder for the fields, ldexp for the value, frexp and torch.round for the cast."""

import torch


def fields(pattern, exponent_bits, mantissa_bits):
    rest, mantissa = pattern // 2**mantissa_bits, pattern % 2**mantissa_bits
    return rest // 2**exponent_bits, rest % 2**exponent_bits, mantissa


def decode(pattern, exponent_bits, mantissa_bits):
    sign, exponent, mantissa = fields(pattern, exponent_bits, mantissa_bits)
    bias = 2 ** (exponent_bits - 1) - 1
    small = mantissa.double() * 2.0 ** (1 - bias - mantissa_bits)
    # The whole number 1m of a normal one, in units of its last place.
    units = (mantissa + 2**mantissa_bits).double()
    value = torch.where(exponent == 0, small, torch.ldexp(units, (exponent - bias - mantissa_bits).double()))
    last = exponent == 2**exponent_bits - 1
    value[last & (mantissa == 0)] = float("inf")
    value[last & (mantissa != 0)] = float("nan")
    return value * (1 - 2 * sign)


def to_bf16(x):
    size = x.double().abs()
    _, exponent = torch.frexp(size)
    # Eight significant bits, but never finer than the quantum of the subnormals.
    quantum = torch.exp2((exponent.clamp(min=-125) - 8).double())
    rounded = torch.where(torch.isinf(size), size, torch.round(size / quantum) * quantum).float()
    upper = rounded.view(torch.int32).long() // 65536 + 32768 * torch.signbit(x)
    return upper.masked_fill(x != x, 0x7FC0)
