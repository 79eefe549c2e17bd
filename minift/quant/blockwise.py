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

The division is a multiplication by the rounded reciprocal of the scale, in full and short blocks alike.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
"""

import torch
from torch import Tensor

from minift.numerics.dtypes import DTYPES
from minift.quant import compiled
from minift.quant.codebooks import TINY, NearestCode, dynamic_map, nearest_dynamic

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def quantize_blockwise(x: Tensor, code: Tensor | None = None, blocksize: int = 256) -> tuple[Tensor, Tensor]:
    """Quantize to 8 bits in blocks over the flattened tensor; the last block may be short.

    Args:
        x: fp32, bf16 or fp16, any shape, finite, not empty.
        code: fp32 [256] codebook; None is the signed dynamic map.
        blocksize: values per scale, a power of two from 32 to 4096.

    Returns:
        codes: uint8, shape of x.
        absmax: fp32 [ceil(n / blocksize)].

    Raises:
        ValueError: another dtype, block size or codebook; x is empty or holds NaN or infinity.
    """
    check_input(x)
    _check_format(code, blocksize)
    code = dynamic_map(True) if code is None else code.cpu()
    signed = next((signed for signed in (True, False) if torch.equal(code, dynamic_map(signed))), None)
    if signed is None:
        search = NearestCode(code, ties="even").to(x.device)
        codes, absmax_m = _quantize_with(search, x.detach(), blocksize)
    else:
        codes, absmax_m = torch.ops.minift.quantize_blockwise(x.detach(), signed, blocksize)
    check_scales(absmax_m)
    return codes, absmax_m


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor | None = None, blocksize: int = 256, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Invert `quantize_blockwise`: fp32 entry x fp32 absmax, rounded once to `dtype`. Shape of `codes`.

    Raises:
        ValueError: codes or scales of another type, not one scale for each block, another block size or codebook.
    """
    _check_format(code, blocksize)
    blocks = -(-codes.numel() // blocksize)
    if codes.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise ValueError(f"codes must be torch.uint8 and scales torch.float32, got {codes.dtype} and {absmax.dtype}")
    if absmax.numel() != blocks:
        raise ValueError(f"{codes.numel()} codes in blocks of {blocksize} need {blocks} scales, got {absmax.numel()}")
    code = dynamic_map(True) if code is None else code
    return torch.ops.minift.dequantize_blockwise(codes, absmax, code.to(codes.device), blocksize, dtype)


def check_input(x: Tensor) -> None:
    """Refuse what has no scale: other dtypes than fp32, bf16 and fp16, and tensors without an element."""
    if x.dtype not in DTYPES.values():
        raise ValueError(f"cannot quantize {x.dtype}; supported: {', '.join(DTYPES)}")
    if x.numel() == 0:
        raise ValueError("cannot quantize an empty tensor")


def check_scales(absmax_m: Tensor) -> None:
    """Refuse scales that show NaN or infinity in their block, which no scale can represent.

    Looking at one scale for each block costs less than looking at every value: both survive taking the largest.
    """
    if not absmax_m.isfinite().all():
        kind = "NaN" if absmax_m.isnan().any() else "infinite"
        raise ValueError(f"cannot quantize: the tensor holds {kind} values")


def block_absmax(x_n: Tensor, blocksize: int) -> Tensor:
    """Largest magnitude of each block, fp32 [n] -> fp32 [ceil(n / blocksize)]; NaN and infinity come through."""
    full = x_n.numel() - x_n.numel() % blocksize
    absmax_m = x_n[:full].view(-1, blocksize).abs().amax(dim=1)
    if full < x_n.numel():
        absmax_m = torch.cat([absmax_m, x_n[full:].abs().amax().view(1)])
    return absmax_m


def scale_blocks_(x_n: Tensor, scale_m: Tensor, blocksize: int) -> Tensor:
    """Multiply each block of x by its scale, in place."""
    full = x_n.numel() - x_n.numel() % blocksize
    x_n[:full].view(-1, blocksize).mul_(scale_m[: full // blocksize].unsqueeze(1))
    x_n[full:].mul_(scale_m[full // blocksize :])
    return x_n


def _check_format(code: Tensor | None, blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"8-bit blocksize {blocksize}: choose a power of two from 32 to 4096")
    if code is not None and (code.dtype != torch.float32 or code.shape != (256,)):
        raise ValueError(f"a codebook is 256 torch.float32 values, got {tuple(code.shape)} of {code.dtype}")


def _quantize_with(search: NearestCode, x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    x_n = x.reshape(-1).float()
    absmax_m = block_absmax(x_n, blocksize)
    normalized_n = scale_blocks_(x_n.clone(), 1.0 / absmax_m.clamp(min=TINY), blocksize)
    return search(normalized_n).view(x.shape), absmax_m


# --- the operators: the bodies below are the reference and the CPU path; a CUDA tensor goes to the Triton kernels -----

# Defined with torch.library's plain functions: `custom_op` would import the compiler (1.5 s, 150 MB) at the first call.
torch.library.define("minift::quantize_blockwise", "(Tensor x, bool signed, int blocksize) -> (Tensor, Tensor)")
torch.library.define(
    "minift::dequantize_blockwise",
    "(Tensor codes, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
)


@torch.library.impl("minift::quantize_blockwise", "default")
def _quantize_blockwise(x: Tensor, signed: bool, blocksize: int) -> tuple[Tensor, Tensor]:
    """x -> codes of the signed or unsigned dynamic map, scales."""
    if compiled.applies(x, x.numel(), blocksize):
        codes_n, absmax_m = compiled.quantize_8bit(x, nearest_dynamic(signed, x.device), blocksize)
        return codes_n.view(x.shape), absmax_m
    return _quantize_with(nearest_dynamic(signed, x.device), x, blocksize)


@torch.library.impl("minift::quantize_blockwise", "cuda")
def _quantize_blockwise_cuda(x: Tensor, signed: bool, blocksize: int) -> tuple[Tensor, Tensor]:
    from minift_kernels.blockwise import quantize_blockwise

    return quantize_blockwise(x.contiguous(), nearest_dynamic(signed, x.device).boundaries, signed, blocksize)


@torch.library.register_fake("minift::quantize_blockwise")
def _quantize_blockwise_fake(x, signed, blocksize):
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(-(-x.numel() // blocksize), dtype=torch.float32)


@torch.library.impl("minift::dequantize_blockwise", "default")
def _dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """codes uint8, scales fp32, codebook fp32 -> tensor of the shape of codes and `dtype`."""
    values_n = code.index_select(0, codes.reshape(-1).int())
    return scale_blocks_(values_n, absmax, blocksize).to(dtype).view(codes.shape)


@torch.library.impl("minift::dequantize_blockwise", "cuda")
def _dequantize_blockwise_cuda(
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    from minift_kernels.blockwise import dequantize_blockwise

    return dequantize_blockwise(codes.contiguous(), absmax.contiguous(), code.contiguous(), blocksize, dtype)


@torch.library.register_fake("minift::dequantize_blockwise")
def _dequantize_blockwise_fake(codes, absmax, code, blocksize, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)
