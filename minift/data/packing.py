"""Packing: put several documents in one row, so that no time is spent on padding.

    documents  aaaaaaa bbbbb ccc dd e        rows of 8       "bfd"        "wrapped"
                                                             aaaaaaae     aaaaaaab
                                                             bbbbbccc     bbbbcccd
                                                             dd           de

- "bfd", best fit decreasing: longest first, each into the row with the least space that still holds it. Documents stay
  whole; those longer than a row are cut, and the rest is dropped. Near-optimal: at most about 11/9 of the fewest
  possible rows, and with many short documents to fill the gaps there are hardly any.
- "bfd_split": long documents are first cut into pieces of a row's length, so nothing is dropped; then the same.
- "wrapped": concatenate everything and cut every `length` tokens. No row but the last has a gap, but documents are
  torn: the second half is trained without its beginning.

In each the pieces keep their own document number, and their positions start again at 0, so no piece sees its
neighbours, and no piece's first token is predicted from another piece. TRL's "wrapped" lets them see each other. The
rows equal TRL's on up to 1000 documents; it packs in batches of so many, which leaves a gap at the end of each.

Left out: choosing which documents meet in a row (by topic, say), and bins of unequal size.

Source: Fewer Truncations Improve Language Modeling, arXiv 2404.10830; TRL `data_utils.pack_dataset`.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from minift.data.collate import Batch, flatten
from minift.data.encode import Example

Strategy = Literal["bfd", "bfd_split", "wrapped"]
STRATEGIES: tuple[Strategy, ...] = ("bfd", "bfd_split", "wrapped")
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Which pieces of which documents lie in which row. It needs the lengths of the documents only, not their tokens.

    Attributes:
        length: tokens that a row holds at most.
        sizes_n: int64 [n], tokens of each document.
        document_p: int64 [p], the document of each piece; pieces stand in the order of the rows.
        start_p, stop_p: int64 [p]; a piece holds the tokens start .. stop - 1 of its document.
        bounds_r: int64 [rows + 1]; row r holds the pieces bounds_r[r] .. bounds_r[r + 1] - 1.
    """

    length: int
    sizes_n: Integers
    document_p: Integers
    start_p: Integers
    stop_p: Integers
    bounds_r: Integers

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.bounds_r) - 1

    def row(self, examples: Sequence[Example], number: int) -> Batch:
        """Row `number` of these documents, [1, s] with s <= length."""
        pieces = slice(self.bounds_r[number], self.bounds_r[number + 1])
        parts = zip(*(part[pieces].tolist() for part in (self.document_p, self.start_p, self.stop_p)), strict=True)
        return flatten([_cut(examples[document], start, stop) for document, start, stop in parts])


@dataclass(frozen=True)
class PackReport:
    """What packing did.

    Attributes:
        rows, length: how many rows of at most how many tokens.
        documents, tokens: what they hold; documents without a token do not count.
        efficiency: share of the rows' space that holds a token.
        documents_cut: documents that are not in one piece, or not whole.
        tokens_dropped: tokens of the documents that are in no row.
        untrained_rows: numbers of the rows in which no label counts: time spent for nothing.
    """

    rows: int
    length: int
    documents: int
    tokens: int
    efficiency: float
    documents_cut: int
    tokens_dropped: int
    untrained_rows: tuple[int, ...]

    def format(self) -> str:
        """One line for each fact worth a look."""
        lines = [
            f"{_count(self.rows, 'row')} of {self.length} tokens hold {_count(self.documents, 'document')} of "
            f"{_count(self.tokens, 'token')}: {self.efficiency:.1%} full"
        ]
        if self.documents_cut:
            dropped = _count(self.tokens_dropped, "token")
            lines.append(f"{_count(self.documents_cut, 'document')} cut, {dropped} dropped")
        if self.untrained_rows:
            lines.append(f"{_count(len(self.untrained_rows), 'row')} without a token to train on")
        return "\n".join(lines)


