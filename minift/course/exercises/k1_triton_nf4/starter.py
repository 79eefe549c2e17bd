"""k1 Triton: dequantize NF4: README.md says what to write. Check with: minift-course check k1"""

import torch
import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(packed_ptr, absmax_ptr, code_ptr, out_ptr, n, blocksize, BLOCK: tl.constexpr):
    """Program i writes out[i * BLOCK : (i + 1) * BLOCK]."""
    # TODO: offsets of my elements, mask, byte, nibble, value, scale, store
    pass


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, out: torch.Tensor, blocksize: int
) -> None:
    """Fill out (n,) with code[nibble] * absmax[element // blocksize]."""
    # TODO: how many programs are needed? dequantize_kernel[(programs,)](packed, ...)
    raise NotImplementedError
