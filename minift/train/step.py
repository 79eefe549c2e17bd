"""One optimizer step, and the loss it lowers.

The loss of a step is the mean of -log p(token) over all *trained tokens* of all its micro-batches:

    sum over micro-batches of sum over trained tokens  /  number of trained tokens of the whole step

The mean of the micro-batches' means is another number as soon as they hold different numbers of trained tokens: short
answers would count for more. So the loss of a micro-batch is a sum, and one division by the count of the whole step
makes N micro-batches equal to one batch N times as large.

Labels are shifted here and nowhere else: the hidden state of token i predicts token i + 1. Positions without a label
are dropped before the head, which multiplies every remaining one by the whole vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minift.data.collate import Batch
from minift.data.encode import IGNORE
from minift.model.attention import SharedPrefix
from minift.model.decoder import CausalLM

# Logits are [rows, vocabulary] in fp32: 201 MB for 1024 rows of 49,152. More rows go through in pieces of this size,
# each computed again in the backward pass, so that the logits of two pieces are never in memory together.
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did.

    Attributes:
        loss: mean over the trained tokens, in nats.
        grad_norm: Euclidean norm of all gradients, before clipping.
        trained_tokens: labels that counted.
        tokens: tokens read, without padding.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    tokens: int


def loss_sum(model: CausalLM, batch: Batch, gradient_checkpointing: bool = False) -> Tensor:
    """Sum of -log p over the trained tokens of a batch, fp32 []."""
    hidden_bsd = model.hidden(
        batch.input_ids_bs,
        batch.positions_bs,
        batch.documents_bs if batch.needs_mask else None,
        gradient_checkpointing=gradient_checkpointing,
        shared_prefix=SharedPrefix(*batch.shared_prefix) if batch.shared_prefix else None,
    )
    target_bs = batch.labels_bs[:, 1:]
    trained_bs = target_bs != IGNORE
    rows = hidden_bsd[:, :-1][trained_bs].split(ROWS_AT_ONCE)
    targets = target_bs[trained_bs].split(ROWS_AT_ONCE)
    if len(rows) == 1:
        return _head_loss(model.lm_head, rows[0], targets[0])
    pieces = [
        checkpoint(_head_loss, model.lm_head, *piece, use_reentrant=False) for piece in zip(rows, targets, strict=True)
    ]
    return torch.stack(pieces).sum()


def _head_loss(head: nn.Module, hidden_nd: Tensor, target_n: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_nd).float(), target_n, reduction="sum")


def train_step(
    model: CausalLM,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float = 1.0,
    gradient_checkpointing: bool = False,
) -> StepStats:
    """Forward, backward, clip, update.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the parameters are left as they were.
    """
    trained = sum(batch.trained_tokens for batch in micro_batches)
    parameters = [p for p in model.parameters() if p.requires_grad]

    loss = torch.zeros((), device=model.device)
    for batch in micro_batches:
        part = loss_sum(model, batch.to(model.device), gradient_checkpointing) / trained
        part.backward()
        loss += part.detach()

    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
    if not (loss.isfinite() and grad_norm.isfinite()):
        raise FloatingPointError(f"loss {loss.item()}, gradient norm {grad_norm.item()}: {_first_bad(model)}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepStats(loss.item(), grad_norm.item(), trained, sum(batch.tokens for batch in micro_batches))


def _first_bad(model: nn.Module) -> str:
    for name, p in model.named_parameters():
        if p.grad is not None and not p.grad.isfinite().all():
            return f"the gradient of {name} is not finite; lower lr, or check the weights"
    return "lower lr, or check the weights"
