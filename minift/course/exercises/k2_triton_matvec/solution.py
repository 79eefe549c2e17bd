"""k2 Triton: NF4 matrix times vector: decode a tile, scale it, multiply it, and add it up in float32."""

import torch
import triton
import triton.language as tl


@triton.jit
def matvec_kernel(packed_ptr, absmax_ptr, code_ptr, x_ptr, out_ptr, k, blocksize, BLOCK_K: tl.constexpr):
    """Program i writes out[i]."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        exists = column < k
        element = row * k + column
        byte = tl.load(packed_ptr + element // 2, mask=exists, other=0).to(tl.int32)
        nibble = tl.where(column % 2 == 0, byte >> 4, byte & 15)
        scale = tl.load(absmax_ptr + element // blocksize, mask=exists, other=0.0)
        x = tl.load(x_ptr + column, mask=exists, other=0.0)
        total += tl.load(code_ptr + nibble) * scale * x
    tl.store(out_ptr + row, tl.sum(total, axis=0))


def matvec(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    blocksize: int,
) -> None:
    """Fill out (N,) with the product of the NF4 matrix (N, K) and x (K,)."""
    matvec_kernel[(out.numel(),)](packed, absmax, code, x, out, x.numel(), blocksize, BLOCK_K=128)
