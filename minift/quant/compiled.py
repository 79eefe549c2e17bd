"""The same arithmetic on a CPU, compiled: quantizing several times faster, to the same bits.

PyTorch's eager operators each read and write whole tensors: to decode a weight, one gathers, one multiplies, one
rounds. `torch.compile` makes one loop of them that keeps everything in registers and uses the processor's vector
instructions. These have no cheap table look-up, so the formulas change, not the numbers:

    nearest of 16   the code is the number of midpoints below x:       (x > m0) + (x > m1) + ... + (x > m14)
    entry of 16     a tree of 15 selections on the 4 bits of the code
    two bf16        are rounded by hand and written as one int32, because writing every second value is slow

Measured against bitsandbytes in benchmarks/ (names ending in "compiled"). It is off until `compile_kernels()` is
called, once a process: the first call of each kernel takes seconds, importing the compiler takes memory, and it needs a
C++ compiler (g++ or clang). Without one, the eager forms stay. Tensors that do not consist of whole blocks, and
decoding to another type than bf16, always take the eager forms.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from minift.quant.codebooks import TINY, NearestCode, codebook, nearest_4bit

_enabled = False


def compile_kernels(on: bool = True) -> bool:
    """Use compiled forms of quantization and decoding on the CPU in this process, or stop using them.

    Returns:
        whether they are in use now. False with a warning if this machine has no working C++ compiler.
    """
    global _enabled
    if on and not _enabled:
        try:
            torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(8))
        except Exception as error:  # whatever a broken tool chain does: missing, not executable, wrong version
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"no working C++ compiler, so nothing is compiled: {reason}", stacklevel=2)
            return False
    _enabled = on
    return on


def applies(x: Tensor, n: int, blocksize: int) -> bool:
    """Whether the compiled forms serve this tensor: switched on, on a CPU, whole blocks."""
    return _enabled and x.device.type == "cpu" and n > 0 and n % blocksize == 0


def quantize_4bit(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Any float dtype and shape -> packed codes uint8 [n / 2, 1], scales fp32 [m]."""
    packed_mc, absmax_m = _quantizer_4bit(quant_type)(x.reshape(-1, blocksize))
    return packed_mc.view(-1, 1), absmax_m


def dequantize_4bit(packed: Tensor, scale_m: Tensor, quant_type: str, out: Tensor) -> None:
    """Packed codes and fp32 scales -> values, written to `out`, bf16 [n]."""
    blocks = scale_m.numel()
    _dequantizer_4bit(quant_type)(packed.view(blocks, -1), scale_m.view(-1, 1), out.view(torch.int32).view(blocks, -1))


def quantize_8bit(x: Tensor, nearest: NearestCode, blocksize: int) -> tuple[Tensor, Tensor]:
    """Any float dtype and shape -> codes uint8 [n], scales fp32 [m]. The codebook must be in rising order."""
    codes_mc, absmax_m = _quantizer_8bit()(x.reshape(-1, blocksize), cells(nearest))
    return codes_mc.view(-1), absmax_m


@cache
def _quantizer_4bit(quant_type: str):
    nearest = nearest_4bit(quant_type, torch.device("cpu"))
    midpoints, order = nearest.boundaries.tolist(), nearest.order.tolist()

    def quantize(x_mc: Tensor) -> tuple[Tensor, Tensor]:
        normalized_mc, absmax_m = _normalize(x_mc)
        rank_mc = torch.zeros_like(normalized_mc, dtype=torch.int32)
        for midpoint in midpoints:
            rank_mc = rank_mc + (normalized_mc > midpoint)
        code_mc = rank_mc if order == sorted(order) else _select(order, rank_mc)
        pairs = code_mc.view(x_mc.shape[0], -1, 2)
        return ((pairs[..., 0] << 4) | pairs[..., 1]).to(torch.uint8), absmax_m

    return torch.compile(quantize)


@cache
def _dequantizer_4bit(quant_type: str):
    values = codebook(quant_type).tolist()

    def dequantize(packed_mc: Tensor, scale_m1: Tensor, out_mc: Tensor) -> None:
        byte = packed_mc.int()
        high, low = (_bf16_bits(_select(values, code) * scale_m1) for code in (byte >> 4, byte & 0xF))
        out_mc.copy_(high | (low << 16))  # little-endian: the even element has the lower address

    return torch.compile(dequantize)


@cache
def _quantizer_8bit():
    return torch.compile(encode_blocks)


def encode_blocks(x_mc: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Values [m, c] -> codes uint8 [m, c] and scales fp32 [m]; to be compiled."""
    normalized_mc, absmax_m = _normalize(x_mc)
    bits_mc = normalized_mc.view(torch.int32)
    cell_mc = cells[(bits_mc >> 16) & 0xFFFF]
    rest_mc = (bits_mc ^ (bits_mc >> 31)) & 0xFFFF
    return ((cell_mc >> 16) + (rest_mc > (cell_mc & 0xFFFF))).to(torch.uint8), absmax_m


@cache
def cells(nearest: NearestCode) -> Tensor:
    """Both tables of NearestCode in one, int32 [65536], since looking up is what takes the time.

    All values of a cell share the top 16 bits, so its midpoint differs from them in the lower 16 alone. The entry is
    rank << 16 | those of the midpoint, or 0xFFFF, which none exceeds; inverted where values fall as patterns rise.
    """
    pattern = torch.arange(1 << 16, dtype=torch.int32)
    inverted = torch.where(pattern >= 1 << 15, 0xFFFF, 0)
    rest = torch.where(nearest.midpoint.isfinite(), (nearest.midpoint.view(torch.int32) & 0xFFFF) ^ inverted, 0xFFFF)
    return (nearest.first_rank.int() << 16) | rest


def _normalize(x_mc: Tensor) -> tuple[Tensor, Tensor]:
    x_mc = x_mc.float()
    absmax_m = x_mc.abs().amax(1)
    return x_mc * (1.0 / absmax_m.clamp(min=TINY)).unsqueeze(1), absmax_m


def _select(values: Sequence[float | int], code: Tensor) -> Tensor:
    """values[code] for 16 values by a tree of selections: level b halves the candidates by bit b."""
    candidates: list = list(values)
    for b in range(4):
        bit = ((code >> b) & 1) != 0
        candidates = [torch.where(bit, odd, even) for even, odd in zip(candidates[::2], candidates[1::2], strict=True)]
    return candidates[0]


def _bf16_bits(x: Tensor) -> Tensor:
    """The bits of fp32 x rounded to bf16, nearest, ties to even; x is not NaN."""
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
