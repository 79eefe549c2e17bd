"""Which rows meet in a batch, and when: shuffled by seed and epoch, by similar length, or by a budget of tokens.

Rows of one batch are padded to the longest of them, and padding is computed like anything else. If lengths differ
much, more than half of a shuffled batch can be padding. Sorting all rows by length would end that, but then an epoch
begins with the long rows and ends with the short ones, and each meets the same neighbours in every epoch. The
compromise sorts a little and shuffles twice:

    shuffle the rows        7 2 9 | 1 8 3 | 5 5 2 | 9 1 4         lengths, rows of 3, windows of 2 batches
    sort within windows     9 8 7 | 3 2 1 | 9 5 5 | 4 2 1
    shuffle the batches     9 5 5 | 3 2 1 | 4 2 1 | 9 8 7

Everything is a pure function of seed and epoch: a run that goes on from a checkpoint finds the same batches without
replaying the ones before. Every row comes exactly once an epoch.

Left out: transformers' LengthGroupedSampler keeps the sorted batches in their order, with the longest row in the first,
so that too little memory shows at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


def order(count: int, seed: int, epoch: int) -> list[int]:
    """0 .. count - 1 in the random order of this epoch: that of accelerate's SeedableRandomSampler."""
    return _permutation(count, _generator(seed, epoch))


def by_length(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, window: int = 50) -> list[list[int]]:
    """Batches of `batch_size` rows of similar length. As many batches as without sorting; one may be smaller.

    Args:
        lengths: tokens of each row.
        window: batches whose rows are sorted together; 1 saves nothing, more saves more and makes a batch less random.

    Returns:
        the indices of the rows of each batch.

    Raises:
        ValueError: batch_size or window below 1.
    """
    _check(batch_size=batch_size, window=window)
    generator = _generator(seed, epoch)
    rows = _sorted_in_windows(lengths, batch_size * window, generator)
    return _shuffled([rows[start : start + batch_size] for start in range(0, len(rows), batch_size)], generator)


def by_tokens(lengths: Sequence[int], budget: int, seed: int, epoch: int, window: int = 1000) -> list[list[int]]:
    """Batches of similar length that hold at most `budget` tokens each, padding included: many short rows or few long
    ones, which need the same memory and time. How many batches there are may differ a little from epoch to epoch.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a batch: its rows times the longest of them.
        window: rows that are sorted together.

    Returns:
        the indices of the rows of each batch.

    Raises:
        ValueError: a row longer than the budget, or window below 1.
    """
    _check(budget=budget, window=window)
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > budget:
        raise ValueError(
            f"row {longest} has {lengths[longest]} tokens, more than the budget of {budget}: raise it or cut the row"
        )
    generator = _generator(seed, epoch)
    batches: list[list[int]] = []
    most = 0
    for row in _sorted_in_windows(lengths, window, generator):
        # Windows meet in a batch, so its first row need not be its longest.
        most = max(most, lengths[row])
        if not batches or (len(batches[-1]) + 1) * most > budget:
            batches.append([])
            most = lengths[row]
        batches[-1].append(row)
    return _shuffled(batches, generator)


@dataclass(frozen=True)
class Padding:
    """What padding costs: `places` are computed, and `tokens` of them hold a token."""

    batches: int
    tokens: int
    places: int

    @property
    def waste(self) -> float:
        """Share of the places that are padding."""
        return 1 - self.tokens / self.places if self.places else 0.0

    def format(self) -> str:
        """One line."""
        return f"{self.batches:,} batches, {self.tokens:,} tokens in {self.places:,} places: {self.waste:.1%} padding"


def padding(batches: Iterable[Sequence[int]], lengths: Sequence[int], multiple_of: int = 1) -> Padding:
    """Padding of these batches of rows, each padded to its longest and that rounded up to a multiple."""
    _check(multiple_of=multiple_of)
    count = tokens = places = 0
    for batch in batches:
        sizes = [lengths[row] for row in batch]
        count += 1
        tokens += sum(sizes)
        places += len(sizes) * -(-max(sizes) // multiple_of) * multiple_of
    return Padding(count, tokens, places)


def _sorted_in_windows(lengths: Sequence[int], window: int, generator: torch.Generator) -> list[int]:
    """All rows in random order, but from longest to shortest within each window of so many."""
    rows = _permutation(len(lengths), generator)
    windows = [rows[start : start + window] for start in range(0, len(rows), window)]
    return [row for each in windows for row in sorted(each, key=lambda row: -lengths[row])]


def _shuffled(batches: list[list[int]], generator: torch.Generator) -> list[list[int]]:
    return [batches[index] for index in _permutation(len(batches), generator)]


def _permutation(count: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(count, generator=generator).tolist()


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + epoch)


def _check(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
