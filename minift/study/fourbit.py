"""What four bits cost: the error of a codebook on real weights, and how much of it the block size decides.

A value comes back as the nearest entry of a codebook times the largest magnitude of its block. Two things make it
wrong: entries that lie where no weights are, and a block whose largest value is far above all others. `decode_with`
takes any codebook, so that tables can be compared that the library does not store anything in.

Errors are relative: the root mean square of what is lost over that of the weights.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minift.quant.blockwise import block_absmax
from minift.quant.codebooks import TINY, codebook, symmetric_quantiles
from minift.quant.model import relative_error


def codebooks() -> dict[str, Tensor]:
    """Four tables of at most 16 entries to compare, each in rising order, fp32.

    NF4 and FP4, the symmetric quantiles that are often printed as NF4, and the 15 equal steps of `quantize_absmax`.
    """
    return {
        "NF4": codebook("nf4"),
        "FP4": codebook("fp4").unique(),
        "symmetric": symmetric_quantiles(),
        "equal steps": torch.arange(-7, 8) / 7,
    }


def quotients(weight: Tensor, blocksize: int = 64) -> Tensor:
    """Each value over the largest magnitude of its block, fp32, the shape of the weight."""
    flat_n = weight.detach().float().reshape(-1)
    return (flat_n / _scale_of_each(flat_n, blocksize).clamp(min=TINY)).view(weight.shape)


def decode_with(weight: Tensor, code: Tensor, blocksize: int = 64) -> Tensor:
    """Quantize with any codebook and decode again, fp32, the shape of the weight.

    Args:
        weight: floating point, finite, not empty.
        code: the entries in rising order, fp32 [k].
        blocksize: values that share a scale, over the flattened tensor; the last block may be short.
    """
    if not bool((code.diff() > 0).all()):
        raise ValueError("the entries of the codebook are not in rising order: sort them, each once")
    nearest = torch.bucketize(quotients(weight, blocksize), (code[:-1] + code[1:]) / 2)
    scale_n = _scale_of_each(weight.detach().float().reshape(-1), blocksize)
    return code[nearest] * scale_n.view(weight.shape)


def errors_by_blocksize(
    weight: Tensor, codes: Mapping[str, Tensor], blocksizes: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
) -> dict[str, list[float]]:
    """Relative error for each codebook, in the order of the block sizes."""
    return {
        name: [relative_error(weight, decode_with(weight, code, size)) for size in blocksizes]
        for name, code in codes.items()
    }


def bits_per_weight(blocksize: int = 64, double_quant: bool = False, nested_blocksize: int = 256) -> float:
    """Bits for each weight of a large tensor: the code and its share of the scales."""
    scale = 8 + 32 / nested_blocksize if double_quant else 32
    return 4 + scale / blocksize


def code_shares(weight: Tensor, code: Tensor, blocksize: int = 64) -> list[float]:
    """Which share of the values gets each entry of a codebook (in rising order)."""
    nearest = torch.bucketize(quotients(weight, blocksize), (code[:-1] + code[1:]) / 2)
    return (torch.bincount(nearest.flatten(), minlength=len(code)) / weight.numel()).tolist()


def _scale_of_each(flat_n: Tensor, blocksize: int) -> Tensor:
    """The largest magnitude of the block in which each value lies."""
    return block_absmax(flat_n, blocksize).repeat_interleave(blocksize)[: len(flat_n)]
