"""e09: shows the sign of every decoded number beside its value, because -0.0 equals 0.0."""

import torch


def decoded(student, pattern, exponent_bits, mantissa_bits):
    """The values, and which of them are negative; the sign of a NaN does not matter."""
    value = student.decode(pattern, exponent_bits, mantissa_bits)
    if not isinstance(value, torch.Tensor):
        return value
    return value, torch.signbit(value) & ~torch.isnan(value)
