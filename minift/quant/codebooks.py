"""Codebooks: which 16 or 256 numbers a code can stand for, and how a value finds its nearest one.

A quantized tensor stores small integers, its codes. Code `i` means `codebook[i]`, a number in [-1, 1], times the
largest magnitude of its block. Everything here is about choosing those numbers well:

- **NF4** (NormalFloat, QLoRA, arXiv 2305.14314): weights are roughly normal, so the 16 values sit at quantiles of the
  normal distribution: 8 on the positive side, 7 on the negative side, and one exact 0 (padding and pruned weights stay
  zero). The symmetric table that many texts print (`symmetric_quantiles`) has no zero and is not NF4.
- **FP4**: a 4-bit float: sign, 2 exponent bits, 1 fraction bit, scaled so that the largest value is 1. Its codes are in
  bit-pattern order, not in order of value, and two of them mean zero.
- **dynamic map** (8-bit optimizers, arXiv 2110.02861): 256 values over seven decades; the bits that small numbers do
  not spend on the fraction, they spend on the exponent. The signed map serves signed data (Adam's first moment, the
  scales of double quantization), the unsigned one Adam's second moment.

All tables equal those of bitsandbytes 0.50 (`functional.py`: create_normal_map, get_4bit_type, create_dynamic_map).

Finding the nearest value is a search among the midpoints between neighbours. A binary search costs one unpredictable
branch per bit; here the top 16 bits of the fp32 pattern of x name one of 65,536 *cells*, and no cell of these codebooks
holds more than one midpoint, so one table look-up and one comparison give the exact answer:

    code(x) = first_code[cell] + (x > midpoint[cell])
"""

from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

# What divides a block whose scale is 0, so that no NaN comes out; the stored scale stays 0 (bitsandbytes' constant).
TINY = 1e-38
NF4_OFFSET = 0.9677083  # the tail probability that the outermost quantiles leave out (bitsandbytes' constant)


@cache
def codebook(quant_type: str) -> Tensor:
    """The 16 values of a 4-bit type, fp32 [16], indexed by code.

    Args:
        quant_type: "nf4" or "fp4".
    """
    if quant_type == "nf4":
        return _normal_float()
    if quant_type == "fp4":
        return _four_bit_float()
    raise ValueError(f"unknown 4-bit type {quant_type!r}: choose 'nf4' or 'fp4'")


def _normal_float() -> Tensor:
    def quantiles(points: int) -> list[float]:
        """Quantiles of `points` - 1 probabilities from the offset towards (not including) 1/2, nearest zero last."""
        # fp32 grid as torch.linspace lays it: the upper half is counted from the end.
        start, end = np.float32(NF4_OFFSET), np.float32(0.5)
        step = (end - start) / np.float32(points - 1)
        grid = [start + step * np.float32(i) if i < points // 2 else end - step * np.float32(points - 1 - i)
                for i in range(points - 1)]  # fmt: skip
        return [NormalDist().inv_cdf(float(p)) for p in grid]

    positive, negative = quantiles(9), [-q for q in quantiles(8)]
    values = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32)
    return values / values.max()


def symmetric_quantiles() -> Tensor:
    """The table that many texts print instead of NF4, fp32 [16] in rising order, for comparison only.

    The quantile of the middle of each of 16 equal shares of a normal distribution, scaled to a largest value of 1:

        Phi^-1((i + 1/2) / 16) / Phi^-1(31/32)      +-1, .7076, .5422, .4168, .3109, .2159, .1273, .0421

    None of them is zero: a weight of exactly 0 comes back as -0.0421 or +0.0421 of the largest in its block.
    """
    values = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)], dtype=torch.float64)
    return (values / values.max()).float()


def _four_bit_float() -> Tensor:
    """Bits `s ee f`: exponent 0 holds 0 and 1/16; the others 2 to 12, in the order bitsandbytes uses."""
    magnitudes = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0])
    values = torch.cat([magnitudes, 0.0 - magnitudes]) / 12.0
    return values + 0.0  # -0.0 + 0.0 = +0.0: code 8 is a second plus zero


