"""Decode packed 4-bit weights in one pass, the double-quantized scales included.

For element e of the weight, with p its byte and m = e // blocksize its block:

    scale(m)  = nested_code[absmax[m]] * nested_absmax[m // 256] + offset      (double quantization; else absmax[m])
    value(e)  = round(code[nibble(p)] * scale(m))                              even e: high nibble, odd e: low nibble

bitsandbytes needs three launches and two temporary tensors for this (scales, `+ offset`, values). The price of memory
decides: half a byte is read and two bytes are written for each value, so the kernel is bound by the writing.

Each program decodes BYTES consecutive bytes into 2 * BYTES consecutive values. The 16 codebook entries are looked up
with loads; they sit in one 64-byte cache line, and equal addresses in a warp cost one access.

Bits: the product and the sum are rounded separately (no fused multiply-add), then once to the output type, so the
result equals the PyTorch body of `minift::dequantize_4bit` exactly. Triton's CPU interpreter truncates fp32 to bf16
instead of rounding; there the rounding is done on the bits.
"""

import os
from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BYTES = 1024


@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nested_code_ptr,
    out_ptr,
    n,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROUND_BY_BITS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Program i decodes bytes [i * BYTES, (i + 1) * BYTES) into values [2 * i * BYTES, 2 * (i + 1) * BYTES)."""
    first_byte = tl.program_id(0).to(tl.int64) * BYTES
    byte_offsets = first_byte + tl.arange(0, BYTES)
    byte_mask = byte_offsets < (n + 1) // 2
    byte = tl.load(packed_ptr + byte_offsets, mask=byte_mask, other=0).to(tl.int32)

    # Both values of a byte lie in one block, since block sizes are even.
    block = (2 * byte_offsets) // BLOCKSIZE
    if NESTED:
        nested = tl.load(absmax_ptr + block, mask=byte_mask, other=0).to(tl.int32)
        nested_scale = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=byte_mask, other=0.0)
        scale = tl.load(nested_code_ptr + nested) * nested_scale + tl.load(nested_offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=byte_mask, other=0.0)

    high = tl.load(code_ptr + (byte >> 4)) * scale
    low = tl.load(code_ptr + (byte & 0xF)) * scale
    value = tl.interleave(high, low)
    offsets = 2 * first_byte + tl.arange(0, 2 * BYTES)
    mask = offsets < n
    if ROUND_BY_BITS:  # out_ptr holds the bits of a bf16 tensor: add half a unit, ties to even, and cut
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(out_ptr + offsets, bits.to(tl.uint16), mask=mask)
    else:
        tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_code: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        packed: uint8 [ceil(n / 2), 1], contiguous.
        absmax: fp32 [m], or uint8 [m] with `nested_absmax` fp32 [ceil(m / 256)] and `nested_offset` fp32 [].
        code: fp32 [16]. nested_code: fp32 [256].
        shape, dtype: of the result; n is the product of the shape.
        out: where to write, [n] of `dtype`; None allocates.
    """
    n = prod(shape)
    out = torch.empty(n, dtype=dtype, device=packed.device) if out is None else out
    nested = nested_absmax is not None
    round_by_bits = INTERPRETED and dtype == torch.bfloat16
    if n:
        _dequantize_4bit_kernel[(triton.cdiv((n + 1) // 2, BYTES),)](
            packed,
            absmax,
            code,
            nested_absmax if nested else code,
            nested_offset if nested else code,
            nested_code,
            out.view(torch.uint16) if round_by_bits else out,
            n,
            BLOCKSIZE=blocksize,
            NESTED=nested,
            NESTED_BLOCKSIZE=256,
            ROUND_BY_BITS=round_by_bits,
            BYTES=BYTES,
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue] (an option of the compiler, not of the kernel)
        )
    return out.view(shape)
