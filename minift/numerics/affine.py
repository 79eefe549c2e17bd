"""Quantization in a nutshell: a tensor as small integers and the step between them.

    codes  = clamp(round(x / scale) + zero_point, lowest, highest)          x' = (codes - zero_point) x scale

**Absmax** is symmetric around zero, needs no zero point and uses the codes -127 .. 127 of int8:

    scale = max|x| / (2^(bits-1) - 1),   zero_point = 0

**Affine** (min-max) spends all codes on the range that occurs, which pays when it is lopsided. The zero point is the
code of 0, so that zero stays exactly zero (padding, ReLU, pruned weights):

    -30        0                      100           scale = 130 / 255 = 0.51
     |---------|-----------------------|
     0        59                      255           zero_point = round(30 / 0.51) = 59

The error is at most half a step inside the range; values outside *saturate* at its ends. One scale for the whole tensor
lets one large value widen every step, so each row or column can have its own. Blocks of 64 or 256 values are the next
refinement (minift/quant).

**Histogram binning**, where the book starts, cuts the range into 2^bits bins and stores the number of the bin. What a
bin stands for decides about the error: its middle is off by half a width at most, its left edge by a whole one.
`histogram_quantize` takes the middle; `histogram_quantize_book` follows the book's text (left edge) and keeps two
defects of it that are worth knowing:

- the edges are compared with <, so the smallest value lies in no bin and gets index -1;
- the width is the difference of two neighbouring edges, rounded to fp32 next to much larger numbers. With 65,536 bins
  three digits of it are left, and multiplied by the index the error grows to 38 times that of the exact width, or 77
  times that of the middle.

Left out: scales chosen by anything but the extremes (percentiles, least squares), integer arithmetic on the codes.
Source: Jacob et al., arXiv 1712.05877; Godoy, A Hands-On Guide to Fine-Tuning LLMs, chapter 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Division by the scale of an all-zero tensor must not make NaN, and a subnormal scale would be too coarse to divide by.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Quantized:
    """Codes and what they stand for.

    Attributes:
        codes: int8, uint8, int16 or int32, the shape of the tensor.
        scale: the step between neighbouring codes, fp32, of a shape that broadcasts with the codes: [] for a whole
            tensor, [rows, 1] or [1, columns].
        zero_point: the code of zero, int32, of the shape of the scale.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        """(codes - zero_point) x scale, fp32."""
        return (self.codes.int() - self.zero_point).float() * self.scale


@dataclass(frozen=True, eq=False)
class Histogram:
    """Numbers of bins and where the bins lie.

    Attributes:
        codes: int32, the shape of the tensor.
        first: the left edge of bin 0, fp32 [].
        width: of a bin, fp32 [].
        position: of the value of a bin inside it: 0.5 its middle, 0 its left edge.
    """

    codes: Tensor
    first: Tensor
    width: Tensor
    position: float

    def dequantize(self) -> Tensor:
        """(codes + position) x width + first, fp32."""
        return (self.codes.float() + self.position) * self.width + self.first


def quantize_absmax(x: Tensor, bits: int = 8, dim: int | None = None) -> Quantized:
    """Quantize symmetrically: the largest magnitude becomes the largest code.

    Args:
        x: floating point, finite, not empty; computed in fp32.
        bits: 2 to 16. Codes are int8 up to 8 bits, else int16.
        dim: the dimension that keeps a scale for each of its entries; for a weight [out, in] 0 gives one for each row,
            1 one for each column. None: one scale for the whole tensor.
    """
    _check(x, bits, dim)
    x = x.detach().float()
    scale = (_extreme(x.abs(), dim, torch.amax) / (2 ** (bits - 1) - 1)).clamp(min=SMALLEST_SCALE)
    return quantize_with(x, scale, torch.zeros_like(scale, dtype=torch.int32), bits, signed=True)


def quantize_affine(x: Tensor, bits: int = 8, signed: bool = False, dim: int | None = None) -> Quantized:
    """Quantize the range from the smallest to the largest value, widened to include zero.

    Args:
        x, bits, dim: as in `quantize_absmax`.
        signed: codes from -2^(bits-1), int8 or int16, instead of from 0, uint8 or int32 (torch.uint16 lacks most
            operations).
    """
    _check(x, bits, dim)
    x = x.detach().float()
    low, high = _extreme(x, dim, torch.amin).clamp(max=0), _extreme(x, dim, torch.amax).clamp(min=0)
    levels = 2**bits - 1
    scale = (high / levels - low / levels).clamp(min=SMALLEST_SCALE)  # high - low could overflow
    lowest, _ = _code_range(bits, signed)
    zero_point = (lowest - low / scale).round().to(torch.int32)
    return quantize_with(x, scale, zero_point, bits, signed)


def quantize_with(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8, signed: bool = False) -> Quantized:
    """Quantize with a scale and zero point known from other data; what lies outside their range saturates.

    Args:
        x: floating point, finite.
        scale: fp32, positive, and zero_point: int32, both of shapes that broadcast with x.
        bits, signed: as in `quantize_affine`.
    """
    lowest, highest = _code_range(bits, signed)
    codes = ((x.float() / scale).round() + zero_point).clamp(lowest, highest)
    return Quantized(codes.to(_code_dtype(bits, signed)), scale, zero_point)


def histogram_quantize(x: Tensor, bits: int) -> Histogram:
    """Bins of equal width from the smallest to the largest value; a bin stands for its middle.

    Args:
        x: floating point, finite, not empty; computed in fp32.
        bits: 2 to 16.
    """
    _check(x, bits, None)
    x = x.detach().float()
    first, bins = x.min(), 2**bits
    width = ((x.max() / bins) - (first / bins)).clamp(min=SMALLEST_SCALE)
    codes = ((x - first) / width).floor().clamp(0, bins - 1)  # the largest value belongs to the last bin
    return Histogram(codes.int(), first, width, position=0.5)


def histogram_quantize_book(x: Tensor, bits: int) -> Histogram:
    """The same bins as the book's text treats them, with both defects (see above). Arguments as in the other."""
    _check(x, bits, None)
    x = x.detach().float()
    edges = torch.linspace(float(x.min()), float(x.max()), 2**bits + 1, device=x.device)
    codes = torch.searchsorted(edges, x) - 1  # the number of edges below x, less one: -1 for the smallest value
    return Histogram(codes.int(), edges[0], edges[1] - edges[0], position=0.0)


def _check(x: Tensor, bits: int, dim: int | None) -> None:
    if not 2 <= bits <= 16:
        raise ValueError(f"cannot quantize to {bits} bits: choose 2 to 16")
    if not x.is_floating_point():
        raise ValueError(f"cannot quantize {x.dtype}: give a floating-point tensor")
    if not x.numel():
        raise ValueError("cannot quantize an empty tensor: it has no range")
    if not x.isfinite().all():
        raise ValueError("cannot quantize NaN or infinite values: remove them first")
    if dim is not None and not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim {dim} does not exist in a tensor of {x.ndim} dimensions")


def _extreme(x: Tensor, dim: int | None, reduce) -> Tensor:
    """amin or amax over all dimensions but `dim`, which keep size 1; over everything, [], for None."""
    if dim is None:
        return reduce(x)
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    # An empty list of dimensions would mean all of them.
    return reduce(x, dim=others, keepdim=True) if others else x


def _code_range(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _code_dtype(bits: int, signed: bool) -> torch.dtype:
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    return torch.int16 if signed else torch.int32