@cache
def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 values of the dynamic 8-bit type in rising order, fp32 [256].

    Decade `i` (0..6) covers (10^(i-7), 10^(i-6)] with 2^i (signed, and as many negative) or 2^(i+1) (unsigned) values:
    the midpoints of equal steps from 0.1 to 1. Zero and one are added; minus one is not.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, (2**decade if signed else 2 ** (decade + 1)) + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10.0 ** (decade - 6) * means).tolist()
        values += scaled
        if signed:
            values += [-value for value in scaled]
    return torch.tensor(sorted(values), dtype=torch.float32)


class NearestCode:
    """Maps fp32 values to the code of the nearest entry of a codebook, exactly.

    Args:
        values: fp32 [k], k <= 256, in code order (any order of value).
        ties: what a value exactly between two entries becomes: "down" the lower one (4-bit types; the midpoint itself
            is rounded to fp32, as in bitsandbytes), "even" the one with the even index (8-bit maps, CUDA's rule).
    """

    def __init__(self, values: Tensor, ties: str):
        order = torch.argsort(values, stable=True)
        rising = values[order]
        # "down": the midpoint rounded to fp32, as in the library being matched.
        boundaries = (rising[:-1] + rising[1:]) / 2 if ties == "down" else _boundaries_to_even(rising)
        self.order = order.to(torch.uint8)
        self.boundaries = boundaries

        top_bits = torch.arange(1 << 16, dtype=torch.int32) << 16
        ends = torch.stack([top_bits.view(torch.float32), (top_bits | 0xFFFF).view(torch.float32)])
        first = torch.bucketize(ends.amin(0).nan_to_num(0.0), boundaries)
        last = torch.bucketize(ends.amax(0).nan_to_num(0.0), boundaries)
        if (last - first).max() > 1:
            raise ValueError("codebook too fine: two of its midpoints share the top 16 bits of their fp32 pattern")
        self.first_rank = first.to(torch.uint8)
        self.midpoint = torch.where(last > first, boundaries[first.clamp(max=len(boundaries) - 1)], torch.inf)
        self.is_sorted = bool((order == torch.arange(len(order))).all())

    def __call__(self, x_n: Tensor) -> Tensor:
        """fp32 [n], finite, contiguous -> uint8 [n]."""
        rank = torch.empty(x_n.shape, dtype=torch.uint8, device=x_n.device)
        for start in range(0, x_n.numel(), CHUNK):
            chunk = x_n[start : start + CHUNK]
            cell = (chunk.view(torch.int32) >> 16) & 0xFFFF
            rank_chunk = self.first_rank.index_select(0, cell)
            rank_chunk += chunk > self.midpoint.index_select(0, cell)
            rank[start : start + CHUNK] = rank_chunk
        return rank if self.is_sorted else self.order.index_select(0, rank.int())

    def to(self, device: torch.device) -> "NearestCode":
        """A copy whose tables live on `device`."""
        moved = object.__new__(NearestCode)
        moved.__dict__ = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return moved


# Values looked up at a time: the chunk and its temporaries stay in a 1 MB level-2 cache (2.6 ns a value on an EPYC core
# pair instead of 10.3 ns for torch.bucketize).
CHUNK = 1 << 15


def _boundaries_to_even(rising: Tensor) -> Tensor:
    """fp32 boundaries b such that `x > b` picks the exactly nearest entry, ties to the even index.

    The true midpoint is computed in float64, where it is exact. If fp32 can represent it, a tie is possible, and goes
    up only from an odd index: then the boundary is the next fp32 below. If it cannot, it is rounded down, so that the
    next fp32 above already counts as greater.
    """
    exact = (rising[:-1].double() + rising[1:].double()) / 2
    rounded = exact.float()
    below = torch.nextafter(rounded, torch.tensor(-torch.inf))
    lower_is_odd = torch.arange(len(exact)) % 2 == 1
    tie_goes_up = (rounded.double() == exact) & lower_is_odd
    return torch.where((rounded.double() > exact) | tie_goes_up, below, rounded)


@cache
def nearest_4bit(quant_type: str, device: torch.device) -> NearestCode:
    """The search tables of a 4-bit type, built once per device."""
    return NearestCode(codebook(quant_type), ties="down").to(device)


@cache
def nearest_dynamic(signed: bool, device: torch.device) -> NearestCode:
    """The search tables of a dynamic 8-bit map, built once per device."""
    return NearestCode(dynamic_map(signed), ties="even").to(device)
