"""Packing against TRL's rows, against the obvious quadratic algorithm, and against what must hold of any packing."""

import random
import time
from pathlib import Path
from typing import Any

import peers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.data.collate import Batch
from minift.data.encode import IGNORE, Example, encode
from minift.data.packing import best_fit_decreasing, pack
from minift.data.tokenizer import Tokenizer

# The same examples in every run, and no time limit for one: this machine may be busy.
steady = settings(derandomize=True, deadline=None)
WORDS = ["the", "sea", "is", "wide", "and", "deep", "12", "\n", "世界", "sleep."]


def rows(count: int, seed: int, most: int = 30) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "prompt": [{"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, most)))}],
            "completion": [{"role": "assistant", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, most)))}],
        }
        for _ in range(count)
    ]


@st.composite
def documents(draw: st.DrawFn) -> list[Example]:
    """Documents whose tokens are all different over the whole data set, so that none can be mistaken for another."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=12))
    out, first = [], 0
    for length in lengths:
        ids = list(range(first, first + length))
        trained = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        out.append(Example(ids, [token if t else IGNORE for token, t in zip(ids, trained, strict=True)]))
        first += length
    return out


def flat(tensor: Any) -> list[int]:
    (row,) = tensor.tolist()
    return row


def pieces(batch: Batch) -> list[Example]:
    """The documents of a packed row."""
    ids, labels, numbers = flat(batch.input_ids_bs), flat(batch.labels_bs), flat(batch.documents_bs)
    out = []
    for number in range(max(numbers) + 1):
        chosen = [i for i, found in enumerate(numbers) if found == number]
        out.append(Example([ids[i] for i in chosen], [labels[i] for i in chosen]))
    return out


def lengths(batch: Batch) -> list[int]:
    return [len(piece) for piece in pieces(batch)]


# --- against TRL


def expected_labels(theirs: dict[str, list[int]]) -> list[int]:
    """Its data set keeps the label of a document's first token; its collator masks it (position 0), ours is here."""
    labels, start = list(theirs["labels"]), 0
    for length in theirs["seq_lengths"]:
        labels[start] = IGNORE
        start += length
    return labels


@pytest.mark.parametrize("completion_only", [True, False], ids=["completion", "all"])
@pytest.mark.parametrize("length", [48, 64, 100, 101, 512])
def test_bfd_equals_trl(tiny: Path, length: int, completion_only: bool):
    data = [*rows(60, length), *peers.demo_rows(12), *peers.demo_rows(12)]  # repeated rows: ties
    theirs = peers.peer_packs(tiny, data, length, "bfd", completion_only)
    tokenizer = Tokenizer(tiny)
    examples = [encode(tokenizer, row, "completion" if completion_only else "all") for row in data]
    if length == 48:
        assert max(map(len, examples)) > length  # something is cut
    ours = pack(examples, length, "bfd")
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert flat(mine.input_ids_bs) == other["input_ids"]
        assert lengths(mine) == other["seq_lengths"]
        assert flat(mine.labels_bs) == expected_labels(other)


