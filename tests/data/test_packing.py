"""Packing against TRL's rows, against the obvious quadratic algorithm, and against what must hold of any packing."""

import random
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.data.collate import Batch, collate
from minift.data.encode import IGNORE, Example, encode
from minift.data.packing import STRATEGIES, PackReport, best_fit_decreasing, efficiency, lay_out, pack, pack_report
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
@pytest.mark.parametrize(
    ("strategy", "length"),
    [("bfd", 48), ("bfd", 64), ("bfd", 100), ("bfd", 101), ("bfd", 512), ("bfd_split", 48), ("bfd_split", 100)],
)
def test_bfd_equals_trl(tiny: Path, strategy: Any, length: int, completion_only: bool):
    drawn = [row for row in rows(60, length) if row["completion"][-1]["content"].strip()]  # empty answers are refused
    data = [*drawn, *peers.demo_rows(12), *peers.demo_rows(12)]  # repeated rows: ties
    theirs = peers.peer_packs(tiny, data, length, strategy, completion_only)
    tokenizer = Tokenizer(tiny)
    examples = [encode(tokenizer, row, "completion" if completion_only else "all") for row in data]
    if length == 48:
        assert max(map(len, examples)) > length  # something is cut
    ours = pack(examples, length, strategy)
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


@pytest.fixture(scope="module")
def many() -> list[Example]:
    """2300 documents, most short, some longer than a row, some empty: three of the batches in which TRL packs."""
    draw = random.Random(1)
    sizes = [min(int(draw.lognormvariate(3, 1)), 400) for _ in range(2299)] + [0]
    assert 0 in sizes[:-1] and max(sizes) > 200
    return [
        Example(list(range(end - size, end)), [i if draw.random() < 0.7 else IGNORE for i in range(end - size, end)])
        for size, end in zip(sizes, accumulate(sizes), strict=True)
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length", [16, 100, 1000])
def test_many_documents_equal_trl_batch_by_batch(many: list[Example], strategy: Any, length: int):
    from trl.data_utils import pack_dataset

    columns = {"input_ids": [e.input_ids for e in many], "labels": [e.labels for e in many]}
    theirs: Any = pack_dataset(datasets.Dataset.from_dict(columns), length, strategy)
    batches = [many[start : start + 1000] for start in range(0, len(many), 1000)]
    ours = [row for batch in batches for row in pack(batch, length, strategy)]
    assert [flat(row.input_ids_bs) for row in ours] == theirs["input_ids"][:]
    if strategy == "wrapped":
        firsts = [[position == 0 for position in flat(row.positions_bs)] for row in ours]
        want = [
            [IGNORE if first else label for first, label in zip(*pair, strict=True)]
            for pair in zip(firsts, theirs["labels"][:], strict=True)
        ]
    else:
        assert [lengths(row) for row in ours] == theirs["seq_lengths"][:]
        want = [expected_labels(row) for row in theirs]
    assert [flat(row.labels_bs) for row in ours] == want
    # Each of its batches ends in a row with a gap, or in several, unless the documents happen to fill it.
    whole = len(pack(many, length, strategy))
    assert whole < len(theirs) if length == 1000 else whole <= len(theirs)


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


@pytest.mark.parametrize("shape", ["long tail", "uniform"])
def test_a_million_documents_are_packed_in_seconds(shape: str):
    """The goal: 5 s of one core, 99 % full. A tenth of that was measured, so a busy machine does not matter."""
    draw = np.random.default_rng(0)
    sizes = {
        "long tail": np.clip(draw.lognormal(5.5, 1, 1_000_000).astype(int), 1, 2048),
        "uniform": draw.integers(1, 2049, 1_000_000),
    }[shape]
    began = time.process_time()
    ours = best_fit_decreasing(sizes, 2048)
    assert time.process_time() - began < 5
    assert sizes.sum() >= 0.99 * 2048 * len(ours)
    everything = np.array([index for row in ours for index in row])
    assert np.array_equal(np.sort(everything), np.arange(len(sizes)))
    ends = np.cumsum([len(row) for row in ours])
    assert np.diff(np.cumsum(sizes[everything])[ends - 1], prepend=0).max() <= 2048


@steady
@given(st.lists(st.integers(1, 30), max_size=50).flatmap(lambda s: st.tuples(st.just(s), st.permutations(s))))
def test_the_order_of_the_documents_does_not_change_the_rows(drawn: tuple[list[int], list[int]]):
    ours, shuffled = (
        [[sizes[index] for index in row] for row in best_fit_decreasing(sizes, 30)] for sizes in map(list, drawn)
    )
    assert ours == shuffled


# --- what must hold of any packing


@steady
@given(documents(), st.integers(2, 24))
def test_bfd_keeps_every_document_whole(examples: list[Example], length: int):
    packed = pack(examples, length, "bfd")
    found = sorted(tuple(piece.input_ids) for row in packed for piece in pieces(row))
    assert found == sorted(tuple(example.input_ids[:length]) for example in examples)


@steady
@given(documents(), st.integers(2, 24))
def test_bfd_split_keeps_every_token_in_the_fewest_pieces(examples: list[Example], length: int):
    packed = pack(examples, length, "bfd_split")
    found = sorted(tuple(piece.input_ids) for row in packed for piece in pieces(row))
    assert found == sorted(
        tuple(example.input_ids[start : start + length])
        for example in examples
        for start in range(0, len(example), length)
    )


@steady
@given(documents(), st.integers(2, 24))
def test_wrapped_keeps_every_token_in_order(examples: list[Example], length: int):
    packed = pack(examples, length, "wrapped")
    everything = [token for example in examples for token in example.input_ids]
    assert [token for row in packed for token in flat(row.input_ids_bs)] == everything
    assert [row.input_ids_bs.shape[1] for row in packed[:-1]] == [length] * (len(packed) - 1)
    assert 1 <= packed[-1].input_ids_bs.shape[1] <= length


@steady
@given(documents(), st.integers(2, 24), st.sampled_from(STRATEGIES))
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


# --- what is reported


@steady
@given(documents(), st.integers(2, 24), st.sampled_from(STRATEGIES))
def test_the_report_counts_what_the_rows_hold(examples: list[Example], length: int, strategy: Any):
    sizes = [len(example) for example in examples]
    packed = pack(examples, length, strategy)
    report = pack_report(lay_out(sizes, length, strategy), packed)
    ids = [flat(row.input_ids_bs) for row in packed]
    kept = sum(map(len, ids))
    assert (report.rows, report.length, report.documents) == (len(packed), length, len(examples))
    assert (report.tokens, report.tokens_dropped) == (kept, sum(sizes) - kept)
    assert report.efficiency == efficiency(packed, length) == kept / (len(packed) * length)
    assert (report.tokens_dropped > 0) == (strategy == "bfd" and max(sizes) > length)
    whole = {tuple(piece.input_ids) for row in packed for piece in pieces(row)}
    assert report.documents_cut == sum(tuple(example.input_ids) not in whole for example in examples)
    untrained = [n for n, row in enumerate(packed) if all(label == IGNORE for label in flat(row.labels_bs))]
    assert list(report.untrained_rows) == untrained


def test_the_report_in_words():
    silent, spoken = Example([1] * 6, [IGNORE] * 6), Example([2] * 3, [2] * 3)
    layout = lay_out([6, 3], 4)
    report = pack_report(layout, pack([silent, spoken], 4))
    assert report == PackReport(2, 4, 2, 7, 7 / 8, 1, 2, (0,))
    assert report.format() == (
        "2 rows of 4 tokens hold 2 documents of 7 tokens: 87.5% full\n"
        "1 document cut, 2 tokens dropped\n"
        "1 row without a token to train on"
    )
    whole = pack_report(lay_out([3] * 1000, 3), pack([spoken] * 1000, 3))
    assert whole.format() == "1,000 rows of 3 tokens hold 1,000 documents of 3,000 tokens: 100.0% full"


def test_efficiency_counts_each_row_of_a_padded_batch():
    assert efficiency([collate([Example([1] * 3, [1] * 3), Example([1], [1])], 0)], 4) == 4 / 8


def test_a_row_is_made_when_it_is_drawn():
    """A layout needs lengths only, so a data set need not be in memory as rows."""

    class Drawn(list[Example]):
        seen: list[int]

        def __getitem__(self, index: Any) -> Any:
            self.seen.append(index)
            return super().__getitem__(index)

    examples = Drawn([Example([n] * size, [n] * size) for n, size in enumerate([3, 9, 5, 2])])
    examples.seen = []
    layout = lay_out([3, 9, 5, 2], 8)
    assert len(layout) == 3
    row = layout.row(examples, 1)
    assert row.input_ids_bs.tolist() == [[2, 2, 2, 2, 2, 0, 0, 0]]
    assert examples.seen == [2, 0]


# --- refusals


@pytest.mark.parametrize("sizes", [[0], [3, -1], [9], [3, 9]])
def test_lengths_that_fit_no_row_are_refused(sizes: list[int]):
    with pytest.raises(ValueError, match=rf"1 to 8, got {min(sizes)} to {max(sizes)}"):
        best_fit_decreasing(sizes, 8)


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_a_length_below_two_is_refused(length: int):
    with pytest.raises(ValueError, match=f"packing length {length}"):
        pack([Example([1], [1])], length)


def test_no_examples_and_unknown_strategies_are_refused():
    for examples in ([], [Example([], [])]):
        with pytest.raises(ValueError, match="nothing to pack"):
            pack(examples, 8)
    with pytest.raises(ValueError, match="'ffd': choose one of bfd, bfd_split, wrapped"):
        pack([Example([1, 2], [1, 2])], 8, "ffd")  # pyright: ignore[reportArgumentType]


def test_cutting_may_leave_a_row_without_a_trained_token():
    """`pack` says so; it is `train` that refuses such rows, or drops them (test_loop.py)."""
    long = Example(list(range(20)), [IGNORE] * 15 + list(range(15, 20)))
    (row,) = pack([long], 8, "bfd")
    assert row.trained_tokens == 0 and flat(row.input_ids_bs) == list(range(8))
    for strategy in ("bfd_split", "wrapped"):
        assert [row.trained_tokens for row in pack([long], 8, strategy)] == [0, 1, 3]  # 16 begins the last piece
