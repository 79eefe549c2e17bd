"""Order and batches: against accelerate's and transformers' samplers, a search, and what padding really costs."""

from itertools import pairwise

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from minift.data.batching import Padding, by_length, by_tokens, order, padding
from minift.data.collate import collate
from minift.data.encode import Example

# The same examples in every run, and no time limit for one: this machine may be busy.
steady = settings(derandomize=True, deadline=None)
LENGTHS = st.lists(st.integers(1, 40), max_size=60)
SEEDS = st.integers(0, 1000)


def long_tailed(count: int) -> list[int]:
    torch.manual_seed(0)
    return torch.empty(count).log_normal_(5, 1).clamp(1, 2048).int().tolist()


# --- the order


@steady
@given(st.integers(1, 100), SEEDS)
def test_the_order_of_three_epochs_equals_accelerate(count: int, seed: int):
    sampler = SeedableRandomSampler(range(count), generator=torch.Generator(), data_seed=seed)
    for epoch in range(3):
        assert order(count, seed, epoch) == list(sampler)


def test_the_order_depends_on_nothing_else():
    torch.manual_seed(1)
    first = order(50, 3, 2)
    torch.manual_seed(2)
    assert order(50, 3, 2) == first
    assert order(50, 3, 1) != first != order(50, 4, 2)


# --- batches of similar length


@steady
@given(LENGTHS, st.integers(1, 7), st.integers(1, 5), SEEDS, st.integers(0, 3))
def test_each_row_comes_once_and_batches_are_full(lengths: list[int], size: int, window: int, seed: int, epoch: int):
    batches = by_length(lengths, size, seed, epoch, window)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    sizes = sorted(map(len, batches), reverse=True)
    full, rest = divmod(len(lengths), size)
    assert sizes == [size] * full + [rest] * (rest > 0)
    assert all(lengths[a] >= lengths[b] for batch in batches for a, b in pairwise(batch))
    assert batches == by_length(lengths, size, seed, epoch, window)


@pytest.mark.parametrize(("size", "window"), [(1, 1), (4, 1), (4, 5), (8, 50), (7, 3)])
def test_the_batches_are_those_of_transformers(size: int, window: int):
    """But for their order. It moves the longest row to the front, which does nothing if that is in the first window
    and there the longest anyway."""
    lengths = long_tailed(150)
    lengths[order(150, 5, 2)[0]] = 5000
    generator = torch.Generator().manual_seed(7)
    theirs = get_length_grouped_indices(lengths, size, mega_batch_mult=window, generator=generator)
    batches = [theirs[start : start + size] for start in range(0, 150, size)]
    ours = by_length(lengths, size, seed=5, epoch=2, window=window)
    assert sorted(ours) == sorted(batches)
    assert ours != batches


def test_lengths_do_not_follow_the_epoch():
    """Sorted batches would begin with the long rows. With 200 shuffled batches a correlation of length and time has a
    standard deviation of 1/sqrt(199) = 0.07; four of them are 0.28, and sorting gives more than 0.7."""
    lengths = long_tailed(1600)

    def drift(batches: list[list[int]]) -> float:
        longest = torch.tensor([float(max(lengths[row] for row in batch)) for batch in batches]).log()
        return abs(float(torch.corrcoef(torch.stack([longest, torch.arange(len(batches)).float()]))[0, 1]))

    batches = by_length(lengths, 8, seed=0, epoch=0, window=200)
    assert drift(batches) < 0.28
    assert drift(sorted(batches, key=lambda batch: -lengths[batch[0]])) > 0.7


def test_neighbours_change_from_epoch_to_epoch():
    lengths = [1 + n % 7 for n in range(300)]  # many equal lengths, which sorting must not put in the same order again
    epochs = [{frozenset(batch) for batch in by_length(lengths, 4, 0, epoch, window=75)} for epoch in range(2)]
    assert len(epochs[0] & epochs[1]) <= 3  # of 75


# --- batches by tokens


