"""4-bit quantization: two values in a byte, one scale for 64 of them, and the scales quantized again.

The layout, for a weight of n values in row-major order:

    values    x0    x1    x2    x3   ...  x63 | x64  ...           blocks of 64 run over the flattened tensor
    codes     4 bits each: the nearest of 16 codebook entries to x / absmax(block)
    bytes    [x0 x1][x2 x3] ...                                    even element in the HIGH nibble, odd in the low one
    absmax    one fp32 per block: 32 bits / 64 = 0.5 bit a value

**Double quantization** stores those scales in 8 bits, too. They are all positive, so their mean is subtracted first:

    offset = mean(absmax);   nested codes, nested absmax = quantize_blockwise(absmax - offset, blocksize=256)

    0.5 bit  ->  8/64 + 32/(64*256) = 0.127 bit a value;   4.127 bits in all, 0.516 bytes a parameter

**Storage dtype.** The bytes may be viewed as a tensor of another dtype (`quant_storage`), as bf16, say: FSDP shards a
layer as one flat buffer, which needs one dtype for all of its tensors. Such numbers mean nothing, and casting them
(`.to(dtype)` instead of `.view(dtype)`) destroys the weight.

Dequantizing is fp32 entry x fp32 scale, rounded once to the output dtype, the same on every device. The scale itself is
`nested code x nested absmax`, rounded, `+ offset`, rounded.

Equal bit for bit to bitsandbytes on a CPU (`functional.quantize_4bit`), including a detail: full blocks are multiplied
by the reciprocal of their scale, a short last block is divided by it. Two differences are deliberate: NaN and infinity
are refused, and nested codes are the exactly nearest ones (its CPU table is not exact, see blockwise.py). In a zero
block the code is that of zero (bytes 0x77 for NF4), as on its CPU; its CUDA kernel writes 0x00, which also decodes to
zero.

Sources: QLoRA, arXiv 2305.14314; bitsandbytes 0.50.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from minift.quant import compiled
from minift.quant.blockwise import (
    BLOCKSIZES,
    block_absmax,
    check_input,
    check_scales,
    dequantize_blockwise,
    quantize_blockwise,
    scale_blocks_,
)
from minift.quant.codebooks import TINY, codebook, dynamic_map, nearest_4bit

NESTED_BLOCKSIZE = 256


@dataclass(frozen=True, eq=False)
class QuantState:
    """What is needed besides the packed bytes to get the weight back.

    Attributes:
        shape, dtype: of the tensor that was quantized.
        quant_type: "nf4" or "fp4".
        blocksize: values per scale.
        absmax: scales, fp32 [m]; with double quantization their 8-bit codes, uint8 [m].
        nested_absmax: scales of the scales, fp32 [ceil(m / 256)]; None without double quantization.
        nested_offset: mean of the scales, fp32 []; None without double quantization.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None


def quantize_4bit(
    x: Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize a floating-point tensor to packed 4-bit codes.

    Args:
        x: fp32, bf16 or fp16, any shape, finite, not empty.
        quant_type: "nf4" or "fp4".
        blocksize: a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        quant_storage: dtype that the packed bytes are viewed as.

    Returns:
        packed: `quant_storage` [ceil(n / 2) / itemsize, 1]; an odd tensor is padded with one zero.
        state: what `dequantize_4bit` needs.

    Raises:
        ValueError: another dtype, type or block size; x is empty or holds NaN or infinity; the bytes do not fill whole
            elements of `quant_storage`.
    """
    check_format(quant_type, blocksize)
    check_input(x)
    n_bytes = -(-x.numel() // 2)
    if n_bytes % quant_storage.itemsize:
        raise ValueError(
            f"{n_bytes} packed bytes are no whole number of {quant_storage} elements; choose quant_storage=torch.uint8"
        )
    packed, absmax_m = torch.ops.minift.quantize_4bit(x.detach(), quant_type, blocksize)
    check_scales(absmax_m)
    packed = packed.view(-1).view(quant_storage).unsqueeze(1)
    if not double_quant:
        return packed, QuantState(tuple(x.shape), x.dtype, quant_type, blocksize, absmax_m)
    offset = absmax_m.mean()
    nested_codes_m, nested_absmax = quantize_blockwise(absmax_m - offset, blocksize=NESTED_BLOCKSIZE)
    return packed, QuantState(tuple(x.shape), x.dtype, quant_type, blocksize, nested_codes_m, nested_absmax, offset)


def dequantize_4bit(
    packed: Tensor, state: QuantState, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Get the tensor back, in `dtype` (default: the dtype it had). Shape `state.shape`.

    Args:
        packed: the bytes, in any storage dtype.
        out: where to write, contiguous, of `state.shape` and the wanted dtype; None allocates. Memory that was written
            before is ready; a new tensor of some MB costs more in page faults than in arithmetic.

    Raises:
        ValueError: if `packed`, the scales or `out` do not have the sizes and types that `state` implies.
    """
    check_state(packed, state)
    scales = (state.absmax, state.nested_absmax, state.nested_offset)
    form = (packed_bytes(packed), *scales, state.quant_type, state.blocksize)
    dtype = dtype or state.dtype
    if out is None:
        return torch.ops.minift.dequantize_4bit(*form, state.shape, dtype)
    if tuple(out.shape) != tuple(state.shape) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out is {tuple(out.shape)} of {out.dtype}; it must be contiguous, {tuple(state.shape)} of {dtype}"
        )
    torch.ops.minift.dequantize_4bit_out(*form, out)
    return out


