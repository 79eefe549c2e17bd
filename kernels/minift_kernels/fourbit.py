"""Quantize to packed 4-bit codes and back, a tile of whole blocks for each program.

For element e of the weight, with p its byte and m = e // blocksize its block:

    absmax(m) = max |x| of the block         code(e)  = number of midpoints below x(e) / absmax(m), in order of value
    scale(m)  = nested_code[absmax[m]] * nested_absmax[m // 256] + offset      (double quantization; else absmax[m])
    value(e)  = round(code[nibble(p)] * scale(m))                              even e: high nibble, odd e: low nibble

bitsandbytes needs three launches and two temporary tensors to decode (scales, `+ offset`, values). The price of memory
decides: half a byte is read and two bytes are written for each value, so the kernel is bound by the writing. A tile
[blocks, bytes of a block] loads each scale once for its row. The 16 codebook entries are looked up with loads; they sit
in one 64-byte cache line, and equal addresses in a warp cost one access.

Bits: quantizing multiplies full blocks by the correctly rounded reciprocal of their scale and divides a short last
block by it, as the PyTorch body does. Decoding rounds product and sum separately (no fused multiply-add), then once to
the output type. So both equal the PyTorch bodies exactly. Offsets are 64-bit, as in blockwise.py.

`n_bytes` is an argument beside `n` so that the compiler knows when it is a multiple of 16, and moves 16 bytes at once.
"""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from minift_kernels.blockwise import INTERPRETED, block_absmax, grid_of_blocks, store_rounded

NESTED_BLOCKSIZE = tl.constexpr(256)


@triton.jit
def _quantize_4bit_kernel(
    x_ptr,
    midpoints_ptr,
    order_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    n_bytes,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Program i quantizes blocks [i * BLOCKS, (i + 1) * BLOCKS)."""
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first_block + tl.arange(0, BLOCKS)
    offsets = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    # Behind the end stands zero, which also pads the last byte of an odd tensor.
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    absmax, divisor = block_absmax(x)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < n)
    normalized = x * tl.div_rn(1.0, divisor)[:, None]
    if (first_block + BLOCKS) * BLOCKSIZE > n:
        is_short = (block + 1) * BLOCKSIZE > n
        normalized = tl.where(is_short[:, None], tl.div_rn(x, divisor[:, None]), normalized)

    rank = tl.zeros([BLOCKS, BLOCKSIZE], tl.int32)
    for midpoint in tl.static_range(15):  # pyright: ignore[reportGeneralTypeIssues]
        rank += (normalized > tl.load(midpoints_ptr + midpoint)).to(tl.int32)
    code = tl.load(order_ptr + rank).to(tl.int32)
    high, low = tl.split(tl.reshape(code, [BLOCKS, BLOCKSIZE // 2, 2]))
    byte_offsets = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte_offsets, ((high << 4) | low).to(tl.uint8), mask=byte_offsets < n_bytes)


@triton.jit
def block_scales(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, block, mask, NESTED: tl.constexpr):
    """The fp32 scales of blocks with these numbers, 0 where the mask is off."""
    if NESTED:
        nested = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested_scale = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        scale = tl.load(nested_code_ptr + nested) * nested_scale + tl.load(nested_offset_ptr)
        return tl.where(mask, scale, 0.0)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


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
    n_bytes,
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROUND_BY_BITS: tl.constexpr,
):
    """Program i decodes blocks [i * BLOCKS, (i + 1) * BLOCKS)."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte_offsets = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    byte = tl.load(packed_ptr + byte_offsets, mask=byte_offsets < n_bytes, other=0).to(tl.int32)
    scale = block_scales(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, block, block * BLOCKSIZE < n, NESTED
    )
    high = tl.load(code_ptr + (byte >> 4)) * scale[:, None]
    low = tl.load(code_ptr + (byte & 0xF)) * scale[:, None]
    offsets = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    store_rounded(out_ptr, offsets, tl.interleave(high, low), offsets < n, ROUND_BY_BITS)


def quantize_4bit(
    x: Tensor, midpoints: Tensor, order: Tensor, blocksize: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        x: fp32, bf16 or fp16, any shape, contiguous.
        midpoints: fp32 [15] between the entries of the codebook in rising order.
        order: uint8 [16], the code of each entry in rising order.
        blocksize: a power of two.
        out: where to write packed codes uint8 [ceil(n / 2)] and scales fp32 [ceil(n / blocksize)]; None allocates.
    """
    n = x.numel()
    if out is None:
        out = (torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device),
               torch.empty(triton.cdiv(n, blocksize), dtype=torch.float32, device=x.device))  # fmt: skip
    packed, absmax = out
    grid, blocks = grid_of_blocks(n, blocksize)
    if n:
        _quantize_4bit_kernel[grid](
            x,
            midpoints,
            order,
            packed,
            absmax,
            n,
            (n + 1) // 2,
            BLOCKSIZE=blocksize,
            BLOCKS=blocks,
            num_warps=8,  # pyright: ignore[reportCallIssue] (an option of the compiler, not of the kernel)
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
        )
    return packed.unsqueeze(1), absmax


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    code: Tensor,
    nested_code: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        packed: uint8 [ceil(n / 2)] or [ceil(n / 2), 1], contiguous.
        absmax: fp32 [m], or uint8 [m] with `nested_absmax` fp32 [ceil(m / 256)] and `nested_offset` fp32 [].
        code: fp32 [16]. nested_code: fp32 [256].
        blocksize: a power of two.
        shape, dtype: of the result; n is the product of the shape.
        out: where to write, [n] of `dtype`; None allocates.
    """
    n = prod(shape)
    out = torch.empty(n, dtype=dtype, device=packed.device) if out is None else out
    nested = nested_absmax is not None
    round_by_bits = INTERPRETED and dtype == torch.bfloat16
    grid, blocks = grid_of_blocks(n, blocksize)
    if n:
        _dequantize_4bit_kernel[grid](
            packed,
            absmax,
            code,
            nested_absmax if nested else code,
            nested_offset if nested else code,
            nested_code,
            out.view(torch.uint16) if round_by_bits else out,
            n,
            (n + 1) // 2,
            NESTED=nested,
            BLOCKSIZE=blocksize,
            BLOCKS=blocks,
            ROUND_BY_BITS=round_by_bits,
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue] (an option of the compiler, not of the kernel)
        )
    return out.view(shape)
