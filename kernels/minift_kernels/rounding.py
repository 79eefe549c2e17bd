"""Stochastic rounding of fp32 to bf16 or fp16 in one pass, with random numbers that are computed, not stored.

For element e, with word(e) = Philox4x32-10(counter e // 4, key seed)[e % 4]:

    out(e) = sign(x) * floor(|x| / quantum + word(e) / 2^32) * quantum          quantum: the distance of neighbours

Each program makes COUNTERS counters and rounds their 4 * COUNTERS elements: the four words of a counter serve four
neighbouring elements, so no word is thrown away. 4 bytes are read and 2 written for each element.

Bits: everything is done on integers, on the bit patterns of the input and of the output, so the result equals the
PyTorch body of `minift::stochastic_round` exactly, also in Triton's CPU interpreter, which cannot round to bf16. The
words come from `tl.philox` with 32-bit counters; `tl.randint4x` with 64-bit offsets is another generator in some
versions of Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 512
# Of each target: dropped fraction bits, fp32 pattern of the largest finite number, patterns of infinity and quiet bit.
TARGETS = {
    torch.bfloat16: {"DROPPED": 16, "LARGEST": 0x7F7F0000, "INFINITY": 0x7F80, "QUIET": 0x0040, "FLOAT16": False},
    torch.float16: {"DROPPED": 13, "LARGEST": 0x477FE000, "INFINITY": 0x7C00, "QUIET": 0x0200, "FLOAT16": True},
}


@triton.jit
def philox_words(counter, seed):
    """Counters int64 [c] -> their words uint32 [4 * c], the four of a counter next to each other."""
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def round_by_chance(
    pattern, word, DROPPED: tl.constexpr, LARGEST: tl.constexpr, INFINITY: tl.constexpr, QUIET: tl.constexpr,
    FLOAT16: tl.constexpr,
):  # fmt: skip
    """int32 patterns of fp32 and words uint32 -> int16 patterns: floor(|x| / quantum + word / 2^32) quanta."""
    magnitude = pattern & 0x7FFFFFFF
    # |x| in quanta with 32 bits behind the point; see minift/numerics/rounding.py.
    if FLOAT16:
        exponent = magnitude >> 23
        normal = (magnitude - ((127 - 15) << 23)).to(tl.int64) << (32 - DROPPED)
        significand = ((magnitude & 0x7FFFFF) | 0x800000).to(tl.int64)
        shift = exponent - (126 - 32)
        left, right = tl.minimum(tl.maximum(shift, 0), 18), tl.minimum(tl.maximum(-shift, 0), 24)
        subnormal = (significand << left.to(tl.int64)) >> right.to(tl.int64)
        quanta = tl.where(exponent > 127 - 15, normal, subnormal)
    else:
        quanta = magnitude.to(tl.int64) << (32 - DROPPED)
    half = tl.full(pattern.shape, 1 << 31, tl.int64)
    word = tl.where(magnitude > LARGEST, half, word.to(tl.int64))
    rounded = tl.minimum((quanta + word) >> 32, INFINITY).to(tl.int32)
    nan = INFINITY | QUIET | ((magnitude & 0x7FFFFF) >> DROPPED)
    return (((pattern >> 16) & 0x8000) | tl.where(magnitude > 0x7F800000, nan, rounded)).to(tl.int16)


# Without do_not_specialize Triton compiles again for a seed of 1 or one divisible by 16.
@triton.jit(do_not_specialize=["seed"])
def _stochastic_round_kernel(
    x_ptr,
    out_ptr,
    n,
    seed,
    DROPPED: tl.constexpr,
    LARGEST: tl.constexpr,
    INFINITY: tl.constexpr,
    QUIET: tl.constexpr,
    FLOAT16: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """Program i rounds elements [4 * i * COUNTERS, 4 * (i + 1) * COUNTERS). x_ptr: int32 patterns; out_ptr: int16."""
    first_counter = tl.program_id(0).to(tl.int64) * COUNTERS
    word = philox_words(first_counter + tl.arange(0, COUNTERS), seed)
    offsets = 4 * first_counter + tl.arange(0, 4 * COUNTERS)
    mask = offsets < n
    pattern = tl.load(x_ptr + offsets, mask=mask, other=0)
    result = round_by_chance(pattern, word, DROPPED, LARGEST, INFINITY, QUIET, FLOAT16)
    tl.store(out_ptr + offsets, result, mask=mask)


def stochastic_round(x: Tensor, dtype: torch.dtype, seed: int, out: Tensor | None = None) -> Tensor:
    """Launch the kernel.

    Args:
        x: fp32, any shape, contiguous.
        dtype: torch.bfloat16 or torch.float16.
        seed: 64 bits.
        out: where to write, [n] of `dtype`; None allocates.
    """
    n = x.numel()
    out = torch.empty(n, dtype=dtype, device=x.device) if out is None else out
    if n:
        _stochastic_round_kernel[(triton.cdiv(n, 4 * COUNTERS),)](
            x.view(torch.int32),
            out.view(torch.int16),
            n,
            seed,
            **TARGETS[dtype],  # pyright: ignore[reportArgumentType] (plain numbers become compile-time constants)
            COUNTERS=COUNTERS,  # pyright: ignore[reportArgumentType]
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue] (nothing to fuse; unset, Triton 3.9 warns)
        )
    return out.view(x.shape)