@pytest.mark.parametrize("length", [2, 33, 64, 1000])
def test_wrapped_equals_trl_in_its_ids(tiny: Path, length: int):
    """Its pieces see each other and ours do not, so the label of each piece's first token counts in TRL only."""
    data = rows(20, length)
    theirs = peers.peer_packs(tiny, data, length, "wrapped")
    ours = pack([encode(Tokenizer(tiny), row) for row in data], length, "wrapped")
    assert [flat(row.input_ids_bs) for row in ours] == [row["input_ids"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        starts = [position == 0 for position in flat(mine.positions_bs)]
        assert flat(mine.labels_bs) == [
            IGNORE if start else label for label, start in zip(other["labels"], starts, strict=True)
        ]


# --- against the obvious algorithm


def naive(sizes: list[int], capacity: int) -> list[list[int]]:
    """Look at every row for every document. Among equal spaces, the row that has had it for the longest time."""
    packed: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (space, since when)
    for when, index in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
        fitting = [(*space[row], row) for row in range(len(packed)) if space[row][0] >= sizes[index]]
        if fitting:
            left, _, row = min(fitting)
        else:
            left, row = capacity, len(packed)
            packed.append([])
            space.append((capacity, when))
        packed[row].append(index)
        space[row] = (left - sizes[index], when)
    return packed


@steady
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_best_fit_decreasing_equals_the_quadratic_one(drawn: tuple[int, list[int]]):
    capacity, sizes = drawn
    ours = best_fit_decreasing(sizes, capacity)
    assert ours == naive(sizes, capacity)
    assert sorted(index for row in ours for index in row) == list(range(len(sizes)))
    filled = [sum(sizes[index] for index in row) for row in ours]
    assert all(0 < total <= capacity for total in filled)
    # Two rows that are at most half full would have been one.
    assert sum(2 * total <= capacity for total in filled) <= 1


def test_best_fit_decreasing_stays_fast():
    """50,000 documents: a quadratic search would take minutes, this well under a second; the limit is 30 times that."""
    draw = random.Random(0)
    sizes = [draw.randint(1, 2048) for _ in range(50_000)]
    began = time.process_time()
    ours = best_fit_decreasing(sizes, 2048)
    assert time.process_time() - began < 15
    assert len(ours) <= 1.01 * sum(sizes) / 2048 + 1


# --- what must hold of any packing


@steady
@given(documents(), st.integers(2, 24))
def test_bfd_keeps_every_document_whole(examples: list[Example], length: int):
    packed = pack(examples, length, "bfd")
    found = sorted(tuple(piece.input_ids) for row in packed for piece in pieces(row))
    assert found == sorted(tuple(example.input_ids[:length]) for example in examples)


@steady
@given(documents(), st.integers(2, 24))
def test_wrapped_keeps_every_token_in_order(examples: list[Example], length: int):
    packed = pack(examples, length, "wrapped")
    everything = [token for example in examples for token in example.input_ids]
    assert [token for row in packed for token in flat(row.input_ids_bs)] == everything
    assert [row.input_ids_bs.shape[1] for row in packed[:-1]] == [length] * (len(packed) - 1)
    assert 1 <= packed[-1].input_ids_bs.shape[1] <= length


@steady
@given(documents(), st.integers(2, 24), st.sampled_from(["bfd", "wrapped"]))
def test_rows_are_well_formed_and_no_label_crosses_a_boundary(examples: list[Example], length: int, strategy: Any):
    origin = {token: number for number, example in enumerate(examples) for token in example.input_ids}
    trained = {label for example in examples for label in example.labels if label != IGNORE}
    packed = pack(examples, length, strategy)
    learned: set[int] = set()
    for row in packed:
        ids, labels, positions = flat(row.input_ids_bs), flat(row.labels_bs), flat(row.positions_bs)
        numbers = flat(row.documents_bs)
        assert 1 <= len(ids) <= length
        assert positions[0] == numbers[0] == 0
        for i in range(1, len(ids)):
            begins = numbers[i] != numbers[i - 1]
            assert numbers[i] - numbers[i - 1] in (0, 1)
            assert positions[i] == (0 if begins else positions[i - 1] + 1)
            assert (origin[ids[i]] != origin[ids[i - 1]]) <= begins
            if labels[i] != IGNORE:
                assert not begins and labels[i] == ids[i] and labels[i] in trained
        learned |= {label for label in labels if label != IGNORE}
    # Every label is still there but those of a piece's first token (and, for bfd, of what was cut off).
    cut = length if strategy == "bfd" else None
    firsts = {flat(row.input_ids_bs)[i] for row in packed for i, p in enumerate(flat(row.positions_bs)) if p == 0}
    kept = {token for example in examples for token in example.input_ids[:cut]}
    assert learned == (trained & kept) - firsts


# --- refusals


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_a_length_below_two_is_refused(length: int):
    with pytest.raises(ValueError, match=f"packing length {length}"):
        pack([Example([1], [1])], length)


def test_no_examples_and_unknown_strategies_are_refused():
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([], 8)
    with pytest.raises(ValueError, match="'ffd': choose 'bfd' or 'wrapped'"):
        pack([Example([1, 2], [1, 2])], 8, "ffd")  # pyright: ignore[reportArgumentType]


def test_cutting_may_leave_a_row_without_a_trained_token():
    """`pack` says so; it is `train` that refuses such rows, or drops them (test_loop.py)."""
    long = Example(list(range(20)), [IGNORE] * 15 + list(range(15, 20)))
    (row,) = pack([long], 8, "bfd")
    assert row.trained_tokens == 0 and flat(row.input_ids_bs) == list(range(8))
    assert [row.trained_tokens for row in pack([long], 8, "wrapped")] == [0, 1, 3]  # 16 begins the last piece