def pack(examples: Sequence[Example], length: int, strategy: Strategy = "bfd") -> list[Batch]:
    """Pack documents into rows of at most `length` tokens.

    Returns:
        batches of one row each, [1, s] with s <= length; `stack` puts several under each other. A row may be left with
        no trained token if documents had to be cut; `train` refuses or drops those.

    Raises:
        ValueError: unknown strategy, length < 2, or no examples.
    """
    layout = lay_out([len(example) for example in examples], length, strategy)
    return [layout.row(examples, number) for number in range(len(layout))]


def lay_out(sizes: Sequence[int] | Integers, length: int, strategy: Strategy = "bfd") -> Layout:
    """What `pack` would do with documents of these sizes. Documents without a token are left out.

    Raises:
        ValueError: unknown strategy, length < 2, or not a single token.
    """
    if length < 2:
        raise ValueError(f"packing length {length}: a row needs at least 2 tokens")
    sizes_n = np.asarray(sizes, dtype=np.int64)
    if not sizes_n.any():
        raise ValueError("nothing to pack: no examples, or none with a token")
    if strategy == "wrapped":
        document_p, start_p, stop_p = _pieces(sizes_n, np.arange(0, sizes_n.sum(), length))
        row_p = np.cumsum(stop_p - start_p) - 1  # where the piece's last token stands in all rows behind each other
        return Layout(length, sizes_n, document_p, start_p, stop_p, _bounds(row_p // length))
    if strategy == "bfd":
        (document_p,) = sizes_n.nonzero()
        start_p, stop_p = np.zeros_like(document_p), sizes_n[document_p].clip(max=length)
    elif strategy == "bfd_split":
        offsets_n = np.cumsum(sizes_n) - sizes_n
        pieces_n = -(-sizes_n // length)
        nth_p = np.arange(pieces_n.sum()) - np.repeat(np.cumsum(pieces_n) - pieces_n, pieces_n)
        document_p, start_p, stop_p = _pieces(sizes_n, np.repeat(offsets_n, pieces_n) + nth_p * length)
    else:
        raise ValueError(f"unknown packing strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    order_p, row_p = _best_fit(stop_p - start_p, length)
    return Layout(length, sizes_n, document_p[order_p], start_p[order_p], stop_p[order_p], _bounds(row_p))


def pack_report(layout: Layout, rows: Sequence[Batch]) -> PackReport:
    """Count what a layout did to the documents, given the rows that were made of it."""
    taken_p = layout.stop_p - layout.start_p
    cut_p = taken_p < layout.sizes_n[layout.document_p]
    tokens = int(taken_p.sum())
    return PackReport(
        rows=len(rows),
        length=layout.length,
        documents=int(np.count_nonzero(layout.sizes_n)),
        tokens=tokens,
        efficiency=efficiency(rows, layout.length),
        documents_cut=len(np.unique(layout.document_p[cut_p])),
        tokens_dropped=int(layout.sizes_n.sum()) - tokens,
        untrained_rows=tuple(number for number, row in enumerate(rows) if not row.trained_tokens),
    )


def efficiency(rows: Sequence[Batch], length: int) -> float:
    """Share of the space of these rows, `length` tokens each, that holds a token."""
    places = length * sum(row.input_ids_bs.shape[0] for row in rows)
    return sum(row.tokens for row in rows) / places if places else 1.0


def best_fit_decreasing(lengths: Sequence[int] | Integers, capacity: int) -> list[list[int]]:
    """Indices of `lengths`, grouped so that no group sums to more than `capacity`.

    Ties are broken as TRL does: equal lengths in their order, equal spaces oldest first.

    Raises:
        ValueError: a length below 1 or above the capacity.
    """
    sizes_n = np.asarray(lengths, dtype=np.int64)
    if sizes_n.size and not 1 <= sizes_n.min() <= sizes_n.max() <= capacity:
        raise ValueError(f"lengths must be 1 to {capacity}, got {sizes_n.min()} to {sizes_n.max()}: cut or drop them")
    order_n, row_n = _best_fit(sizes_n, capacity)
    order = order_n.tolist()
    return [order[first:last] for first, last in pairwise(_bounds(row_n).tolist())]


def _best_fit(sizes_n: Integers, capacity: int) -> tuple[Integers, Integers]:
    """Indices of `sizes_n` in the order in which they lie in the rows, and the row of each.

    Equal sizes are placed together, which is what makes a million of them cheap. A row that took one document and could
    take another has the least space that still holds one, so it is the next document's, too, until it cannot hold one
    more. Rows of equal space are therefore filled one after the other, with `each` documents of this size a row.
    """
    order_n = np.argsort(-sizes_n, kind="stable")
    falling_n = sizes_n[order_n]
    row_n = np.empty_like(order_n)
    spaces, rows = _Spaces(), 0
    for first, end in pairwise([*np.flatnonzero(np.diff(falling_n, prepend=0)).tolist(), len(order_n)]):
        size = int(falling_n[first])
        while first < end:
            found = spaces.least(size)
            space = found or capacity
            each = space // size
            wanted = -(-(end - first) // each)
            if found:
                chosen = spaces.take(found, wanted)
            else:
                chosen = np.arange(rows, rows + wanted)
                rows += wanted
            count = min(each * len(chosen), end - first)
            row_n[first : first + count] = np.repeat(chosen, each)[:count]
            first += count
            full, rest = divmod(count, each)  # `rest` documents for the last row: too few were left to fill it
            spaces.put(space - each * size, chosen[:full])
            spaces.put(space - rest * size, chosen[full:])
    by_row = np.argsort(row_n, kind="stable")
    return order_n[by_row], row_n[by_row]


class _Spaces:
    """Rows by the space that is left in them, for each space in the order in which they came to have it."""

    def __init__(self) -> None:
        self.rising: list[int] = []  # the spaces that some row has
        self.rows: dict[int, deque[Integers]] = {}  # first in, first out, in chunks

    def least(self, size: int) -> int:
        """The least space of at least `size`; 0 if no row has so much."""
        found = bisect_left(self.rising, size)
        return self.rising[found] if found < len(self.rising) else 0

    def take(self, space: int, most: int) -> Integers:
        """Remove at least 1 and at most `most` of the rows with this space, oldest first."""
        chunks = self.rows[space]
        chunk = chunks.popleft()
        if len(chunk) > most:
            chunks.appendleft(chunk[most:])
        elif not chunks:
            del self.rows[space]
            del self.rising[bisect_left(self.rising, space)]
        return chunk[:most]

    def put(self, space: int, chunk: Integers) -> None:
        """Add rows that now have this space."""
        if not space or not len(chunk):
            return
        if space not in self.rows:
            insort(self.rising, space)
            self.rows[space] = deque()
        self.rows[space].append(chunk)


def _pieces(sizes_n: Integers, cuts: Integers) -> tuple[Integers, Integers, Integers]:
    """Document, start and stop of the pieces that come of cutting all documents, behind each other, at `cuts`."""
    ends_n = np.cumsum(sizes_n)
    begins_n = ends_n - sizes_n
    begin_p = np.union1d(begins_n[sizes_n > 0], cuts)
    stop_p = np.append(begin_p[1:], ends_n[-1])
    document_p = np.searchsorted(ends_n, begin_p, side="right")
    return document_p, begin_p - begins_n[document_p], stop_p - begins_n[document_p]


def _bounds(row_p: Integers) -> Integers:
    """From the row of each piece, which rises by steps of 1, to the first piece of each row, and the end."""
    return np.append(np.flatnonzero(np.diff(row_p, prepend=-1)), len(row_p))


def _cut(example: Example, start: int, stop: int) -> Example:
    return Example(example.input_ids[start:stop], example.labels[start:stop])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
