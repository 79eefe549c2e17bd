"""The same documents laid out in every way that there is: how much of what is computed is of use.

A batch is a rectangle, and documents are not all of one length. Whatever fills the rest is computed and thrown away:

    padded to max_length    every row is as long as the longest that may come
    padded to the batch     as long as the longest of its batch
    similar lengths         batches of rows that are alike (data/batching.py), then the same
    packed                  several documents in a row (data/packing.py): bfd, bfd_split, wrapped

The useful share is tokens / places. It says nothing of what a layout does to documents, so that stands beside it: how
many are not in one piece, and how many tokens are in no row at all.

Left out: rows that share a prefix, which `share_prefix` computes once (data/collate.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minift.data.batching import by_length, order, padding
from minift.data.collate import Batch
from minift.data.encode import Example
from minift.data.packing import STRATEGIES, lay_out


@dataclass(frozen=True)
class LayoutRow:
    """What one layout does.

    Attributes:
        name: of the layout.
        rows: of all batches.
        places: numbers of ids that are computed, padding included.
        tokens: places that hold a token of a document.
        cut: documents that are not in one piece, or not whole.
        dropped: tokens that are in no row.
    """

    name: str
    rows: int
    places: int
    tokens: int
    cut: int
    dropped: int

    @property
    def useful(self) -> float:
        """Share of the places that hold a token."""
        return self.tokens / self.places


@dataclass(frozen=True)
class Layouts:
    """The layouts of the same documents; prints as a table."""

    documents: int
    tokens: int
    length: int
    rows: tuple[LayoutRow, ...]

    def __getitem__(self, name: str) -> LayoutRow:
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        head = f"{self.documents:,} documents of {self.tokens:,} tokens, rows of at most {self.length}"
        lines = [head, "", f"{'':<22}{'rows':>7}{'places':>10}{'useful':>9}{'documents cut':>15}{'tokens lost':>13}"]
        for row in self.rows:
            lines.append(
                f"{row.name:<22}{row.rows:>7,}{row.places:>10,}{row.useful:>9.1%}{row.cut:>15,}{row.dropped:>13,}"
            )
        return "\n".join(lines)


PADDED = ("padded to max_length", "padded to the batch", "similar lengths")


def compare_layouts(lengths: Sequence[int], length: int, batch_size: int = 8, seed: int = 0) -> Layouts:
    """Lay documents of these lengths out in each way.

    Args:
        lengths: tokens of each document, at least 1.
        length: tokens of a row at most (max_length).
        batch_size: rows of a batch, where the layout pads.
        seed: of the order in which rows are drawn.

    Raises:
        ValueError: no documents, one without a token, length < 2, or batch_size < 1.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError("nothing to lay out: give lengths of at least 1 token")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    packed = [_packed(lengths, length, name) for name in STRATEGIES]
    sizes = [min(size, length) for size in lengths]
    long, lost = sum(size > length for size in lengths), sum(lengths) - sum(sizes)
    drawn = order(len(sizes), seed, epoch=0)
    shuffled = [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
    places = (
        len(sizes) * length,
        padding(shuffled, sizes).places,
        padding(by_length(sizes, batch_size, seed, epoch=0), sizes).places,
    )
    padded = [
        LayoutRow(name, len(sizes), taken, sum(sizes), long, lost)
        for name, taken in zip(PADDED, places, strict=True)
    ]  # fmt: skip
    return Layouts(len(lengths), sum(lengths), length, (*padded, *packed))


def _packed(lengths: Sequence[int], length: int, strategy: str) -> LayoutRow:
    layout = lay_out(lengths, length, strategy)  # pyright: ignore[reportArgumentType]
    taken = layout.stop_p - layout.start_p
    cut = {int(document) for document in layout.document_p[taken < layout.sizes_n[layout.document_p]]}
    tokens = int(taken.sum())
    return LayoutRow(strategy, len(layout), len(layout) * length, tokens, len(cut), sum(lengths) - tokens)


def numbered(lengths: Sequence[int]) -> list[Example]:
    """Documents of these lengths whose every token is trained. Ids say where a token comes from: document 2's are
    200, 201, ... (with documents of up to 100 tokens)."""
    documents = [list(range(100 * number, 100 * number + size)) for number, size in enumerate(lengths, start=1)]
    return [Example(ids, list(ids)) for ids in documents]


def mixed_lengths(count: int, middle: float = 90, spread: float = 0.7, least: int = 8, seed: int = 0) -> list[int]:
    """Lengths as chat data has them: half of them below `middle`, a long tail above (log-normal)."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return [max(least, round(size)) for size in (middle * (spread * drawn).exp()).tolist()]


def letters(rows: Sequence[Batch], length: int) -> str:
    """A line for each row: documents of `numbered` as a, b, c, ..., padding and what is left of the length as dots."""
    lines = []
    for row in rows:
        for ids, documents in zip(row.input_ids_bs.tolist(), row.documents_bs.tolist(), strict=True):
            held = [chr(ord("a") - 1 + i // 100) if d >= 0 else "." for i, d in zip(ids, documents, strict=True)]
            lines.append("".join(held).ljust(length, "."))
    return "\n".join(lines)
