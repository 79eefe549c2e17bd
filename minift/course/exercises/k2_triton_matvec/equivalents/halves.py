"""Walks over bytes: even and odd columns are two sums with their own x, and the tile is reduced at once."""

import triton
import triton.language as tl


@triton.jit
def _row(packed_ptr, absmax_ptr, code_ptr, x_ptr, out_ptr, half, blocksize, BYTES: tl.constexpr):
    row = tl.program_id(0)
    total = 0.0
    for tile in range(tl.cdiv(half, BYTES)):
        place = tile * BYTES + tl.arange(0, BYTES)
        mask = place < half
        flat = row * half + place
        byte = tl.load(packed_ptr + flat, mask=mask, other=0)
        even = tl.load(x_ptr + 2 * place, mask=mask, other=0.0)
        odd = tl.load(x_ptr + 2 * place + 1, mask=mask, other=0.0)
        # A block begins with an even element, so both halves of a byte have one scale.
        scale = tl.load(absmax_ptr + 2 * flat // blocksize, mask=mask, other=1.0)
        high, low = tl.load(code_ptr + (byte >> 4)), tl.load(code_ptr + (byte & 15))
        total += tl.sum(scale * (high * even + low * odd))
    tl.store(out_ptr + row, total)


def matvec(packed, absmax, code, x, out, blocksize):
    _row[out.shape](packed, absmax, code, x, out, len(x) // 2, blocksize, BYTES=256)
