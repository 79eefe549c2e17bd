"""A step of 8-bit AdamW against bitsandbytes: the 448 tensors of a LoRA, and one large tensor.

On a CPU both are Python around PyTorch, and many small tensors cost bitsandbytes many calls. On a GPU it is one launch
against 448, and for the large tensor kernel against kernel. What rounding by chance adds is shown against the same step
without, where it cannot win.
"""

from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import torch

from benchmarks.harness import Row, Setup, check_close
from minift import AdamW, AdamW8bit

# (in, out) of the seven adapted linears of a layer: SmolLM2-135M's on a CPU, an 8B Llama's on a GPU.
WIDTHS = {
    "cpu": [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)],
    "cuda": [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)],
}
LAYERS, RANK = 32, {"cpu": 8, "cuda": 16}
LARGE = {"cpu": 1 << 22, "cuda": 100_000_000}
# Bytes of fp32 parameter (read, written), gradient, codes and scales (read, written).
BYTES = 12 + 2 * 2 * (1 + 4 / 256)
# After a step, of at most lr = 1e-3 for each value. On a CPU both start from zero state and agree to rounding; on a
# GPU bitsandbytes' powers and quotients are approximate, 1e-4 of the step at the beginning.
AGREE = 1e-6


class Step:
    """An optimizer over parameters that have gradients; calling it takes a step and returns a parameter."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype, make: Callable):
        generator = torch.Generator().manual_seed(0)
        self.params = []
        for shape in shapes:
            p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
            p.grad = torch.randn(shape, generator=generator).to(device, dtype)
            self.params.append(p)
        self.optimizer = make(self.params, lr=1e-3, weight_decay=0.0)

    def __call__(self) -> torch.Tensor:
        self.optimizer.step()
        return self.params[-1].detach()


def rows(setup: Setup) -> Iterator[Row]:
    device = setup.device.type
    rank, layers = RANK[device], 2 if setup.quick else LAYERS
    lora = [shape for i, o in WIDTHS[device] for shape in ((rank, i), (o, rank))] * layers
    large = [(setup.size(LARGE[device]),)]
    yield _row(setup, f"step of {len(lora)} LoRA tensors, {_elements(lora)} values", lora, setup.goal(
        compiled=3, eager=3, cuda=10))  # fmt: skip
    yield _row(setup, f"step of one tensor of {large[0][0]} values", large, setup.goal(cuda=1.1))
    yield _row(setup, f"step of one tensor against AdamW with fp32 state, {large[0][0]} values", large, None, AdamW)
    yield _row(setup, f"bf16 step by chance against to nearest, {large[0][0]} values", large, setup.goal(
        cuda=0.95), AdamW8bit, _by_chance, torch.bfloat16)  # fmt: skip


def _by_chance(params: list, **settings: Any) -> AdamW8bit:
    return AdamW8bit(params, **settings, stochastic_rounding=True)


def _row(
    setup: Setup, name: str, shapes: list[tuple[int, ...]], goal: float | None,
    theirs: Callable = bitsandbytes.optim.AdamW8bit, ours: Callable = AdamW8bit, dtype: torch.dtype = torch.float32,
) -> Row:  # fmt: skip
    sides = [(Step(shapes, setup.device, dtype, ours), Step(shapes, setup.device, dtype, theirs)) for _ in range(2)]
    limit = 2**-7 if dtype == torch.bfloat16 else AGREE  # rounded to nearest against by chance: one step of bf16
    return Row(
        name=name,
        inputs=sides,
        ours=lambda pair: pair[0](),
        theirs=lambda pair: pair[1](),
        check=lambda a, b: check_close(a, b, limit),
        bytes_moved=_elements(shapes) * (BYTES if dtype == torch.float32 else BYTES - 6),
        goal=goal,
        honest=theirs is not bitsandbytes.optim.AdamW8bit,
    )


def _elements(shapes: list[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)
