"""Learning-rate schedules: a factor between 0 and 1 for each step.

    warm-up     0 up to 1, straight, over the first `warmup_steps`; the very first step then has rate 0
    linear      1 down to 0, straight, over the rest
    cosine      1 down to 0 along half a cosine
    constant    1

Equal to transformers' `get_scheduler`.
"""

import math

SCHEDULES = ("linear", "cosine", "constant")


def lr_factor(schedule: str, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Factor for the update number `step`, counted from 0."""
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return 1.0
