"""One optimizer step, and the loss it lowers.

The loss of a step is the mean of -log p(token) over all *trained tokens* of all its micro-batches:

    sum over micro-batches of sum over trained tokens  /  number of trained tokens of the whole step

The mean of the micro-batches' means is another number as soon as they hold different numbers of trained tokens: short
answers would count for more. So the loss of a micro-batch is a sum, and one division by the count of the whole step
makes N micro-batches equal to one batch N times as large.

Labels are shifted here and nowhere else: the hidden state of token i predicts token i + 1. Positions without a label
are dropped before the head, which multiplies every remaining one by the whole vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.adapters.report import without_gradient
from minift.data.collate import Batch
from minift.data.encode import IGNORE
from minift.model.attention import SharedPrefix
from minift.model.decoder import CausalLM, Checkpointing
from minift.train.faults import where_not_finite

# Logits that exist at a time, 34 MB in fp32 on a CPU, 0.5 GB on a GPU, which needs larger products to be busy. Three
# such tensors are there at the worst moment (the softmax, its gradient, the logits' gradient): 100 MB, 1.6 GB.
LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 27}


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


def trained_rows(model: CausalLM, batch: Batch, gradient_checkpointing: Checkpointing = False) -> tuple[Tensor, Tensor]:
    """Hidden states [n, d] of the positions that predict a trained token, and those tokens [n]."""
    hidden_bsd = model.hidden(
        batch.input_ids_bs,
        batch.positions_bs,
        batch.documents_bs if batch.needs_mask else None,
        gradient_checkpointing=gradient_checkpointing,
        shared_prefix=SharedPrefix(*batch.shared_prefix) if batch.shared_prefix else None,
    )
    target_bs = batch.labels_bs[:, 1:]
    trained_bs = target_bs != IGNORE
    return hidden_bsd[:, :-1][trained_bs], target_bs[trained_bs]


def head_loss(head: Callable[[Tensor], Tensor], hidden_nd: Tensor, target_n: Tensor) -> Tensor:
    """Sum of -log p(target), fp32 []."""
    return F.cross_entropy(head(hidden_nd).float(), target_n, reduction="sum")


def head_pieces(model: CausalLM, hidden_nd: Tensor, target_n: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and targets, as many rows at a time as may have logits at a time."""
    rows = max(1, LOGITS_AT_ONCE.get(hidden_nd.device.type, LOGITS_AT_ONCE["cpu"]) // model.config.vocab_size)
    return zip(hidden_nd.split(rows), target_n.split(rows), strict=True)


def loss_sum(model: CausalLM, batch: Batch) -> Tensor:
    """Sum of -log p over the trained tokens of a batch, fp32 []."""
    return head_loss(model.logits, *trained_rows(model, batch))


def backward(model: CausalLM, batch: Batch, divisor: int, gradient_checkpointing: Checkpointing = False) -> Tensor:
    """Add the gradients of loss_sum / divisor to the parameters; return that loss, detached.

    In two stages, so that the logits of all rows never exist together: first the head, a few rows at a time, each piece
    forward and at once backward into the gradient of the hidden states; then the rest of the model from that gradient.
    """
    hidden_nd, target_n = trained_rows(model, batch, gradient_checkpointing)
    leaf_nd = hidden_nd.detach().requires_grad_()
    total = torch.zeros((), device=leaf_nd.device)
    for piece_nd, piece_n in head_pieces(model, leaf_nd, target_n):
        loss = head_loss(model.logits, piece_nd, piece_n) / divisor
        loss.backward()
        total += loss.detach()
    if hidden_nd.requires_grad:  # not if only the head is trained
        hidden_nd.backward(leaf_nd.grad)
    return total


def train_step(
    model: CausalLM,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float = 1.0,
    gradient_checkpointing: Checkpointing = False,
) -> StepStats:
    """Forward, backward, clip, update.

    Raises:
        FloatingPointError: the loss or a gradient is not finite (faults.py names where that began).
        ValueError: a parameter that requires a gradient got none. In both cases parameters stay as they were.
    """
    trained = sum(batch.trained_tokens for batch in micro_batches)
    parameters = [p for p in model.parameters() if p.requires_grad]

    loss = torch.zeros((), device=model.device)
    for batch in micro_batches:
        loss += backward(model, batch.to(model.device), trained, gradient_checkpointing)

    missing = without_gradient(model)
    if missing:
        optimizer.zero_grad(set_to_none=True)
        raise ValueError(
            f"{len(missing)} trained parameters got no gradient, the first is {missing[0]}: the loss does not depend "
            "on them; freeze them with requires_grad_(False), or activate the adapter that they belong to"
        )
    # In two steps: clip_grad_norm_ would divide all gradients by a norm that is NaN, and hide where it came from.
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not (loss.isfinite() and grad_norm.isfinite()):
        where = where_not_finite(model, lambda: [_look(model, batch.to(model.device)) for batch in micro_batches])
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"loss {loss.item()}, gradient norm {grad_norm.item()}: {where}")
    nn.utils.clip_grads_with_norm_(parameters, max_grad_norm or float("inf"), grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepStats(loss.item(), grad_norm.item(), trained, sum(batch.tokens for batch in micro_batches))


def _look(model: CausalLM, batch: Batch) -> None:
    """The forward pass alone."""
    for piece_nd, _ in head_pieces(model, *trained_rows(model, batch)):
        model.logits(piece_nd)
