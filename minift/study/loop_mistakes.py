"""A training loop of ten lines, and the same ten lines in another order.

    right                 forward, loss, clear, backward, clip, step
    never cleared         gradients of all steps so far are added up: the step goes on in old directions
    clipped after step    clipping is done, to gradients that have been used already
    step before backward  each step uses the gradients of the batch before

None of them raises an error. The data are a line with noise, y = 2 x1 - 1 x2 + ..., with one batch of wild targets in
the middle, which is what clipping is for: of that batch, the gradients are some hundred times as long as they should
be.

The optimizer is plain gradient descent: Adam divides by the size of the gradients and hides much of this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Line = Literal["clear", "backward", "clip", "step"]
LOOPS: dict[str, tuple[Line, ...]] = {
    "right": ("clear", "backward", "clip", "step"),
    "never cleared": ("backward", "clip", "step"),
    "clipped after step": ("clear", "backward", "step", "clip"),
    "step before backward": ("clip", "step", "clear", "backward"),
}
WIDTH, ROWS, WILD = 8, 16, 12  # numbers of a row, rows of a batch, the step of the wild batch


@dataclass(frozen=True)
class LoopRun:
    """What a loop did.

    Attributes:
        losses: of all data but the wild batch, after each step; the first before any.
        norms: of the gradients, at the time of each step.
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]


def run_loop(lines: Sequence[Line], steps: int = 40, lr: float = 0.1, max_norm: float = 1.0) -> LoopRun:
    """Run the loop whose body is these lines, in this order, on the same data from the same weights."""
    generator = torch.Generator().manual_seed(0)
    x_nsd = torch.randn(steps, ROWS, WIDTH, generator=generator)
    true_d = torch.randn(WIDTH, generator=generator)
    y_ns = x_nsd @ true_d + 0.1 * torch.randn(steps, ROWS, generator=generator)
    wild_ns = y_ns.clone()
    wild_ns[WILD] *= 100
    weight = nn.Parameter(torch.zeros(WIDTH))
    optimizer = torch.optim.SGD([weight], lr=lr)
    losses, norms = [_loss(weight, x_nsd, y_ns).item()], []
    for x_sd, y_s in zip(x_nsd, wild_ns, strict=True):
        loss = _loss(weight, x_sd, y_s)
        for line in lines:
            if line == "clear":
                optimizer.zero_grad()
            elif line == "backward":
                loss.backward()
            elif line == "clip":
                nn.utils.clip_grad_norm_([weight], max_norm)
            else:
                norms.append(0.0 if weight.grad is None else weight.grad.norm().item())
                optimizer.step()
        losses.append(_loss(weight, x_nsd, y_ns).item())
    return LoopRun(tuple(losses), tuple(norms))


def run_loops() -> dict[str, LoopRun]:
    """All of LOOPS."""
    return {name: run_loop(lines) for name, lines in LOOPS.items()}


def _loss(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (x @ weight - y).square().mean()
