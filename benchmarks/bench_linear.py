"""A linear layer with an NF4 weight (double quantization, bf16) against bitsandbytes' Linear4bit and plain bf16.

Both hold the same packed bytes and scales. On a CPU bitsandbytes' layer is in training mode: in evaluation mode it
repacks its weight for AVX512 and rounds the scales to bf16, which changes the results. A text is decoded in that mode
all the same, so one row shows it, as one to lose.

The plain bf16 rows are honesty: 4 bits save memory, and a weight that needs no decoding is faster.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_fourbit import KEPT, from_theirs
from benchmarks.harness import Row, Setup, check_close
from minift.quant import Linear4bit

# Rows of x: goal, on a CPU (compiled) of the forward pass, on a GPU of forward + backward.
CPU_GOALS = {32: 1.3, 256: 1.25, 1024: 1.05}
CUDA_GOALS = {512: 1.25, 2048: 1.1, 8192: 1.03}
# The same decoded weight and the same matrix product: the same bits.
DECODED = 0.0
# Kernels that never write the weight out round entry, scale, their product and the product with x to bf16: 2^-9 each,
# and 2^-9 for the result, independent of the signs, so at most 5 x 2^-9 of the norm; ours rounds once more.
FUSED = 6 * 2**-9


def rows(setup: Setup) -> Iterator[Row]:
    on_cuda = setup.device.type == "cuda"
    side = setup.size(4096)
    fused = FUSED if on_cuda else DECODED
    for full, goal in (CUDA_GOALS if on_cuda else CPU_GOALS).items():
        tokens = setup.size(full)
        yield peer_row(setup, tokens, side, "forward", forward, fused, setup.goal(compiled=goal))
        yield peer_row(setup, tokens, side, "forward + backward", forward_backward, fused, setup.goal(cuda=goal))
    if not on_cuda:  # where their new weight costs no page faults, their decoding wins
        yield peer_row(setup, setup.size(256), side, "forward", forward, fused, None, kept_memory=True)
        yield peer_row(setup, setup.size(256), setup.size(2048), "forward", forward, fused, None)
    yield peer_row(setup, 1, side, "forward", forward, fused, setup.goal(cuda=0.9))
    if not on_cuda:
        yield peer_row(setup, 1, side, "forward, the peer's evaluation mode", forward, FUSED, None, evaluate=True)
    for tokens in (1, setup.size(2048 if on_cuda else 256)):
        yield plain_row(setup, tokens, side, fused)


def peer_row(
    setup: Setup,
    tokens: int,
    side: int,
    what: str,
    call: Callable[[nn.Module, Tensor], tuple[Tensor, ...]],
    limit: float,
    goal: float | None,
    evaluate: bool = False,
    kept_memory: bool = False,
) -> Row:
    """Linear4bit against Linear4bit."""
    x, ours, theirs = layers(setup, tokens, side)
    theirs.train(not evaluate)
    return Row(
        name=f"{what}, {_rows(tokens)}, {side}x{side}{KEPT if kept_memory else ''}",
        inputs=setup.rotate((x, ours, theirs), ours.weight.nbytes + x.nbytes),
        ours=lambda held: call(held[1], held[0]),
        theirs=lambda held: call(held[2], held[0]),
        check=partial(_check, limit=limit),
        goal=goal,
        honest=evaluate or kept_memory,
        kept_memory=kept_memory,
    )


def plain_row(setup: Setup, tokens: int, side: int, limit: float) -> Row:
    """Linear4bit against the same weight, decoded once and kept in bf16."""
    x, ours, _ = layers(setup, tokens, side)
    plain = nn.Linear(side, side, bias=False, device="meta")
    plain.weight = nn.Parameter(ours.dequantize(), requires_grad=False)
    return Row(
        name=f"forward against plain bf16, {_rows(tokens)}, {side}x{side}",
        inputs=setup.rotate((x, ours, plain), ours.weight.nbytes + x.nbytes),
        ours=lambda held: forward(held[1], held[0]),
        theirs=lambda held: (F.linear(held[0].detach(), held[2].weight),),
        check=partial(_check, limit=limit),
        honest=True,
    )


def layers(setup: Setup, tokens: int, side: int) -> tuple[Tensor, Linear4bit, Any]:
    """x that wants a gradient, our layer, their layer; both layers hold their packed weight."""
    kind: Any = bitsandbytes.nn.Params4bit
    theirs: Any = bitsandbytes.nn.Linear4bit(
        side, side, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    weight_oi = (torch.randn(side, side) * 0.02).bfloat16()
    theirs.weight = kind(weight_oi, requires_grad=False, compress_statistics=True, quant_type="nf4", module=theirs)
    theirs = theirs.to(setup.device)
    ours = Linear4bit(side, side, dtype=torch.bfloat16, device=setup.device)
    ours.set_packed(theirs.weight.data, from_theirs(theirs.weight.quant_state))
    return torch.randn(tokens, side, dtype=torch.bfloat16, device=setup.device).requires_grad_(), ours, theirs


def forward(layer: nn.Module, x: Tensor) -> tuple[Tensor]:
    """(y,) without gradients."""
    with torch.no_grad():
        return (layer(x.detach()),)


def forward_backward(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, dx) for the gradient y: any one does."""
    y = layer(x)
    (grad_x,) = torch.autograd.grad(y, x, y.detach())
    return y.detach(), grad_x


def _rows(tokens: int) -> str:
    return "1 row" if tokens == 1 else f"{tokens} rows"


def _check(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], limit: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        check_close(mine, other, limit)
