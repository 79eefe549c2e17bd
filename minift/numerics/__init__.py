"""How one number is stored: the bits of floating-point types, rounding to fewer of them, and integers with a scale."""

from minift.numerics.affine import (
    Histogram,
    Quantized,
    histogram_quantize,
    histogram_quantize_book,
    quantize_absmax,
    quantize_affine,
    quantize_with,
)
from minift.numerics.dtypes import fast_dtype
from minift.numerics.floats import FORMATS, Bits, FloatFormat, bits, decode_bits, dtype_table, dtype_table_text
from minift.numerics.rounding import round_decimal, round_nearest, rounding_walk, stochastic_round, truncate

__all__ = [
    "FORMATS",
    "Bits",
    "FloatFormat",
    "Histogram",
    "Quantized",
    "bits",
    "decode_bits",
    "dtype_table",
    "dtype_table_text",
    "fast_dtype",
    "histogram_quantize",
    "histogram_quantize_book",
    "quantize_absmax",
    "quantize_affine",
    "quantize_with",
    "round_decimal",
    "round_nearest",
    "rounding_walk",
    "stochastic_round",
    "truncate",
]
