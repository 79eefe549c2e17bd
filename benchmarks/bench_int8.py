"""LLM.int8() against bitsandbytes: quantizing rows with outlier columns, and the linear layer in evaluation mode.

Two columns of x hold values of 20 and more, as in models of some billion parameters; the threshold is 6. The plain fp16
row is honesty: int8 saves memory, and a small layer spends more time on quantizing x than it wins in the product.
"""

from collections.abc import Iterator
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes import functional as theirs_functional
from torch import Tensor, nn

from benchmarks.bench_fourbit import CUDA_CODES_DIFFER
from benchmarks.harness import Row, Setup, check_bits, check_close
from minift.quant import Linear8bit
from minift.quant.int8 import quantize_rows

THRESHOLD = 6.0
# Equal codes, exact sums; each side rounds to fp16 before and after the outlier columns are added, 2^-11 each time.
# bitsandbytes' CPU constant for 1 / 127^2, 1.8e-5 too large, is far below that.
SAME_CODES = 2**-9
# A code is off by half a unit at most, absmax / 254, where absmax < 6; x has standard deviation 1: 6 / 254 < 2^-5.
PLAIN = 2**-5


def rows(setup: Setup) -> Iterator[Row]:
    on_cuda = setup.device.type == "cuda"
    side, tokens = setup.size(4096 if on_cuda else 2048), setup.size(2048 if on_cuda else 256)
    x = torch.randn(tokens, side, device=setup.device).clamp(-5, 5).half()
    yield Row(
        name=f"quantize rows, {tokens}x{side}",
        inputs=setup.rotate(with_outliers(x), x.nbytes),
        ours=lambda x: quantize_rows(x, THRESHOLD),
        theirs=lambda x: theirs_functional.int8_vectorwise_quant(x, THRESHOLD),
        check=_check_rows,
        bytes_moved=3 * x.numel() + 4 * tokens,
    )
    linear = nn.Linear(side, side, bias=False, device=setup.device, dtype=torch.float16)
    linear.requires_grad_(False)
    held = (with_outliers(x), Linear8bit.from_linear(linear), layer_of_theirs(linear))
    yield Row(
        name=f"forward, {tokens} rows, {side}x{side}",
        inputs=setup.rotate(held, side * side + x.nbytes),
        ours=lambda held: _no_grad(held[1], held[0]),
        theirs=lambda held: _no_grad(held[2], held[0]),
        check=lambda ours, theirs: check_close(ours, theirs, SAME_CODES),
    )
    decoded = held[1].dequantize()
    yield Row(
        name=f"forward against plain fp16, {tokens} rows, {side}x{side}",
        inputs=setup.rotate((x, held[1], decoded), side * side + x.nbytes),
        ours=lambda held: _no_grad(held[1], held[0]),
        theirs=lambda held: F.linear(held[0], held[2]),
        check=lambda ours, theirs: check_close(ours, theirs, PLAIN),
        honest=True,
    )


def with_outliers(x: Tensor) -> Tensor:
    """A copy with two outlier columns."""
    x = x.clone()
    x[:, [3, 40]] = x[:, [3, 40]] * 2 + 30
    return x


def layer_of_theirs(linear: nn.Linear) -> Any:
    """Their layer with the same weight; it quantizes what comes from the CPU on its way to the device."""
    layer = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=THRESHOLD
    )
    layer.weight = bitsandbytes.nn.Int8Params(linear.weight.detach().cpu().clone(), requires_grad=False)
    return layer.to(linear.weight.device).eval()


def _no_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def _check_rows(ours: Any, theirs: Any) -> None:
    (codes, absmax, columns), (theirs_codes, theirs_absmax, theirs_columns) = ours, theirs
    check_bits(columns, theirs_columns.long())
    check_bits(absmax, theirs_absmax)
    check_bits(codes, theirs_codes, CUDA_CODES_DIFFER if codes.device.type == "cuda" else 0.0)
