"""k2 Triton: NF4 matrix times vector: README.md says what to write. Check with: minift-course check k2"""

import torch
import triton
import triton.language as tl


@triton.jit
def matvec_kernel(packed_ptr, absmax_ptr, code_ptr, x_ptr, out_ptr, k, blocksize, BLOCK_K: tl.constexpr):
    """Program i writes out[i]."""
    # TODO: a loop over tiles of BLOCK_K columns, a float32 sum, one store
    pass


def matvec(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    blocksize: int,
) -> None:
    """Fill out (N,) with the product of the NF4 matrix (N, K) and x (K,)."""
    # TODO: matvec_kernel[(programs,)](packed, ...)
    raise NotImplementedError
