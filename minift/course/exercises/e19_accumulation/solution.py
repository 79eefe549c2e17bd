"""e19 Gradient accumulation: every part is divided by the tokens of the whole."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def train(
    micro_batches: list[Any],
    loss_sum: Callable[[Any], Tensor],
    count: Callable[[Any], int],
    optimizer: Any,
    window: int,
) -> list[float]:
    """One pass with an update for every window of micro-batches; returns the loss of each window."""
    reported = []
    for start in range(0, len(micro_batches), window):
        group = micro_batches[start : start + window]
        tokens = sum(count(batch) for batch in group)
        optimizer.zero_grad()
        seen = 0.0
        for batch in group:
            loss = loss_sum(batch) / tokens
            loss.backward()
            seen += loss.item()
        optimizer.step()
        reported.append(seen)
    return reported
