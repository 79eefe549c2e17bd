"""e18 Shifted cross-entropy: position i is judged by label i + 1, and only what is counted counts."""

import torch
from torch import Tensor

IGNORE = -100


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (batch, length, vocabulary), labels (batch, length) -> mean loss of the counted pairs, float32 ()."""
    scores = logits[:, :-1].float()
    targets = labels[:, 1:]
    counted = targets != IGNORE
    top = scores.amax(-1, keepdim=True).detach()
    total = (scores - top).exp().sum(-1, keepdim=True).log() + top
    chosen = scores.gather(-1, targets.clamp(min=0)[..., None])
    losses = torch.where(counted, (total - chosen)[..., 0], 0.0)
    return losses.sum() / counted.sum().clamp(min=1)