@steady
@given(LENGTHS, st.integers(40, 200), st.integers(1, 20), SEEDS)
def test_batches_by_tokens_keep_to_the_budget(lengths: list[int], budget: int, window: int, seed: int):
    batches = by_tokens(lengths, budget, seed, 0, window)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    places = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert all(0 < count <= budget for count in places)


@steady
@given(LENGTHS, st.integers(40, 200), SEEDS)
def test_batches_by_tokens_are_as_few_as_sorted_rows_allow(lengths: list[int], budget: int, seed: int):
    """Rows from longest to shortest, cut into runs that keep to the budget: the fewest runs, by trying every cut."""
    falling = sorted(lengths, reverse=True)
    fewest = [0] * (len(falling) + 1)  # of the rows from here on
    for start in reversed(range(len(falling))):
        most = budget // falling[start]
        fewest[start] = 1 + min(fewest[start + 1 : start + most + 1])
    assert len(by_tokens(lengths, budget, seed, 0, window=len(lengths) + 1)) == fewest[0]


def test_batches_by_tokens_change_from_epoch_to_epoch():
    lengths = long_tailed(200)
    first, again, later = (by_tokens(lengths, 4096, 0, epoch) for epoch in (0, 0, 1))
    assert first == again != later
    in_order = [max(lengths[row] for row in batch) for batch in first]
    assert in_order != sorted(in_order, reverse=True)


# --- what padding costs


@steady
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 5), st.sampled_from([1, 2, 8]))
def test_padding_is_what_the_collator_adds(lengths: list[int], size: int, multiple_of: int):
    batches = by_length(lengths, size, 0, 0, 2)
    made = [
        collate([Example([3] * lengths[row], [3] * lengths[row]) for row in batch], 0, multiple_of=multiple_of)
        for batch in batches
    ]
    cost = padding(batches, lengths, multiple_of)
    padded = sum(int((batch.documents_bs < 0).sum()) for batch in made)
    assert (cost.batches, cost.tokens) == (len(made), sum(batch.tokens for batch in made))
    assert cost.places == sum(batch.input_ids_bs.numel() for batch in made)
    assert cost.waste == pytest.approx(padded / cost.places, abs=1e-12)  # a few roundings of a float64 below 1


def test_similar_lengths_save_padding():
    lengths = long_tailed(4000)
    rows = order(4000, 0, 0)
    shuffled = padding([rows[start : start + 8] for start in range(0, 4000, 8)], lengths)
    grouped = padding(by_length(lengths, 8, 0, 0), lengths)
    budgeted = padding(by_tokens(lengths, 4096, 0, 0), lengths)
    assert shuffled.waste > 0.5
    assert max(grouped.waste, budgeted.waste) < 0.1
    assert padding(by_length(lengths, 8, 0, 0, window=1), lengths) == shuffled  # sorting within batches saves nothing


def test_padding_in_words():
    cost = padding([[0, 1], [2]], [1000, 600, 4])
    assert cost == Padding(batches=2, tokens=1604, places=2004)
    assert cost.format() == "2 batches, 1,604 tokens in 2,004 places: 20.0% padding"
    assert padding([], []).waste == 0


# --- refusals


@pytest.mark.parametrize(("name", "settings"), [("batch_size", (0, 0, 0, 1)), ("window", (4, 0, 0, 0))])
def test_a_bad_setting_of_by_length_is_refused(name: str, settings: tuple[int, int, int, int]):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        by_length([1, 2], *settings)


def test_a_bad_setting_of_by_tokens_is_refused():
    with pytest.raises(ValueError, match=r"row 1 has 9 tokens, more than the budget of 8"):
        by_tokens([8, 9, 3], 8, 0, 0)
    with pytest.raises(ValueError, match="budget must be at least 1, got -1"):
        by_tokens([], -1, 0, 0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        by_tokens([1], 8, 0, 0, 0)
    with pytest.raises(ValueError, match="multiple_of must be at least 1, got 0"):
        padding([[0]], [1], 0)