def packed_bytes(packed: Tensor) -> Tensor:
    """Packed codes of any storage dtype as uint8 [ceil(n / 2)]."""
    return packed.reshape(-1).view(torch.uint8)


def check_state(packed: Tensor, state: QuantState) -> None:
    """Refuse packed codes and scales that do not belong together."""
    n = prod(state.shape)
    blocks = -(-n // state.blocksize)
    if packed.nbytes != -(-n // 2):
        raise ValueError(
            f"packed holds {packed.nbytes} bytes ({packed.numel()} of {packed.dtype}); "
            f"a weight of shape {state.shape} needs {-(-n // 2)}"
        )
    nested = state.nested_absmax is not None or state.nested_offset is not None
    needed: dict[str, tuple[Tensor | None, torch.dtype, int]] = {
        "absmax": (state.absmax, torch.uint8 if nested else torch.float32, blocks),
    }
    if nested:
        needed["nested_absmax"] = (state.nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE))
        needed["nested_offset"] = (state.nested_offset, torch.float32, 1)
    for name, (tensor, dtype, size) in needed.items():
        if tensor is None or tensor.dtype != dtype or tensor.numel() != size:
            found = "nothing" if tensor is None else f"{tensor.numel()} of {tensor.dtype}"
            raise ValueError(f"{name} holds {found}; a weight of shape {state.shape} needs {size} of {dtype}")


def check_format(quant_type: str, blocksize: int) -> None:
    """Refuse a 4-bit type or block size that does not exist."""
    codebook(quant_type)
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"4-bit blocksize {blocksize}: choose a power of two from 32 to 4096")


