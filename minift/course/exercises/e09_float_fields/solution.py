"""e09 Float fields and the cast to bfloat16: three whole numbers, and rounding as an addition."""

import torch
from torch import Tensor


def fields(pattern: Tensor, exponent_bits: int, mantissa_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """pattern int64 -> sign, exponent (as stored), mantissa, all int64."""
    sign = pattern >> (exponent_bits + mantissa_bits)
    exponent = (pattern >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = pattern & ((1 << mantissa_bits) - 1)
    return sign, exponent, mantissa


def decode(pattern: Tensor, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """pattern int64 -> what it means, float64."""
    sign, exponent, mantissa = fields(pattern, exponent_bits, mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    leading = (exponent > 0).double()
    power = (exponent.clamp(min=1) - bias).double()
    value = (leading + mantissa.double() / 2**mantissa_bits) * torch.exp2(power)
    special = torch.where(mantissa == 0, torch.inf, torch.nan).double()
    value = torch.where(exponent == (1 << exponent_bits) - 1, special, value)
    return torch.where(sign == 1, -value, value)


def to_bf16(x: Tensor) -> Tensor:
    """x float32 -> bfloat16 patterns, int64 in 0..65535, rounded to nearest, ties to even; every NaN is 0x7FC0."""
    pattern = x.view(torch.int32).long() & 0xFFFFFFFF
    # Half of the last bit that is kept, less one unless that bit is odd: a tie then goes to the even neighbour.
    last_bit = (pattern >> 16) & 1
    rounded = (pattern + 0x7FFF + last_bit) >> 16
    return torch.where(x.isnan(), 0x7FC0, rounded)
