"""A place to look on from while a run takes its steps, for what the floors above know and training itself does not.

`train` hands every step to a Watch. This one takes the step and says nothing; minift/study/watch.py has one that
predicts and measures memory.

    train(model, tokenizer, rows, config, watch=MemoryWatch(config, print))
"""

import sys
from collections.abc import Callable, Sequence

import torch

from minift.data.collate import Batch
from minift.model.decoder import CausalLM
from minift.train.step import StepStats


class Watch:
    """Sees each step, and is asked when memory runs out."""

    def step(
        self,
        model: CausalLM,
        micro_batches: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        take: Callable[[], StepStats],
    ) -> StepStats:
        """Call `take`, which takes the step, once, and return what it returns."""
        return take()

    def shortage(self, model: CausalLM, micro_batches: Sequence[Batch]) -> str:
        """A sentence or two on where the memory of such a step goes, and what to change; "" for nothing to say."""
        return ""


def process_peak() -> int:
    """The most resident memory that this process has had so far, in bytes; 0 on Windows, where Python cannot say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def begin_peak(device: torch.device) -> None:
    """Start the count of `peak_since` again. On a CPU the system's count cannot be, without spoiling it for others."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_since(device: torch.device) -> int:
    """Bytes: of a GPU, the most held by tensors since `begin_peak`; else `process_peak`, which never falls."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak()
