"""What a training step really held, beside what the ledger said.

On a GPU the allocator keeps count. On a CPU every operation is watched (live.py): exact, a few times slower where
tensors are tiny (half as long again for a model of 135 M parameters), and blind to what operators use inside of
themselves, so compare with `Ledger.peak_of_tensors` there.

    before      parameters, buffers, optimizer state, micro-batches
    kept        `before`, and what the forward pass keeps until the head
    peak        the most at a time
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from minift.adapters.inject import adapter_parameters
from minift.adapters.switched import switched
from minift.data.collate import Batch
from minift.model.decoder import CausalLM, Checkpointing
from minift.study.ledger import Ledger
from minift.study.live import LiveBytes
from minift.train.step import train_step

T = TypeVar("T")
TOTALS = ("held before the step", "kept by the forward pass", "peak")


@dataclass(frozen=True)
class Measured:
    """Bytes held in a training step.

    Attributes:
        before: by parameters, buffers, optimizer state and micro-batches, before the step.
        kept: when the head was first called: `before`, and what the forward pass keeps.
        peak: the most at a time.
        parts: of each category that could be measured by itself.
    """

    before: int
    kept: int
    peak: int
    parts: dict[str, int] = field(default_factory=dict)

    def beside(self, ledger: Ledger | None) -> str:
        """A table of what was predicted, if anything was, and what was measured. Logits cannot be told from the rest of
        the peak."""
        found = {**self.parts, **dict(zip(TOTALS, (self.before, self.kept, self.peak), strict=True))}
        said: dict[str, int] = {}
        if ledger is not None:
            peak = ledger.peak_of_tensors if ledger.setting.device == "cpu" else ledger.peak
            said = {**ledger.parts, **dict(zip(TOTALS, (ledger.before, ledger.kept, peak), strict=True))}
        names = [*dict.fromkeys(name for name in (*said, *found) if name not in TOTALS), *TOTALS]
        rows = [_row(name, said.get(name), found.get(name)) for name in names if said.get(name) or found.get(name)]
        return "\n".join([f"{'':<26}{'predicted':>14}{'measured':>14}{'ratio':>8}", *rows])


def _row(what: str, predicted: int | None, measured: int | None) -> str:
    cells = [f"{size / 1e6:>11,.2f} MB" if size else " " * 14 for size in (predicted, measured)]
    ratio = f"{predicted / measured:>8.3f}" if predicted and measured else ""
    return f"{what:<26}{''.join(cells)}{ratio}".rstrip()


def measure_step(
    model: CausalLM,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    gradient_checkpointing: Checkpointing = False,
    steps: int = 2,
) -> Measured:
    """Take training steps and measure the last one. The parameters are changed: work on a copy, or with lr 0.

    Args:
        model: in training mode, with adapters if there shall be any.
        steps: the optimizer makes its state at the end of the first step, so the second one holds more.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least 1 is needed")

    def step() -> object:
        return train_step(model, micro_batches, optimizer, gradient_checkpointing=gradient_checkpointing)

    for _ in range(steps - 1):
        step()
    return measured(model, micro_batches, optimizer, step)[1]


def measured(
    model: CausalLM, micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer, step: Callable[[], T]
) -> tuple[T, Measured]:
    """Call `step`, which takes a training step, and measure it; returns its result, too."""
    parts = held_parts(model, micro_batches, optimizer)
    before, gradients, kept = sum(parts.values()), [0], [0]
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(model.device)
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
    live = LiveBytes()

    def at_head(*_: Any) -> None:
        kept.append(torch.cuda.memory_allocated(model.device) if on_gpu else before + live.now)

    def at_update(*_: Any) -> None:
        gradients.append(_bytes(p.grad for p in model.parameters() if p.grad is not None))

    hooks = [model.lm_head.register_forward_pre_hook(at_head), optimizer.register_step_pre_hook(at_update)]
    try:
        if on_gpu:
            result = step()
        else:
            with live:
                result = step()
    finally:
        for hook in hooks:
            hook.remove()
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else before + live.peak
    first = kept[1] if len(kept) > 1 else before
    parts |= {"gradients": gradients[-1], "kept activations": first - before}
    return result, Measured(before, first, peak, parts)


def held_bytes(model: CausalLM, micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers, gradients, optimizer state and batches; shared memory counts once."""
    return sum(held_parts(model, micro_batches, optimizer).values())


def held_parts(model: CausalLM, micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """`held_bytes` by category, of what is on the model's device; optimizer state that is paged to the host is not."""
    adapters = {id(p) for place in switched(model).values() for p in adapter_parameters(place)}
    tensors = [*model.parameters(), *model.buffers()]
    batches = (getattr(b, name) for b in micro_batches for name in vars(b))
    pool = getattr(optimizer, "pool", None)
    found = {
        "weights": [t for t in tensors if id(t) not in adapters],
        "adapters": [t for t in tensors if id(t) in adapters],
        "optimizer": chain.from_iterable(entry.values() for entry in optimizer.state.values()),
        "batch": batches,
        "gradients": [p.grad for p in model.parameters()],
    }
    seen: set[int] = set()
    parts = {name: _bytes(values, seen, model.device.type) for name, values in found.items()}
    parts["optimizer"] += pool.resident_bytes() if pool is not None else 0
    return parts


def _bytes(values: Any, seen: set[int] | None = None, device: str | None = None) -> int:
    """Of the storages that are not in `seen`, which they then are."""
    seen, total = set() if seen is None else seen, 0
    for value in values:
        if isinstance(value, Tensor) and (device is None or value.device.type == device):
            storage = value.untyped_storage()
            total += 0 if storage.data_ptr() in seen else storage.nbytes()
            seen.add(storage.data_ptr())
    return total
