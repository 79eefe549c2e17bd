"""e26 The training loop: what happens once, once an epoch, once an update, once a micro-batch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def summed_loss(model: nn.Module, data: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Cross-entropy of some rows, summed over their labels."""
    logits = model(data["tokens"][rows])
    return F.cross_entropy(logits.flatten(0, 1), data["labels"][rows].flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, data: dict[str, Tensor], micro_batch: int) -> float:
    """Mean loss over all labels of `data`, in eval mode, without gradients."""
    before = model.training
    model.eval()
    rows = torch.arange(len(data["tokens"]))
    total = sum(summed_loss(model, data, part).item() for part in rows.split(micro_batch))
    model.train(before)
    return total / count_labels(data["labels"])


def count_labels(labels: Tensor) -> int:
    """How many positions are trained on."""
    return int((labels != -100).sum())


def train(
    model: nn.Module,
    make_optimizer: Callable[[list[nn.Parameter]], Any],
    schedule: Callable[[int], float],
    data: dict[str, Tensor],
    held_out: dict[str, Tensor],
    *,
    frozen: tuple[str, ...],
    epochs: int,
    micro_batch: int,
    accumulate: int,
    max_norm: float,
    eval_every: int,
    generator: torch.Generator,
) -> tuple[list[float], list[float]]:
    """Returns the loss of every update and every evaluation of held_out."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained)
    model.train()
    losses, evaluations = [], []
    for _ in range(epochs):
        order = torch.randperm(len(data["tokens"]), generator=generator)
        for window in order.split(micro_batch * accumulate):
            count = count_labels(data["labels"][window])
            total = 0.0
            optimizer.zero_grad()
            for rows in window.split(micro_batch):
                loss = summed_loss(model, data, rows) / count
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(trained, max_norm)
            optimizer.lr = schedule(len(losses))
            optimizer.step()
            losses.append(total)
            if len(losses) % eval_every == 0:
                evaluations.append(evaluate(model, held_out, micro_batch))
    return losses, evaluations
