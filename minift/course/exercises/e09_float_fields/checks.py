"""e09: formats that torch has are read by torch, one that it has not by ldexp; casts are torch's and literal ones."""

import math

import torch

from minift.course.spec import Case, check

# Powers of two may come out of pow with some units of rounding in float64; the nearest mistake is a factor of two.
RTOL = 16 * torch.finfo(torch.float64).eps
NAMES = ("sign", "exponent", "mantissa")
FORMATS = {
    "fp32": (8, 23, torch.int32, torch.float32),
    "fp16": (5, 10, torch.int16, torch.float16),
    "bf16": (8, 7, torch.int16, torch.bfloat16),
    "fp8 e5m2": (5, 2, torch.int8, torch.float8_e5m2),
}


def read_by_torch(pattern: torch.Tensor, integer: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    width = torch.iinfo(integer).bits
    signed = torch.where(pattern >= 1 << (width - 1), pattern - (1 << width), pattern)
    return signed.to(integer).view(dtype).double()


def read_by_hand(sign: int, exponent: int, mantissa: int, exponent_bits: int, mantissa_bits: int) -> float:
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 2**exponent_bits - 1:
        value = math.nan if mantissa else math.inf
    else:
        value = math.ldexp(mantissa + (exponent > 0) * 2**mantissa_bits, max(exponent, 1) - bias - mantissa_bits)
    return -value if sign else value


def packed(sign: torch.Tensor, exponent: torch.Tensor, mantissa: torch.Tensor, e: int, m: int) -> torch.Tensor:
    return sign * 2 ** (e + m) + exponent * 2**m + mantissa


def random_fields(draw: torch.Generator, e: int, m: int, shape: tuple[int, ...], low: int, high: int):
    """Signs of both kinds, exponents from low to high, any mantissa."""
    sign = torch.randint(0, 2, shape, generator=draw)
    sign[0], sign[1] = 1, 0
    exponent = torch.randint(low, high + 1, shape, generator=draw)
    return sign, exponent, torch.randint(0, 2**m, shape, generator=draw)


@check(points=1)
def three_fields(draw):
    """fields takes any pattern apart: sign on top, exponent as it is stored, mantissa below."""
    for name, (e, m) in {"fp32": (8, 23), "fp16": (5, 10), "bf16": (8, 7), "6 and 9 bits": (6, 9)}.items():
        parts = random_fields(draw, e, m, (3, 7), 0, 2**e - 1)
        given = {"pattern": packed(*parts, e, m), "exponent_bits": e, "mantissa_bits": m}
        yield Case("fields", given, parts, names=NAMES, about=name)


def decoding(pattern: torch.Tensor, e: int, m: int, value: torch.Tensor, about: str) -> Case:
    negative = torch.signbit(value) & ~value.isnan()
    given = {"pattern": pattern, "exponent_bits": e, "mantissa_bits": m}
    return Case("decoded", given, (value, negative), rtol=RTOL, names=("value", "is negative"), about=about)


@check(points=1)
def normal_numbers(draw):
    """decode gives the value of normal numbers of any format: the leading 1 and the format's own bias."""
    for name, (e, m, integer, dtype) in FORMATS.items():
        pattern = packed(*random_fields(draw, e, m, (2, 9), 1, 2**e - 2), e, m)
        yield decoding(pattern, e, m, read_by_torch(pattern, integer, dtype), f"{name}: {e} and {m} bits")
    parts = random_fields(draw, 6, 9, (11,), 1, 62)
    rows = torch.stack(parts, 1).tolist()
    value = [read_by_hand(sign, exponent, mantissa, 6, 9) for sign, exponent, mantissa in rows]
    about = "6 and 9 bits, a format that torch does not have"
    yield decoding(packed(*parts, 6, 9), 6, 9, torch.tensor(value, dtype=torch.float64), about)


@check(points=1)
def ends_of_the_range(draw):
    """decode knows both zeros, subnormals, the largest finite number, infinity and NaN."""
    for name, (e, m, integer, dtype) in FORMATS.items():
        top, full = 2**e - 1, 2**m - 1
        ends = [(0, 0), (0, 1), (0, full), (1, 0), (top - 1, full), (top, 0), (top, 1), (top, full)]
        ends += [(0, int(mantissa)) for mantissa in torch.randint(1, 2**m, (5,), generator=draw)]
        exponent, mantissa = torch.tensor(ends).T
        both = [packed(torch.tensor(sign), exponent, mantissa, e, m) for sign in (0, 1)]
        pattern = torch.cat(both)
        about = f"{name}: zeros, subnormals, both sides of 2^{2 - 2 ** (e - 1)}, the largest, infinity, NaN"
        yield decoding(pattern, e, m, read_by_torch(pattern, integer, dtype), about)


def from_pattern(pattern: torch.Tensor) -> torch.Tensor:
    """The float32 numbers with these bits."""
    return torch.where(pattern >= 1 << 31, pattern - (1 << 32), pattern).to(torch.int32).view(torch.float32)


def cast_by_torch(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).view(torch.int16).long() & 0xFFFF


@check(points=1)
def nearest_even(draw):
    """to_bf16 rounds to the nearest bfloat16, ties to the even one, for both signs; a carry enters the exponent."""
    pattern = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3FFF8000, 0xBF817FFF, 0xC0A08000, 0xC0FFC000])
    expect = torch.tensor([0x3F80, 0x3F82, 0x3F81, 0x4000, 0xBF81, 0xC0A0, 0xC100])
    yield Case("to_bf16", {"x": from_pattern(pattern)}, expect, about="the numbers of the page, and negative ones")
    sign, exponent, upper = random_fields(draw, 8, 7, (6, 14), 1, 250)
    upper[-1] = 127
    # The middle exactly, next to it on both sides, nothing, everything, and anything.
    low = torch.tensor([0x8000, 0x8000, 0x7FFF, 0x8001, 0x0000, 0xFFFF]).repeat(14).reshape(14, 6).T
    low = torch.where(torch.arange(14) < 10, low, torch.randint(0, 1 << 16, (6, 14), generator=draw))
    upper[0, :5] = 2 * torch.arange(5) + 1
    upper[1, :5] = 2 * torch.arange(5)
    x = from_pattern(packed(sign, exponent, upper, 8, 7) * 65536 + low)
    yield Case("to_bf16", {"x": x}, cast_by_torch(x), about="random numbers; rows 0 and 1 begin with ties")
    yield Case("to_bf16", {"x": x.T}, cast_by_torch(x).T, about="the same, transposed")


