"""From examples to tensors.

A batch carries two integers a token besides id and label: its position within its document, and the number of its
document within the row (-1 for padding). Everything that padding and packing need follows from them: the model builds
the attention mask from the documents, and no mask is passed around.

    two rows, padded right           one row of two documents (flattened or packed)
    ids        a b c d   e f . .     a b c d e f
    positions  0 1 2 3   0 1 0 0     0 1 2 3 0 1
    documents  0 0 0 0   0 0 -1-1    0 0 0 0 1 1
    labels     a b c d   e f x x     x b c d x f        x = -100; the first label of a row is never used (see the loss)

Padding is computed and thrown away. Rows padded to a multiple of 8 cost a little more of it and suit matrix units;
batches of rows of similar length need less (batching.py), packed rows next to none (packing.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minift.data.encode import IGNORE, Example

FILLERS = {"input_ids_bs": 0, "labels_bs": IGNORE, "positions_bs": 0, "documents_bs": -1}  # of padding


@dataclass(frozen=True)
class Batch:
    """Tensors int64 [b, s].

    `shared_prefix` is None, or how `share_prefix` laid out a batch in one sequence: the length of the prefix, and the
    length of what follows it in each row.
    """

    input_ids_bs: Tensor
    labels_bs: Tensor
    positions_bs: Tensor
    documents_bs: Tensor
    shared_prefix: tuple[int, tuple[int, ...]] | None = None

    @property
    def trained_tokens(self) -> int:
        """Number of labels that count."""
        return int((self.labels_bs[:, 1:] != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding; a shared prefix counts once for each row."""
        prefix, rows = self.shared_prefix or (0, (0,))
        return int((self.documents_bs >= 0).sum()) + prefix * (len(rows) - 1)

    @property
    def needs_mask(self) -> bool:
        """Whether attention must look at the documents. Rows of one document that are padded on the right need only
        causal attention, because no real token comes after padding."""
        return bool((self.documents_bs > 0).any() or (self.documents_bs[:, 0] < 0).any())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in FILLERS})


def flatten(examples: Sequence[Example]) -> Batch:
    """All documents behind each other in one row [1, s], without padding."""
    row = _row(examples)
    # The last token of one document must not be trained to predict the first of the next.
    return replace(row, labels_bs=row.labels_bs.masked_fill(row.positions_bs == 0, IGNORE))


def stack(
    rows: Sequence[Batch], pad_id: int, padding_side: Literal["left", "right"] = "right", multiple_of: int = 1
) -> Batch:
    """Batches of equal or different lengths under each other, padded to the longest.

    Args:
        pad_id: id of the padding. Nothing is ever masked by it, so it may be a token that occurs.
        padding_side: "right" to train; "left" to generate, where every row must end in its last token.
        multiple_of: round the length up to a multiple of this (matrix units like 8 or 16; compiled code sees fewer
            different shapes).

    Raises:
        ValueError: another side, multiple_of < 1, or no rows.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"unknown padding_side {padding_side!r}: choose 'left' or 'right'")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    if not rows:
        raise ValueError("nothing to collate: no rows")
    longest = max(row.input_ids_bs.shape[1] for row in rows)
    length = -(-longest // multiple_of) * multiple_of
    fillers = FILLERS | {"input_ids_bs": pad_id}

    def padded(tensor_bs: Tensor, filler: int) -> Tensor:
        missing = length - tensor_bs.shape[1]
        sides = (missing, 0) if padding_side == "left" else (0, missing)
        return torch.nn.functional.pad(tensor_bs, sides, value=filler)

    columns = {name: torch.cat([padded(getattr(row, name), value) for row in rows]) for name, value in fillers.items()}
    batch = replace(rows[0], **columns)
    if padding_side == "right":
        return batch
    # A first token now has padding before it, which must not be trained to predict it.
    return replace(batch, labels_bs=batch.labels_bs.masked_fill(batch.positions_bs == 0, IGNORE))


def share_prefix(batch: Batch, least: int = 8) -> Batch:
    """Lay a right-padded batch of one document a row out so that the beginning which all rows share is computed once.

        ids   s s s a b        one sequence  s s s | a b | c      shared_prefix (3, (2, 1))
              s s s c .                      prefix row 0 row 1

    Chat rows begin with the same system message and header, often half of their tokens. Padding goes, too. The prefix
    ends where rows differ or a label counts: at a trained token each row has a loss of its own. Left as it is if fewer
    than `least` tokens, or less than a tenth of all, would be saved.
    """
    if batch.needs_mask:
        return batch
    rows, length = batch.input_ids_bs.shape
    alike = (batch.input_ids_bs == batch.input_ids_bs[0]).all(0) & (batch.documents_bs >= 0).all(0)
    # The prefix's last token predicts the first token after it, so that one must be untrained, too.
    untrained = (batch.labels_bs == IGNORE).all(0)
    untrained[0] = True  # nothing predicts the first token
    goes_on = (alike & untrained)[:-1] & untrained[1:]
    prefix = int(goes_on.long().cumprod(0).sum())
    if prefix < least or prefix * (rows - 1) < 0.1 * rows * length:
        return batch
    own = batch.documents_bs >= 0
    own[:, :prefix] = False
    columns = {
        name: torch.cat([getattr(batch, name)[0, :prefix], getattr(batch, name)[own]]).unsqueeze(0) for name in FILLERS
    }
    return replace(batch, **columns, shared_prefix=(prefix, tuple(own.sum(1).tolist())))


def collate(
    examples: Sequence[Example], pad_id: int, padding_side: Literal["left", "right"] = "right", multiple_of: int = 1
) -> Batch:
    """One document a row, padded to the longest; see `stack`."""
    return stack([_row([example]) for example in examples], pad_id, padding_side, multiple_of)


def _row(examples: Sequence[Example]) -> Batch:
    if not examples:
        raise ValueError("nothing to collate: no examples")
    sizes = np.array([len(example) for example in examples])
    total = int(sizes.sum())
    ids = np.fromiter(chain.from_iterable(example.input_ids for example in examples), np.int64, total)
    labels = np.fromiter(chain.from_iterable(example.labels for example in examples), np.int64, total)
    positions = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    documents = np.repeat(np.arange(len(sizes)), sizes)
    ids_s, labels_s, positions_s, documents_s = map(torch.from_numpy, (ids, labels, positions, documents))
    return Batch(ids_s[None], labels_s[None], positions_s[None], documents_s[None])
