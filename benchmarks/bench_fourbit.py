"""4-bit quantizing and decoding against bitsandbytes: NF4 and FP4, with and without double quantization.

Decoding writes into memory that is used again, as minift's layers do; bitsandbytes has no way to be told where to, and
its new tensor is part of its time.

Least traffic of a call, which the share of the bandwidth refers to, in bytes a value: 2 for the bf16 weight, 1/2 for
its codes, 4/64 for the scales; with double quantization 1/64 and 4/(64 * 256) for the scales instead.
"""

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes import functional as theirs_functional

from benchmarks.harness import Row, Setup, check_bits
from minift.quant import QuantState, dequantize_4bit, quantize_4bit

KEPT = ", no page faults"
SCALES = {False: 4 / 64, True: 1 / 64 + 4 / (64 * 256)}
# On a GPU bitsandbytes multiplies by an approximate reciprocal and its FP4 thresholds are rounded to 6 digits, so
# values within some 1e-7 of the scale next to a threshold may get the neighbouring code, and a bf16 value sits exactly
# on one now and then. One byte in 10,000 is above all that, and far below what a wrong table would change.
CUDA_CODES_DIFFER = 1e-4
DEQUANTIZE_GOALS = {(4096, 4096): 1.4, (4096, 14336): 1.2, (8192, 8192): 1.2}


def rows(setup: Setup) -> Iterator[Row]:
    for side in (4096, 2048):
        for double_quant in (False, True):
            yield quantize_row(setup, side, "nf4", double_quant)
    yield quantize_row(setup, 4096, "fp4", False)
    shapes = list(DEQUANTIZE_GOALS) if setup.device.type == "cuda" else [(4096, 4096), (2048, 2048)]
    for shape in shapes:
        for double_quant in (False, True):
            yield dequantize_row(setup, shape, double_quant)
    if setup.device.type == "cpu":
        yield dequantize_row(setup, shapes[0], double_quant=True, kept_memory=True)


def quantize_row(setup: Setup, side: int, quant_type: str, double_quant: bool) -> Row:
    """bf16 -> packed codes and scales."""
    side, on_cuda = setup.size(side), setup.device.type == "cuda"
    weight_oi = (torch.randn(side, side, device=setup.device) * 0.02).bfloat16()

    def check(ours: Any, theirs: Any) -> None:
        (ours_packed, ours_state), (theirs_packed, theirs_state) = ours, theirs
        check_bits(ours_packed, theirs_packed, CUDA_CODES_DIFFER if on_cuda else 0.0)
        if double_quant:  # its nested codes are not the nearest ones on a CPU, but their scales are the same
            check_bits(ours_state.nested_absmax, theirs_state.state2.absmax)
            check_bits(ours_state.nested_offset, theirs_state.offset)
        else:
            check_bits(ours_state.absmax, theirs_state.absmax)

    return Row(
        name=f"quantize {quant_type.upper()}{_nested(double_quant)}, {side}x{side}",
        inputs=setup.rotate(weight_oi, weight_oi.nbytes),
        ours=lambda x: quantize_4bit(x, quant_type, 64, double_quant),
        theirs=lambda x: theirs_functional.quantize_4bit(
            x, blocksize=64, quant_type=quant_type, compress_statistics=double_quant
        ),
        check=check,
        bytes_moved=side * side * (2.5 + SCALES[double_quant]),
        goal=setup.goal(compiled=7.0, eager=1.2, cuda=1.2) if quant_type == "nf4" else None,
    )


def dequantize_row(setup: Setup, shape: tuple[int, int], double_quant: bool, kept_memory: bool = False) -> Row:
    """Their codes and scales -> bf16, by both."""
    if kept_memory or shape == (2048, 2048):
        goal = None
    elif double_quant:
        goal = setup.goal(compiled=1.5, eager=0.4, cuda=DEQUANTIZE_GOALS.get(shape))
    else:
        goal = setup.goal(eager=0.4, cuda=1.05)
    height, width = (setup.size(side) for side in shape)
    weight_oi = (torch.randn(height, width, device=setup.device) * 0.02).bfloat16()
    packed, state = theirs_functional.quantize_4bit(
        weight_oi, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    held, out = weight_oi.numel() * (0.5 + SCALES[double_quant]), torch.empty_like(weight_oi)
    return Row(
        name=f"decode NF4{_nested(double_quant)}, {height}x{width}{KEPT if kept_memory else ''}",
        inputs=setup.rotate((packed, from_theirs(state), state), int(held)),
        ours=lambda held: dequantize_4bit(held[0], held[1], out=out),
        theirs=lambda held: theirs_functional.dequantize_4bit(held[0], held[2]),
        check=check_bits,
        bytes_moved=held + 2 * weight_oi.numel(),
        goal=goal,
        honest=kept_memory,  # their decoding itself is faster; the time of new memory is most of what is won otherwise
        kept_memory=kept_memory,
    )


def from_theirs(theirs: Any) -> QuantState:
    """bitsandbytes' state as we hold it: the same tensors."""
    nested = theirs.state2
    return QuantState(
        tuple(theirs.shape), theirs.dtype, theirs.quant_type, theirs.blocksize,
        theirs.absmax, nested.absmax if nested else None, theirs.offset,
    )  # fmt: skip


def _nested(double_quant: bool) -> str:
    return " + double quant" if double_quant else ""
