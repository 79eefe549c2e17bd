"""How well a model predicts rows it is not trained on.

    loss         sum of -log p(token) over all trained tokens of all rows  /  number of those tokens
    perplexity   e^loss: a model that hesitates between k equally likely tokens has k
    accuracy     share of those tokens that were the likeliest

One sum and one division over the whole set: the mean of the batches' means would depend on how the rows are divided
into batches. Sums are kept in fp64. As in training, positions without a label are dropped before the head, and the head
works on a few rows at a time. Dropout is off, and no random number is drawn, so looking never changes a run.

Left out: judging generated text.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minift.data.collate import Batch
from minift.model.decoder import CausalLM
from minift.train.step import head_pieces, trained_rows


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        loss: mean over the trained tokens, in nats.
        accuracy: share of the trained tokens that the model held for the likeliest, 0 to 1.
        trained_tokens: labels that counted.
    """

    loss: float
    accuracy: float
    trained_tokens: int

    @property
    def perplexity(self) -> float:
        """e^loss; infinite where that exceeds a float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


@torch.no_grad()
def evaluate(model: CausalLM, batches: Iterable[Batch]) -> Evaluation:
    """Loss and accuracy of the model on these batches; its mode and its parameters stay as they are.

    Raises:
        ValueError: no label in any batch.
    """
    loss, right, trained = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            hidden_nd, target_n = trained_rows(model, batch.to(model.device))
            for piece_nd, piece_n in head_pieces(model, hidden_nd, target_n):
                logits_nv = model.logits(piece_nd).float()
                loss += F.cross_entropy(logits_nv, piece_n, reduction="none").double().sum().item()
                right += int((logits_nv.argmax(-1) == piece_n).sum())
            trained += len(target_n)
    finally:
        model.train(was_training)
    if not trained:
        raise ValueError("nothing to evaluate: no batch holds a label; check loss_on and max_length")
    return Evaluation(loss / trained, right / trained, trained)