# float32 pattern -> bfloat16 pattern
SPECIAL = {
    0x00000000: 0x0000, 0x80000000: 0x8000, 0x7F800000: 0x7F80, 0xFF800000: 0xFF80,
    0x7F800001: 0x7FC0, 0xFF800001: 0x7FC0, 0x7FC00000: 0x7FC0, 0xFFC12345: 0x7FC0, 0x7FFFFFFF: 0x7FC0,
    0xFFFFFFFF: 0x7FC0, 0x7F7F7FFF: 0x7F7F, 0x7F7F8000: 0x7F80, 0x7F7FFFFF: 0x7F80, 0xFF7FFFFF: 0xFF80,
    0x00000001: 0x0000, 0x80000001: 0x8000, 0x00008000: 0x0000, 0x00008001: 0x0001, 0x00018000: 0x0002,
    0x007FFFFF: 0x0080, 0x807F8000: 0x8080,
}  # fmt: skip


@check(points=1)
def specials_cast(draw):
    """to_bf16 keeps zeros, infinities and NaN what they are, rounds subnormals, and overflows to infinity."""
    pattern, expect = torch.tensor(list(SPECIAL)), torch.tensor(list(SPECIAL.values()))
    order = torch.randperm(len(pattern), generator=draw)
    about = "zeros, infinities, NaNs, subnormals, and around the largest finite number"
    yield Case("to_bf16", {"x": from_pattern(pattern[order])}, expect[order], about=about)
    sign, _, mantissa = random_fields(draw, 8, 23, (2, 9), 0, 0)
    x = from_pattern(packed(sign, torch.zeros_like(sign), mantissa, 8, 23))
    yield Case("to_bf16", {"x": x}, cast_by_torch(x), about="subnormal numbers")
