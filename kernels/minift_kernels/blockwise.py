"""Quantize to 8 bits and back, a tile of whole blocks for each program.

    quantize     absmax[m] = max |x| of block m        codes = index of the entry nearest to x * (1 / absmax[m])
    dequantize   value     = round(code[codes] * absmax[m])

**The largest magnitude** is taken on the bits: fp32 patterns without their sign are ordered like the numbers, with
infinity and NaN on top, so that a NaN in x comes through to whoever checks the scales (a maximum of numbers drops it).

**The nearest entry** of the dynamic map is found by arithmetic, not by a search of eight dependent steps. The map is
piecewise linear: decade d, the magnitudes from 10^(d-7) to 10^(d-6), holds 2^d equal steps (twice as many if unsigned).
So six comparisons give the decade, a product gives the step, and that guess is one entry off at most (rounding; the
step across the edge of two decades). Two comparisons with the exact boundaries of the guess put it right:

    code = guess + (x > boundary[guess]) - (x <= boundary[guess - 1])

Bits: the reciprocal is a correctly rounded division and nothing is fused, so codes and scales equal those of the
PyTorch bodies. Triton's CPU interpreter truncates fp32 to bf16 instead of rounding; there the bits are rounded.

Offsets: block numbers are 64-bit from the number of the program on, so a tensor may have more than 2^31 elements.
"""

import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILE = 4096  # values a program handles, at least one block
TINY_BITS = tl.constexpr(0x006CE3EE)  # fp32 1e-38, the least divisor: a zero block must not make NaN


@triton.jit
def block_absmax(x):
    """fp32 [blocks, c] -> largest magnitude of each row, and the same or at least 1e-38 to divide by: fp32 [blocks]."""
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    divisor = tl.maximum(largest, TINY_BITS)
    return largest.to(tl.float32, bitcast=True), divisor.to(tl.float32, bitcast=True)  # pyright: ignore


