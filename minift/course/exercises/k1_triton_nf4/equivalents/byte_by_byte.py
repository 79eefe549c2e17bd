"""A program handles bytes and stores their two halves separately; tables and masks for each half."""

import triton
import triton.language as tl


@triton.jit
def _kernel(packed_ptr, absmax_ptr, code_ptr, out_ptr, n, n_bytes, blocksize, BYTES: tl.constexpr):
    place = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    byte = tl.load(packed_ptr + place, mask=place < n_bytes, other=0)
    first, second = place * 2, place * 2 + 1
    high = tl.load(code_ptr + (byte >> 4))
    low = tl.load(code_ptr + (byte & 0x0F))
    high *= tl.load(absmax_ptr + first // blocksize, mask=first < n, other=0.0)
    low *= tl.load(absmax_ptr + second // blocksize, mask=second < n, other=0.0)
    tl.store(out_ptr + first, high.to(out_ptr.dtype.element_ty), mask=first < n)
    tl.store(out_ptr + second, low.to(out_ptr.dtype.element_ty), mask=second < n)


def dequantize(packed, absmax, code, out, blocksize):
    n_bytes = packed.numel()
    _kernel[(n_bytes // 512 + (n_bytes % 512 > 0),)](
        packed, absmax, code, out, out.shape[0], n_bytes, blocksize, BYTES=512
    )
