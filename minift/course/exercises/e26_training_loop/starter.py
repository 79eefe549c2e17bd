"""e26 The training loop: README.md says what to write. Check with: minift-course check e26"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def evaluate(model: nn.Module, data: dict[str, Tensor], micro_batch: int) -> float:
    """Mean loss over all labels of `data`, in eval mode, without gradients."""
    # TODO: and leave the model in the mode it was in
    raise NotImplementedError


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
    # TODO
    raise NotImplementedError