@triton.jit
def bf16_bits(value):
    """fp32 -> the upper 16 bits after rounding to bf16, ties to even: add half a unit and cut. Finite values."""
    bits = value.to(tl.uint32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def store_rounded(out_ptr, offsets, value, mask, ROUND_BY_BITS: tl.constexpr):
    """Store fp32 values rounded to the type of `out_ptr`; ROUND_BY_BITS: it holds the bits of a bf16 tensor."""
    if ROUND_BY_BITS:
        tl.store(out_ptr + offsets, bf16_bits(value).to(tl.uint16), mask=mask)
    else:
        tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def nearest_dynamic(x, boundaries_ptr, slopes_ptr, SIGNED: tl.constexpr):
    """fp32 x -> int32 code of the nearest entry of the dynamic map, ties to even."""
    magnitude = tl.abs(x)
    decade = (magnitude > 1e-6).to(tl.int32) + (magnitude > 1e-5).to(tl.int32) + (magnitude > 1e-4).to(tl.int32)
    decade += (magnitude > 1e-3).to(tl.int32) + (magnitude > 1e-2).to(tl.int32) + (magnitude > 1e-1).to(tl.int32)
    steps = (1 if SIGNED else 2) << decade
    position = magnitude * tl.load(slopes_ptr + decade) - steps.to(tl.float32) * (1.0 / 9)
    step = tl.minimum(tl.maximum(position.to(tl.int32), 0), steps - 1)
    # Below a decade lie steps - 1 entries of its sign (unsigned: steps - 2), and zero.
    rank = steps + step
    guess = tl.where(x < 0, 127 - rank, 127 + rank) if SIGNED else tl.where(x < 0, 0, rank - 1)
    above = tl.load(boundaries_ptr + guess, mask=guess < 255, other=float("inf"))
    below = tl.load(boundaries_ptr + guess - 1, mask=guess > 0, other=float("-inf"))
    return guess + (x > above).to(tl.int32) - (x <= below).to(tl.int32)


@triton.jit
def _quantize_blockwise_kernel(
    x_ptr,
    boundaries_ptr,
    slopes_ptr,
    codes_ptr,
    absmax_ptr,
    n,
    SIGNED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Program i quantizes blocks [i * BLOCKS, (i + 1) * BLOCKS)."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offsets = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    absmax, divisor = block_absmax(x)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < n)
    normalized = x * tl.div_rn(1.0, divisor)[:, None]
    code = nearest_dynamic(normalized, boundaries_ptr, slopes_ptr, SIGNED)
    tl.store(codes_ptr + offsets, code.to(tl.uint8), mask=offsets < n)


@triton.jit
def _dequantize_blockwise_kernel(
    codes_ptr,
    absmax_ptr,
    code_ptr,
    out_ptr,
    n,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROUND_BY_BITS: tl.constexpr,
):
    """Program i decodes blocks [i * BLOCKS, (i + 1) * BLOCKS)."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offsets = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    code = tl.load(codes_ptr + offsets, mask=offsets < n, other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + block, mask=block * BLOCKSIZE < n, other=0.0)
    value = tl.load(code_ptr + code) * absmax[:, None]
    store_rounded(out_ptr, offsets, value, offsets < n, ROUND_BY_BITS)


@cache
def slopes(signed: bool, device: torch.device) -> Tensor:
    """Steps for each unit of magnitude in each decade, fp32 [7]: 0.9 x 10^(d-6) is the width of decade d."""
    steps = [(1 if signed else 2) << decade for decade in range(7)]
    return torch.tensor([steps[decade] * 10.0 ** (6 - decade) / 0.9 for decade in range(7)], device=device)


def grid_of_blocks(n: int, blocksize: int) -> tuple[tuple[int], int]:
    """The grid, and how many blocks each of its programs handles."""
    blocks = max(1, TILE // blocksize)
    return (triton.cdiv(n, blocks * blocksize),), blocks


def quantize_blockwise(
    x: Tensor, boundaries: Tensor, signed: bool, blocksize: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        x: fp32, bf16 or fp16, any shape, contiguous.
        boundaries: fp32 [255] between the entries of the dynamic map: `x > boundary` means a later entry.
        signed: which dynamic map.
        blocksize: a power of two.
        out: where to write codes uint8 [n] and scales fp32 [ceil(n / blocksize)]; None allocates.
    """
    n = x.numel()
    if out is None:
        out = (torch.empty(n, dtype=torch.uint8, device=x.device),
               torch.empty(triton.cdiv(n, blocksize), dtype=torch.float32, device=x.device))  # fmt: skip
    codes, absmax = out
    grid, blocks = grid_of_blocks(n, blocksize)
    if n:
        _quantize_blockwise_kernel[grid](
            x,
            boundaries,
            slopes(signed, x.device),
            codes,
            absmax,
            n,
            SIGNED=signed,
            BLOCKSIZE=blocksize,
            BLOCKS=blocks,
            num_warps=8,  # pyright: ignore[reportCallIssue] (an option of the compiler, not of the kernel)
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
        )
    return codes.view(x.shape), absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Launch the kernel.

    Args:
        codes: uint8, any shape, contiguous.
        absmax: fp32 [ceil(n / blocksize)]. code: fp32 [256].
        blocksize: a power of two.
        dtype: of the result.
        out: where to write, [n] of `dtype`; None allocates.
    """
    n = codes.numel()
    out = torch.empty(n, dtype=dtype, device=codes.device) if out is None else out
    round_by_bits = INTERPRETED and dtype == torch.bfloat16
    grid, blocks = grid_of_blocks(n, blocksize)
    if n:
        _dequantize_blockwise_kernel[grid](
            codes,
            absmax,
            code,
            out.view(torch.uint16) if round_by_bits else out,
            n,
            BLOCKSIZE=blocksize,
            BLOCKS=blocks,
            ROUND_BY_BITS=round_by_bits,
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue] (an option of the compiler, not of the kernel)
        )
    return out.view(codes.shape)
