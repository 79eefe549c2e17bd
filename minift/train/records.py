"""What a run remembers of its steps, and what it decides from that alone.

Which step was the best and whether the run has stopped improving are functions of the records, so a run that is resumed
decides as one that never stopped: there is no counter to save.

    evaluations   2.10  1.84  1.79  1.81  1.80        best: the third; two since then, so `patience` 2 stops here
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """One line of the log. `lr` is the rate this step used; see StepStats for the others.

    `eval_*` are None unless the evaluation rows were looked at after this step (evaluate.py). `peak_memory` is in bytes
    (watch.py): of a GPU, what tensors held in this step; else the most this process has held so far.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    trained_tokens: int
    tokens: int
    seconds: float
    eval_loss: float | None = None
    eval_perplexity: float | None = None
    eval_accuracy: float | None = None
    peak_memory: int | None = None


def best_step(steps: Sequence[StepRecord]) -> int | None:
    """Number of the step after which the evaluation loss was lowest, the first of equals; None without evaluations."""
    evaluated = [(record.eval_loss, record.step) for record in steps if record.eval_loss is not None]
    return min(evaluated)[1] if evaluated else None


def has_stalled(steps: Sequence[StepRecord], patience: int) -> bool:
    """Whether the last `patience` evaluations were all without improvement; never if `patience` is 0."""
    best = best_step(steps)
    if not patience or best is None:
        return False
    return sum(record.eval_loss is not None and record.step > best for record in steps) >= patience
