"""What goes wrong in the middle of a run, said so that something can be done about it.

**Not finite.** A NaN or an infinity spreads from where it began to everything behind it, so the loss says only that
there was one. The forward pass is done again, watching what each module returns; the first output that is not finite
names the module, and whether its weights were at fault or it overflowed. If all outputs are finite, the gradients are
not: they flow from the last module to the first, so the last parameter with such a gradient is where it began.

**Out of memory.** What to change, in the order of what it costs: nothing but time first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from minift.train.config import TrainConfig


@torch.no_grad()
def where_not_finite(model: nn.Module, forward: Callable[[], object]) -> str:
    """A sentence on where the first number that is not finite came from; `forward` does the forward pass again."""
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not _finite(output):
            found.append(f"the first output that is not finite is that of {name}, {_reason(module, inputs, output)}")

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules()]
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=cuda):  # dropout draws: whoever goes on after the error draws as if not
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    for name, p in reversed(list(model.named_parameters())):
        if p.grad is not None and not p.grad.isfinite().all():
            return f"the gradient of {name} is not finite, and no output was; lower lr, or check the weights"
    return "every output and gradient is finite, only their sums are not; lower lr"


def _finite(values: Any) -> bool:
    tensors = (value for value in tree_iter(values) if isinstance(value, Tensor) and value.is_floating_point())
    return all(bool(value.isfinite().all()) for value in tensors)


def _reason(module: nn.Module, inputs: Any, output: Any) -> str:
    bad = [name for name, p in module.named_parameters() if not _finite(p)]
    if bad:
        return f"whose {bad[0]} is not finite; check the weights"
    if not _finite(inputs):
        return "whose input is not finite; check the weights"
    dtypes = {value.dtype for value in tree_iter(output) if isinstance(value, Tensor)}
    name = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return f"which got finite numbers and overflowed in {name}; lower lr, or compute in a type of wider range"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the machine (there PyTorch raises a plain RuntimeError)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory")
    )


def memory_advice(config: TrainConfig) -> list[str]:
    """Three things to change, each with its value; none of the first two changes what the run learns."""
    advice = []
    if config.batch_size > 1:
        parts = next(n for n in range(2, config.batch_size + 1) if config.batch_size % n == 0)
        advice.append(
            f"batch_size {config.batch_size // parts} with gradient_accumulation "
            f"{parts * config.gradient_accumulation} (now {config.batch_size} and "
            f"{config.gradient_accumulation}): the same step in smaller pieces"
        )
    if config.checkpointing is not True:
        advice.append("gradient_checkpointing on: a third to a half slower, and only one layer's activations at a time")
    advice.append(f"max_length {max(2, config.max_length // 2)} (now {config.max_length}): shorter rows")
    if config.optimizer != "adamw8bit":
        advice.append("optimizer adamw8bit: 2 bytes of state a trained parameter instead of 8")
    advice.append("quantize nf4 when the model is loaded: half a byte a weight")
    advice.append("a smaller rank, or fewer targets, of the adapter")
    return advice[:3]


def out_of_memory(step: int, config: TrainConfig, error: BaseException, told: str = "") -> MemoryError:
    """The error that takes the place of the allocator's.

    Args:
        told: where memory goes and what to change, from somebody who predicts it; "" for the general advice.
    """
    changes = "; ".join(f"({number}) {text}" for number, text in enumerate(memory_advice(config), 1))
    told = told or f"Change one of: {changes}."
    reason = str(error).split("\n")[0]
    return MemoryError(
        f"out of memory in step {step}. {told} `minift memory` says beforehand what each part of a run takes. The "
        f"allocator said: {reason}"
    )
