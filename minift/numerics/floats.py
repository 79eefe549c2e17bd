"""Floating-point numbers, bit by bit, from exact integer arithmetic.

A floating-point number is a sign, an exponent and a fraction, written side by side:

    bfloat16    0 10000011 0111011          23.375 = (-1)^0 x 2^(131 - 127) x (1 + 59/128)
                s exponent fraction

    name             bits   exponent  fraction   bias   largest
    float32            32          8        23    127   3.4e38
    float16            16          5        10     15   65504
    bfloat16           16          8         7    127   3.4e38     float32 without the lower half of its bits
    float8_e4m3fn       8          4         3      7   448        no infinity, one NaN for each sign
    float8_e5m2         8          5         2     15   57344      float16 without the lower half of its bits

With E the exponent field, F the fraction field and f its width:

    E = 0              value = 2^(1 - bias) x F/2^f             zero and the subnormal numbers, evenly spaced
    E between          value = 2^(E - bias) x (1 + F/2^f)       the normal numbers
    E all ones         infinity if F = 0, else NaN              (e4m3fn: NaN only if F is all ones, too)

Encoding is one rounding. |x| is divided by its *quantum*, the distance between neighbours at this magnitude, and
rounded to an integer, ties to even. Adding that integer to the exponent field shifted left gives the pattern, since a
carry out of the fraction lands in the exponent, which is what rounding up to the next power of two means. A pattern
beyond the largest finite one is an overflow: infinity, or NaN in e4m3fn. (The OCP text allows e4m3fn to saturate, too:
torch 2.13 makes 448 of all that is larger, infinity included; older versions give NaN as here.)

NaN keeps its sign, the upper bits of its payload, and has its quiet bit (the highest fraction bit) set, as processors
do it. torch does so for float16 only: on a CPU it makes any NaN 0x7FC0 or 0xFFFF in bfloat16, and 0x7F or 0xFF in
float8_e5m2.

Left out: traps, flags, the other rounding directions (some are in rounding.py). Sources: IEEE 754-2019; the OCP 8-bit
floating point specification, revision 1.0.
"""

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """How a number is spread over sign, exponent and fraction bits.

    Attributes:
        name: torch's name of the type.
        exponent_bits, fraction_bits: widths of the two fields; the sign takes one bit more.
        has_infinity: False for e4m3fn, which spends all but one of those patterns on finite numbers.
    """

    name: str
    exponent_bits: int
    fraction_bits: int
    has_infinity: bool = True

    @property
    def width(self) -> int:
        """Bits in all."""
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def overflow(self) -> int:
        """The pattern after the largest finite one: infinity, or the only NaN."""
        all_ones = 2 ** (self.width - 1) - 1
        return all_ones - (2**self.fraction_bits - 1) if self.has_infinity else all_ones

    @property
    def max(self) -> float:
        """The largest finite number."""
        return self.decode(self.overflow - 1)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with all its fraction bits."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number, the spacing of all numbers below `smallest_normal`."""
        return 2.0 ** (1 - self.bias - self.fraction_bits)

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next larger number."""
        return 2.0**-self.fraction_bits

    @property
    def decimal_digits(self) -> int:
        """How many significant digits a decimal number may have to survive being stored and printed again."""
        return math.floor(self.fraction_bits * math.log10(2))

    def encode(self, x: float) -> int:
        """The pattern of the number nearest to x, ties to the even pattern.

        Args:
            x: an int or float of any size; both are exact fractions whose denominator is a power of two.
        """
        if isinstance(x, float) and math.isnan(x):
            return self._encode_nan(x)
        sign = int(math.copysign(1.0, x) < 0) if isinstance(x, float) else int(x < 0)
        if isinstance(x, float) and math.isinf(x):
            return sign << (self.width - 1) | self.overflow
        numerator, denominator = abs(x).as_integer_ratio()
        binade = numerator.bit_length() - denominator.bit_length()  # 2^binade <= |x| < 2^(binade + 1), or x is 0
        # Below the smallest normal number the quantum stops shrinking.
        exponent = max(binade, 1 - self.bias) if numerator else 1 - self.bias
        quanta = _round_half_even(numerator, denominator, exponent - self.fraction_bits)
        # A normal number's quanta hold its leading one, which raises the exponent field by the 1 that is missing here.
        pattern = ((exponent + self.bias - 1) << self.fraction_bits) + quanta
        return sign << (self.width - 1) | min(pattern, self.overflow)

    def decode(self, pattern: int) -> float:
        """The number of a pattern, exactly.

        Raises:
            ValueError: the pattern is negative or has more bits than the type.
        """
        sign, exponent, fraction = self.fields(pattern)
        magnitude = pattern & (2 ** (self.width - 1) - 1)
        if magnitude > self.overflow or (magnitude == self.overflow and not self.has_infinity):
            payload = fraction << (52 - self.fraction_bits)
            return struct.unpack(">d", struct.pack(">Q", sign << 63 | 0x7FF << 52 | payload))[0]
        if magnitude == self.overflow:
            return -math.inf if sign else math.inf
        significand = fraction + (2**self.fraction_bits if exponent else 0)
        value = math.ldexp(significand, max(exponent, 1) - self.bias - self.fraction_bits)
        return -value if sign else value

    def fields(self, pattern: int) -> tuple[int, int, int]:
        """Sign, exponent field and fraction field of a pattern."""
        if not 0 <= pattern < 2**self.width:
            raise ValueError(f"{pattern} is no pattern of {self.name}: give 0 to {2**self.width - 1}")
        rest, fraction = divmod(pattern, 2**self.fraction_bits)
        sign, exponent = divmod(rest, 2**self.exponent_bits)
        return sign, exponent, fraction

    def _encode_nan(self, x: float) -> int:
        (double,) = struct.unpack(">Q", struct.pack(">d", x))
        quiet = 1 << (self.fraction_bits - 1)
        payload = (double & (2**52 - 1)) >> (52 - self.fraction_bits)
        # Without an infinity the pattern of all ones is the only NaN, and `overflow` already is all ones.
        return double >> 63 << (self.width - 1) | self.overflow | quiet | payload


def _round_half_even(numerator: int, denominator: int, exponent: int) -> int:
    """numerator / denominator / 2^exponent, rounded to an integer, ties to even."""
    if exponent < 0:
        numerator <<= -exponent
    else:
        denominator <<= exponent
    quotient, remainder = divmod(numerator, denominator)
    return quotient + (2 * remainder + (quotient & 1) > denominator)


FORMATS = {
    fmt.name: fmt
    for fmt in [
        FloatFormat("float32", 8, 23),
        FloatFormat("float16", 5, 10),
        FloatFormat("bfloat16", 8, 7),
        FloatFormat("float8_e4m3fn", 4, 3, has_infinity=False),
        FloatFormat("float8_e5m2", 5, 2),
    ]
}
INTEGERS = {"int8": (-128, 127), "uint8": (0, 255)}


@dataclass(frozen=True)
class Bits:
    """A stored number. `print` draws its fields and the formula that gives its value.

    Attributes:
        name: of the type.
        value: the number that is stored: a float, or an int for int8 and uint8.
        pattern: its bits read as an unsigned integer.
        sign, exponent, fraction: its fields, as strings of 0 and 1. Integers have no exponent, and uint8 has no sign.
    """

    name: str
    value: float
    pattern: int
    sign: str
    exponent: str
    fraction: str

    def __str__(self) -> str:
        fields = {"sign": self.sign, "exponent": self.exponent, "fraction": self.fraction}
        if self.name in INTEGERS:
            fields = {"sign": self.sign, "integer": self.fraction}
        shown = {name: text for name, text in fields.items() if text}
        widths = [max(len(name), len(text)) for name, text in shown.items()]
        texts = "  ".join(text.ljust(w) for text, w in zip(shown.values(), widths, strict=True))
        names = "  ".join(name.ljust(w) for name, w in zip(shown, widths, strict=True))
        formula = _integer_formula(self) if self.name in INTEGERS else _float_formula(self)
        return f"{self.name}\n  {texts.rstrip()}\n  {names.rstrip()}\n  {formula}"


def _float_formula(bits: Bits) -> str:
    fmt, exponent, fraction = FORMATS[bits.name], int(bits.exponent, 2), int(bits.fraction, 2)
    if not math.isfinite(bits.value):
        return f"exponent and fraction say {bits.value}"
    power = f"2^({exponent} - {fmt.bias})" if exponent else f"2^(1 - {fmt.bias})"
    return f"(-1)^{bits.sign} x {power} x ({int(exponent > 0)} + {fraction}/{2**fmt.fraction_bits}) = {bits.value!r}"


def _integer_formula(bits: Bits) -> str:
    rest = int(bits.fraction, 2)
    return f"-128 x {bits.sign} + {rest} = {bits.value}" if bits.sign else f"{rest} = {bits.value}"


def bits(x: float | Tensor, dtype: torch.dtype | str) -> Bits:
    """Store x in a type, rounded to nearest, and show the bits.

    Args:
        x: a number or a tensor with one element.
        dtype: a type of `FORMATS`, int8 or uint8, by torch's name or as torch.dtype.

    Raises:
        ValueError: an unknown type; x is no single number; an integer type cannot hold x.
    """
    name = _type_name(dtype)
    if isinstance(x, Tensor) and x.numel() != 1:
        raise ValueError(f"bits shows one number, got a tensor of shape {tuple(x.shape)}: pick an element")
    number = x.item() if isinstance(x, Tensor) else x
    if name in FORMATS:
        return _from_pattern(FORMATS[name].encode(number), name)
    lowest, highest = INTEGERS[name]
    if not lowest <= number <= highest or number != int(number):
        raise ValueError(f"{name} cannot hold {number}: give a whole number from {lowest} to {highest}")
    return _from_pattern(int(number) & 0xFF, name)


def decode_bits(text: str, dtype: torch.dtype | str) -> float:
    """The number that a row of bits stands for: an int for int8 and uint8, else a float.

    Args:
        text: all bits of the type, highest first; spaces and underscores between them are ignored.
        dtype: as in `bits`.

    Raises:
        ValueError: an unknown type, another character, or not as many bits as the type has.
    """
    name, digits = _type_name(dtype), text.replace(" ", "").replace("_", "")
    width = FORMATS[name].width if name in FORMATS else 8
    if set(digits) - {"0", "1"} or len(digits) != width:
        raise ValueError(f"{text!r} is no {name}: give {width} characters 0 or 1")
    return _from_pattern(int(digits, 2), name).value


def _from_pattern(pattern: int, name: str) -> Bits:
    if name in FORMATS:
        fmt = FORMATS[name]
        text, value, sign_bits, exponent_bits = f"{pattern:0{fmt.width}b}", fmt.decode(pattern), 1, fmt.exponent_bits
    else:
        sign_bits, exponent_bits = int(name == "int8"), 0
        # Two's complement: the highest bit counts -128 instead of +128.
        text, value = f"{pattern:08b}", pattern - 256 * (pattern >> 7) * sign_bits
    fraction_start = sign_bits + exponent_bits
    return Bits(name, value, pattern, text[:sign_bits], text[sign_bits:fraction_start], text[fraction_start:])


def _type_name(dtype: torch.dtype | str) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in FORMATS and name not in INTEGERS:
        raise ValueError(f"unknown number type {name!r}: choose one of {', '.join([*FORMATS, *INTEGERS])}")
    return name


def dtype_table() -> list[dict[str, str | int | float]]:
    """One row for each type of `FORMATS`: widths, range, precision. `pandas.DataFrame` takes the list as it is."""
    return [
        {
            "name": fmt.name, "bits": fmt.width, "sign": 1, "exponent": fmt.exponent_bits,
            "fraction": fmt.fraction_bits, "max": fmt.max, "smallest normal": fmt.smallest_normal,
            "smallest subnormal": fmt.smallest_subnormal, "epsilon": fmt.epsilon, "decimal digits": fmt.decimal_digits,
        }
        for fmt in FORMATS.values()
    ]  # fmt: skip


def dtype_table_text() -> str:
    """`dtype_table` for the terminal: a line of names and a line for each type."""
    rows = dtype_table()
    cells = [list(rows[0]), *([f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)
