"""e09 Float fields and the cast to bfloat16: README.md says what to write. Check with: minift-course check e09"""

import torch
from torch import Tensor


def fields(pattern: Tensor, exponent_bits: int, mantissa_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """pattern int64 -> sign, exponent (as stored), mantissa, all int64."""
    # TODO
    raise NotImplementedError


def decode(pattern: Tensor, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """pattern int64 -> what it means, float64."""
    # TODO: normal, subnormal, infinity, NaN
    raise NotImplementedError


def to_bf16(x: Tensor) -> Tensor:
    """x float32 -> bfloat16 patterns, int64 in 0..65535, rounded to nearest, ties to even; every NaN is 0x7FC0."""
    # TODO
    raise NotImplementedError
