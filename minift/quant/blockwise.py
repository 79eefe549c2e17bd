"""Blockwise 8-bit quantization: one fp32 scale for every block of values, one byte for each value.

One scale for a whole tensor lets a single outlier waste the range of all other values. Blocks of 256 keep the damage
local for 4/256 = 1/64 byte a value:

    absmax[m]   = max |x| over block m
    codes[m, c] = index of the entry of the codebook nearest to x[m, c] / absmax[m]
    x'[m, c]    = codebook[codes[m, c]] * absmax[m]

It stores the optimizer states of 8-bit Adam and, in double quantization, the scales of 4-bit blocks.
Peer: bitsandbytes `functional.quantize_blockwise`. Its CUDA kernel picks the exactly nearest entry, ties to the even
index, as this file does. Its CPU kernel rounds to one of 65,536 cells first (0.0 becomes code 131, not 127), so its
codes are no oracle. An all-zero block keeps absmax 0 and the code of zero.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
"""

import torch
from torch import Tensor

from minift.quant.codebooks import NearestCode, dynamic_map, nearest_dynamic

# Division by the scale of an all-zero block must not make NaN; the stored scale stays 0 (bitsandbytes' constant).
TINY = 1e-38


def quantize_blockwise(x: Tensor, code: Tensor | None = None, blocksize: int = 256) -> tuple[Tensor, Tensor]:
    """Quantize to 8 bits in blocks over the flattened tensor; the last block may be short.

    Args:
        x: floating point, any shape, finite.
        code: fp32 [256] codebook; None is the signed dynamic map.
        blocksize: values per scale.

    Returns:
        codes: uint8, shape of x.
        absmax: fp32 [ceil(n / blocksize)].
    """
    x_n = x.detach().reshape(-1).float()
    absmax_m = block_absmax(x_n, blocksize)
    normalized_n = scale_blocks_(x_n.clone(), 1.0 / absmax_m.clamp(min=TINY), blocksize)
    nearest = nearest_dynamic(True, x.device) if code is None else NearestCode(code.cpu(), ties="even").to(x.device)
    return nearest(normalized_n).view(x.shape), absmax_m


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor | None = None, blocksize: int = 256, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Invert `quantize_blockwise`: fp32 entry x fp32 absmax, rounded once to `dtype`. Shape of `codes`.

    Raises:
        ValueError: not one scale for each block.
    """
    blocks = -(-codes.numel() // blocksize)
    if absmax.numel() != blocks:
        raise ValueError(f"{codes.numel()} codes in blocks of {blocksize} need {blocks} scales, got {absmax.numel()}")
    code = dynamic_map(True) if code is None else code
    values_n = code.to(codes.device).index_select(0, codes.reshape(-1).int())
    return scale_blocks_(values_n, absmax, blocksize).to(dtype).view(codes.shape)


def block_absmax(x_n: Tensor, blocksize: int) -> Tensor:
    """Largest magnitude of each block, fp32 [n] -> fp32 [ceil(n / blocksize)].

    Raises:
        ValueError: if x has no element, or holds NaN or infinity, which no scale can represent.
    """
    if x_n.numel() == 0:
        raise ValueError("cannot quantize an empty tensor")
    full = x_n.numel() - x_n.numel() % blocksize
    absmax_m = x_n[:full].view(-1, blocksize).abs().amax(dim=1)
    if full < x_n.numel():
        absmax_m = torch.cat([absmax_m, x_n[full:].abs().amax().view(1)])
    if not absmax_m.isfinite().all():
        kind = "NaN" if absmax_m.isnan().any() else "infinite"
        raise ValueError(f"cannot quantize: the tensor holds {kind} values")
    return absmax_m


def scale_blocks_(x_n: Tensor, scale_m: Tensor, blocksize: int) -> Tensor:
    """Multiply each block of x by its scale, in place."""
    full = x_n.numel() - x_n.numel() % blocksize
    x_n[:full].view(-1, blocksize).mul_(scale_m[: full // blocksize].unsqueeze(1))
    x_n[full:].mul_(scale_m[full // blocksize :])
    return x_n
