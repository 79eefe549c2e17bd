"""What a training step really held, beside what the ledger said.

On a GPU the allocator keeps count. On a CPU every operation is watched (live.py): exact, a few times slower, and blind
to what operators use inside of themselves, so compare with `Ledger.peak_of_tensors` there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from minift.data.collate import Batch
from minift.model.decoder import CausalLM
from minift.study.ledger import Ledger
from minift.study.live import LiveBytes
from minift.train.step import train_step


@dataclass(frozen=True)
class Measured:
    """Bytes held in a training step.

    Attributes:
        before: by parameters, buffers, optimizer state and micro-batches, before the step.
        kept: when the head was first called: `before`, and what the forward pass keeps.
        peak: the most at a time.
    """

    before: int
    kept: int
    peak: int

    def beside(self, ledger: Ledger) -> str:
        """A table of what was predicted and what was measured."""
        on_cpu = ledger.setting.device == "cpu"
        rows = [
            ("held before the step", ledger.before, self.before),
            ("kept by the forward pass", ledger.kept, self.kept),
            ("peak", ledger.peak_of_tensors if on_cpu else ledger.peak, self.peak),
        ]
        lines = [f"{'':<26}{'predicted':>14}{'measured':>14}{'ratio':>8}"]
        lines += [f"{what:<26}{p / 1e6:>11,.2f} MB{m / 1e6:>11,.2f} MB{p / m:>8.3f}" for what, p, m in rows]
        return "\n".join(lines)


def measure_step(
    model: CausalLM,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    gradient_checkpointing: bool = False,
    steps: int = 2,
) -> Measured:
    """Take training steps and measure them. The parameters are changed: work on a copy, or with lr 0.

    Args:
        model: in training mode, with adapters if there shall be any.
        steps: the optimizer makes its state at the end of the first step, so the second one holds more.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least 1 is needed")
    for _ in range(steps - 1):
        train_step(model, micro_batches, optimizer, gradient_checkpointing=gradient_checkpointing)
    held = held_bytes(model, micro_batches, optimizer)

    def step() -> object:
        return train_step(model, micro_batches, optimizer, gradient_checkpointing=gradient_checkpointing)

    if model.device.type == "cuda":
        return _on_gpu(model, step)
    kept: list[int] = []
    with LiveBytes() as live:
        hook = model.lm_head.register_forward_pre_hook(lambda *_: kept.append(live.now))
        try:
            step()
        finally:
            hook.remove()
    return Measured(held, held + kept[0], held + live.peak)


def _on_gpu(model: CausalLM, step: Callable[[], object]) -> Measured:
    kept: list[int] = []
    torch.cuda.synchronize(model.device)
    held = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    hook = model.lm_head.register_forward_pre_hook(lambda *_: kept.append(torch.cuda.memory_allocated(model.device)))
    try:
        step()
    finally:
        hook.remove()
    return Measured(held, kept[0], torch.cuda.max_memory_allocated(model.device))


def held_bytes(model: CausalLM, micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers, gradients, optimizer state and batches; shared memory counts once."""
    state = (value for entry in optimizer.state.values() for value in entry.values())
    batches = (getattr(b, name) for b in micro_batches for name in vars(b))
    grads = (p.grad for p in model.parameters())
    found = chain(model.parameters(), model.buffers(), grads, state, batches)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if isinstance(t, Tensor)}
    return sum(storages.values())
