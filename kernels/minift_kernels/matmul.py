"""Multiply a few rows by a packed 4-bit weight without ever writing the decoded weight to memory.

    y[t, o] = round( sum over i of x[t, i] * W[o, i]  +  bias[o] )       W[o, i] = round(code * scale), as in fourbit.py

Generating text multiplies one row at a time. Then each weight is used once, and time is the reading of the weight: 0.52
bytes a value if it is decoded on the way, against 0.52 read, 2 written and 2 read again for decode + cuBLAS. With more
rows the product itself becomes the cost, and cuBLAS does that better.

Each program owns OUT output features and goes over the inputs in chunks:

                    i ->   chunk 0      chunk 1     ...
        o   W rows       [OUT, CHUNK] [OUT, CHUNK]        decoded in registers, rounded to the type of x
            x            [CHUNK, T]   [CHUNK, T]          T = 1: products are summed lane by lane, reduced at the end
                                                          T = 16: tensor cores, x padded with rows of zeros

If rows consist of whole blocks (`ALIGNED`, every real model), a chunk is read as groups of one scale each, and both
nibbles of a byte are used by the lane that loads it. Otherwise a row may begin in the middle of a block and in the low
nibble; then each element looks up its own byte and scale by its number in the flattened weight.

The sums are fp32. W is that of `minift::dequantize_4bit` to the bit, so the result differs from decode + cuBLAS in the
order of summation, and in that the bias is added before the rounding to the type of x, not after.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minift_kernels.blockwise import INTERPRETED, bf16_bits, store_rounded
from minift_kernels.fourbit import block_scales

MAX_ROWS = 16
# Output features and inputs of a tile, by padded rows of x: 16 fp32 sums a thread for one row; for 16 rows the least
# that a tensor core instruction takes, so that a weight with few output features still fills the device.
TILES = {1: (4, 512), 16: (16, 128)}


@triton.jit
def _decode_groups(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nested_code_ptr,
    row,
    first,
    in_features,
    out_features,
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    OUT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """fp32 [OUT, CHUNK] of rows that consist of whole blocks, from input `first` on; 0 outside the weight."""
    GROUP: tl.constexpr = BLOCKSIZE if BLOCKSIZE < CHUNK else CHUNK  # noqa: N806
    start = first + tl.arange(0, CHUNK // GROUP) * GROUP
    inside = (row < out_features)[:, None] & (start < in_features)[None, :]
    element = row.to(tl.int64)[:, None] * in_features + start[None, :]
    scale = block_scales(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, element // BLOCKSIZE, inside, NESTED
    )
    byte_offsets = (element // 2)[:, :, None] + tl.arange(0, GROUP // 2)[None, None, :]
    byte = tl.load(packed_ptr + byte_offsets, mask=inside[:, :, None], other=0).to(tl.int32)
    high = tl.load(code_ptr + (byte >> 4)) * scale[:, :, None]
    low = tl.load(code_ptr + (byte & 0xF)) * scale[:, :, None]
    return tl.reshape(tl.interleave(high, low), [OUT, CHUNK])


@triton.jit
def _decode_elements(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nested_code_ptr,
    row,
    first,
    in_features,
    out_features,
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """fp32 [OUT, CHUNK] of any rows, from input `first` on; 0 outside the weight."""
    column = first + tl.arange(0, CHUNK)
    inside = (row < out_features)[:, None] & (column < in_features)[None, :]
    element = row.to(tl.int64)[:, None] * in_features + column[None, :]
    scale = block_scales(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, element // BLOCKSIZE, inside, NESTED
    )
    byte = tl.load(packed_ptr + element // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(element % 2 == 0, byte >> 4, byte & 0xF)
    return tl.load(code_ptr + code) * scale


@triton.jit
def round_like(value, x_ptr, INTERPRETED: tl.constexpr):
    """fp32 values rounded to the type of x; interpreted, they stay fp32, since its bf16 arithmetic is wrong."""
    if INTERPRETED:
        if x_ptr.dtype.element_ty == tl.bfloat16:
            return (bf16_bits(value) << 16).to(tl.float32, bitcast=True)
        else:
            return value.to(x_ptr.dtype.element_ty).to(tl.float32)
    else:
        return value.to(x_ptr.dtype.element_ty)


@triton.jit
def _matmul_4bit_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nested_code_ptr,
    bias_ptr,
    out_ptr,
    rows,
    in_features,
    out_features,
    HAS_BIAS: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    T: tl.constexpr,
    OUT: tl.constexpr,
    CHUNK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROUND_BY_BITS: tl.constexpr,
):
    """Program i computes output features [i * OUT, (i + 1) * OUT) of all rows of x."""
    feature = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row_of_x = tl.arange(0, T)
    acc = tl.zeros([OUT, CHUNK if T == 1 else T], tl.float32)
    for first in range(0, in_features, CHUNK):
        if ALIGNED:
            weight = _decode_groups(
                packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr,
                feature, first, in_features, out_features, NESTED, BLOCKSIZE, OUT, CHUNK,
            )  # fmt: skip
        else:
            weight = _decode_elements(
                packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr,
                feature, first, in_features, out_features, NESTED, BLOCKSIZE, CHUNK,
            )  # fmt: skip
        weight = round_like(weight, x_ptr, INTERPRETED)
        column = first + tl.arange(0, CHUNK)
        if T == 1:
            x = tl.load(x_ptr + column, mask=column < in_features, other=0.0).to(tl.float32)
            acc = tl.fma(weight.to(tl.float32), tl.broadcast_to(x[None, :], [OUT, CHUNK]), acc)
        else:
            mask = (column < in_features)[:, None] & (row_of_x < rows)[None, :]
            x = tl.load(x_ptr + row_of_x[None, :] * in_features + column[:, None], mask=mask, other=0.0)
            acc = tl.dot(weight, x.to(weight.dtype), acc, input_precision="ieee")
    if T == 1:
        acc = tl.sum(acc, axis=1, keep_dims=True)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + feature, mask=feature < out_features, other=0.0).to(tl.float32)[:, None]
    mask = (feature < out_features)[:, None] & (row_of_x < rows)[None, :]
    store_rounded(out_ptr, row_of_x[None, :] * out_features + feature[:, None], acc, mask, ROUND_BY_BITS)


def matmul_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    code: Tensor,
    nested_code: Tensor,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        x: fp32, bf16 or fp16 [rows, in_features], 1 to 16 rows, contiguous.
        packed, absmax, nested_absmax, nested_offset, code, nested_code, blocksize: as fourbit.dequantize_4bit, of a
            weight [out_features, in_features].
        bias: [out_features] or None.
        out: where to write, [rows, out_features] of the dtype of x; None allocates.
    """
    rows, in_features = x.shape
    if not 0 < rows <= MAX_ROWS:
        raise ValueError(f"{rows} rows: this kernel multiplies 1 to {MAX_ROWS}; decode the weight for more")
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device) if out is None else out
    nested = nested_absmax is not None
    round_by_bits = INTERPRETED and x.dtype == torch.bfloat16
    padded = 1 if rows == 1 else MAX_ROWS
    features, chunk = TILES[padded]
    if out_features:
        _matmul_4bit_kernel[(triton.cdiv(out_features, features),)](
            x,
            packed,
            absmax,
            code,
            nested_absmax if nested else code,
            nested_offset if nested else code,
            nested_code,
            code if bias is None else bias,
            out.view(torch.uint16) if round_by_bits else out,
            rows,
            in_features,
            out_features,
            HAS_BIAS=bias is not None,
            NESTED=nested,
            ALIGNED=in_features % blocksize == 0,
            BLOCKSIZE=blocksize,
            T=padded,
            OUT=features,
            CHUNK=chunk,
            INTERPRETED=INTERPRETED,
            ROUND_BY_BITS=round_by_bits,
            # No software pipeline: beside a tensor core product it would fetch even the codebook entries a chunk ahead,
            # through shared memory. Other programs on the same processor hide the latency.
            num_stages=1,  # pyright: ignore[reportCallIssue] (options of the compiler, not of the kernel)
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
        )
    return out
