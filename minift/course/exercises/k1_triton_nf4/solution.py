"""k1 Triton: dequantize NF4: everything is counted in elements, and nothing happens for those that do not exist."""

import torch
import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(packed_ptr, absmax_ptr, code_ptr, out_ptr, n, blocksize, BLOCK: tl.constexpr):
    """Program i writes out[i * BLOCK : (i + 1) * BLOCK]."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = element < n
    byte = tl.load(packed_ptr + element // 2, mask=exists, other=0).to(tl.int32)
    nibble = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    scale = tl.load(absmax_ptr + element // blocksize, mask=exists, other=0.0)
    value = tl.load(code_ptr + nibble)
    tl.store(out_ptr + element, (value * scale).to(out_ptr.dtype.element_ty), mask=exists)


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, out: torch.Tensor, blocksize: int
) -> None:
    """Fill out (n,) with code[nibble] * absmax[element // blocksize]."""
    n = out.numel()
    programs = triton.cdiv(n, 256)
    dequantize_kernel[(programs,)](packed, absmax, code, out, n, blocksize, BLOCK=256)
