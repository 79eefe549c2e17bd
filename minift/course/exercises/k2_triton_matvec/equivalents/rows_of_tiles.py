"""A program has four rows and a two-dimensional tile; masks of rows and columns, where() instead of other."""

import triton
import triton.language as tl


@triton.jit
def _tile(packed_ptr, absmax_ptr, code_ptr, x_ptr, out_ptr, n, k, blocksize, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    column = tl.arange(0, COLUMNS)
    while tl.min(column) < k:
        real = (row < n)[:, None] & (column < k)[None, :]
        element = row[:, None] * k + column[None, :]
        byte = tl.load(packed_ptr + (element >> 1), mask=real)
        shift = 4 * (1 - element % 2)
        weight = tl.load(code_ptr + ((byte >> shift) & 15), mask=real, other=0.0)
        scale = tl.load(absmax_ptr + element // blocksize, mask=real)
        x = tl.load(x_ptr + column, mask=column < k)
        total += tl.where(real, weight * (scale * x[None, :]), 0.0)
        column += COLUMNS
    tl.store(out_ptr + row, tl.sum(total, axis=1), mask=row < n)


def matvec(packed, absmax, code, x, out, blocksize):
    n, k = out.numel(), x.numel()
    _tile[(triton.cdiv(n, 4),)](packed, absmax, code, x, out, n, k, blocksize, ROWS=4, COLUMNS=64)