def _normalize(x_n: Tensor, absmax_m: Tensor, blocksize: int) -> Tensor:
    divisor_m = absmax_m.clamp(min=TINY)
    full = x_n.numel() - x_n.numel() % blocksize
    normalized_n = torch.empty_like(x_n)
    # Multiplying by a rounded reciprocal can differ from dividing by one unit in the last place, so the codes of values
    # next to a midpoint depend on which of the two is done.
    reciprocal = (1.0 / divisor_m[: full // blocksize]).unsqueeze(1)
    torch.mul(x_n[:full].view(-1, blocksize), reciprocal, out=normalized_n[:full].view(-1, blocksize))
    torch.div(x_n[full:], divisor_m[full // blocksize :], out=normalized_n[full:])
    return normalized_n  # a hair above 1 after rounding is still nearest to the last code


# --- the operators: the bodies below are the reference and the CPU path; a CUDA tensor goes to the Triton kernels -----

# Defined with torch.library's plain functions: `custom_op` would import the compiler (1.5 s, 150 MB) at the first call.
torch.library.define("minift::quantize_4bit", "(Tensor x, str quant_type, int blocksize) -> (Tensor, Tensor)")
# The arguments that make up a 4-bit weight.
WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, str quant_type, int blocksize"
torch.library.define("minift::dequantize_4bit", f"({WEIGHT}, SymInt[] shape, ScalarType dtype) -> Tensor")
torch.library.define("minift::dequantize_4bit_out", f"({WEIGHT}, Tensor(a!) out) -> ()")


@torch.library.impl("minift::quantize_4bit", "default")
def _quantize_4bit(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """x -> packed codes uint8 [ceil(n / 2), 1], scales fp32 [m]."""
    if compiled.applies(x, x.numel(), blocksize):
        return compiled.quantize_4bit(x, quant_type, blocksize)
    x_n = x.reshape(-1).float()
    absmax_m = block_absmax(x_n, blocksize)
    normalized_n = _normalize(x_n, absmax_m, blocksize)
    if len(normalized_n) % 2:
        normalized_n = torch.cat([normalized_n, normalized_n.new_zeros(1)])
    codes_n = nearest_4bit(quant_type, x.device)(normalized_n)
    return ((codes_n[::2] << 4) | codes_n[1::2]).unsqueeze(1), absmax_m


@torch.library.impl("minift::quantize_4bit", "cuda")
def _quantize_4bit_cuda(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    from minift_kernels.fourbit import quantize_4bit

    nearest = nearest_4bit(quant_type, x.device)
    return quantize_4bit(x.contiguous(), nearest.boundaries, nearest.order, blocksize)


@torch.library.register_fake("minift::quantize_4bit")
def _quantize_4bit_fake(x, quant_type, blocksize):
    n = x.numel()
    return x.new_empty(((n + 1) // 2, 1), dtype=torch.uint8), x.new_empty(-(-n // blocksize), dtype=torch.float32)


@torch.library.impl("minift::dequantize_4bit", "default")
def _dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """packed uint8, scales (see QuantState) -> tensor of `shape` and `dtype`, on any device."""
    out = packed.new_empty(shape, dtype=dtype)
    torch.ops.minift.dequantize_4bit_out(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out)
    return out


@torch.library.impl("minift::dequantize_4bit_out", "default")
def _dequantize_4bit_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out: Tensor,
) -> None:
    """The same, written to `out`."""
    if nested_absmax is not None and nested_offset is not None:
        absmax = dequantize_blockwise(absmax, nested_absmax, blocksize=NESTED_BLOCKSIZE) + nested_offset
    n = out.numel()
    # Compiled, two bf16 values are written as one int32, which must lie at a multiple of 4 bytes.
    if out.dtype == torch.bfloat16 and out.data_ptr() % 4 == 0 and compiled.applies(packed, n, blocksize):
        return compiled.dequantize_4bit(packed, absmax, quant_type, out)
    indices = packed.reshape(-1).int()
    values_n = workspace(2 * len(indices), torch.float32, packed.device, "values")
    # Both nibbles of a byte at once: a 256-entry table of fp32 pairs, gathered as 8-byte words.
    torch.index_select(_value_pairs(quant_type, packed.device), 0, indices, out=values_n.view(torch.int64))
    out.view(-1).copy_(scale_blocks_(values_n[:n], absmax, blocksize))


@torch.library.impl("minift::dequantize_4bit_out", "cuda")
def _dequantize_4bit_cuda(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out: Tensor,
) -> None:
    from minift_kernels.fourbit import dequantize_4bit

    weight = (None if part is None else part.contiguous() for part in (packed, absmax, nested_absmax, nested_offset))
    tables = code_tables(quant_type, packed.device)
    dequantize_4bit(*weight, *tables, blocksize, out.shape, out.dtype, out.view(-1))  # pyright: ignore


@torch.library.register_fake("minift::dequantize_4bit")
def _dequantize_4bit_fake(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("minift::dequantize_4bit_out")
def _dequantize_4bit_out_fake(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out):
    return None


@cache
def code_tables(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 values of the type and the 256 of its nested scales, copied to the device once."""
    return codebook(quant_type).to(device), dynamic_map(True).to(device)


@cache
def _value_pairs(quant_type: str, device: torch.device) -> Tensor:
    """For each byte, the fp32 values of its high and low nibble, viewed as one int64: [256]."""
    byte = torch.arange(256)
    code = codebook(quant_type)
    return torch.stack([code[byte >> 4], code[byte & 0xF]], dim=1).view(torch.int64).view(-1).to(device)


_local = threading.local()


def workspace(n: int, dtype: torch.dtype, device: torch.device, purpose: str) -> Tensor:
    """[n] scratch memory, kept between calls, one per thread, device, dtype and purpose; overwritten by the next user.

    A fresh buffer of a few MB costs more in page faults than the arithmetic: 1.5 against 0.4 ns a value on two cores.
    """
    held = _local.__dict__.setdefault("held", {})
    key = (dtype, device, purpose)
    if key not in held or held[key].numel() < n:
        with torch.inference_mode(False):  # a buffer born in inference mode could never be written to outside it
            held[key] = torch.empty(n, dtype=dtype, device=device)
    return held[key][:n]
