"""A two-dimensional tile, one quantization block a row, whose bytes are interleaved; a loop over the rows' columns."""

import triton
import triton.language as tl


@triton.jit
def _tile(packed_ptr, absmax_ptr, code_ptr, out_ptr, n, SIZE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale = tl.load(absmax_ptr + block, mask=block * SIZE < n, other=1.0)[:, None]
    for start in range(0, SIZE, STEP):
        at = (block * SIZE + start)[:, None]
        pair = at // 2 + tl.arange(0, STEP // 2)[None, :]
        byte = tl.load(packed_ptr + pair, mask=pair * 2 < n, other=0x77).to(tl.int32)
        value = tl.load(code_ptr + tl.interleave(byte // 16, byte % 16)) * scale
        element = at + tl.arange(0, STEP)[None, :]
        tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), mask=element < n)


def dequantize(packed, absmax, code, out, blocksize):
    rows = max(1, 512 // blocksize)
    grid = ((absmax.numel() + rows - 1) // rows,)
    _tile[grid](packed, absmax, code, out, out.numel(), SIZE=blocksize, ROWS=rows, STEP=min(blocksize, 512))
