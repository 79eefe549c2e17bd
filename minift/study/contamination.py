"""What packing does to the loss if a document sees its neighbours, or if it does not begin at position 0.

Each document of a packed row must be computed as if it were alone. Two things see to that: the mask (no query sees a
key of another document) and positions (they begin at 0 again). `contamination` leaves each of them out, and both:

                        mask          positions
    packed              own document  0 1 2 0 1 2
    positions run on    own document  0 1 2 3 4 5
    no mask             all before    0 1 2 0 1 2
    neither             all before    0 1 2 3 4 5

Rotary positions are differences: with the right mask it does not matter where a document begins. Models that learn a
vector for each position (OPT, GPT-2) do not forgive that. "Neither" is what one gets from a plain causal mask over
concatenated text. Its loss is *lower* if the documents resemble each other: the earlier ones are examples for the
later ones, which nobody will have at the time of use.

Labels are the same in all of them, so that only what is seen differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.data.collate import Batch, collate, flatten
from minift.data.encode import IGNORE, Example
from minift.model.decoder import CausalLM
from minift.train.step import trained_rows


@dataclass(frozen=True)
class Contamination:
    """Mean losses of each document, in nats, for each way; prints as a table.

    Attributes:
        trained: trained tokens of each document.
        losses: by the name of the way, one number for each document.
    """

    trained: tuple[int, ...]
    losses: dict[str, tuple[float, ...]]

    def mean(self, way: str) -> float:
        """Mean over all trained tokens."""
        pairs = zip(self.trained, self.losses[way], strict=True)
        return sum(count * loss for count, loss in pairs) / sum(self.trained)

    def worst(self, way: str) -> float:
        """Largest difference of a document's loss from that of the document alone."""
        pairs = zip(self.losses[way], self.losses["alone"], strict=True)
        return max(abs(loss - alone) for loss, alone in pairs)

    def __str__(self) -> str:
        names = "".join(f"{f'doc {number}':>9}" for number in range(len(self.trained)))
        lines = [f"{'':<18}{names}{'mean':>9}"]
        for way, losses in self.losses.items():
            lines.append(f"{way:<18}" + "".join(f"{loss:>9.4f}" for loss in (*losses, self.mean(way))))
        return "\n".join(lines)


@torch.no_grad()
def contamination(model: CausalLM, examples: Sequence[Example]) -> Contamination:
    """The loss of each document alone, packed, and packed wrongly.

    Raises:
        ValueError: fewer than two documents, or one without a trained token.
    """
    if len(examples) < 2:
        raise ValueError(f"a row of {len(examples)} documents has no neighbours: give at least 2")
    trained = tuple(example.trained_tokens for example in examples)
    if 0 in trained:
        raise ValueError(f"document {trained.index(0)} has no trained token: there is no loss to compare")
    row = flatten(examples)
    run_on = torch.arange(row.input_ids_bs.shape[1])[None]
    together = torch.zeros_like(row.documents_bs)
    ways = {
        "packed": row,
        "positions run on": replace(row, positions_bs=run_on),
        "no mask": replace(row, documents_bs=together),
        "neither": replace(row, documents_bs=together, positions_bs=run_on),
    }
    losses = {"alone": tuple(_losses(model, collate([example], 0)).mean().item() for example in examples)}
    of_document_n = row.documents_bs[:, 1:][row.labels_bs[:, 1:] != IGNORE]
    for way, batch in ways.items():
        losses_n = _losses(model, batch)
        losses[way] = tuple(losses_n[of_document_n == number].mean().item() for number in range(len(examples)))
    return Contamination(trained, losses)


def _losses(model: CausalLM, batch: Batch) -> Tensor:
    """-log p of each trained token, fp32 [n], on the CPU."""
    hidden_nd, target_n = trained_rows(model, batch.to(model.device))
    return F.cross_entropy(model.logits(hidden_nd).float(), target_n, reduction="none").cpu()
