"""Batches: padding, flattening, and the layout that computes a common beginning only once.

What a layout must keep is what a model learns from it: for each label that counts, the tokens that its prediction may
look at. `lessons` reads these pairs off a batch, by the rules that attention.py documents, and every layout of the same
examples must give the same pairs. TRL's collator and transformers' DataCollatorWithFlattening are the peers.
"""

from collections import Counter
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from minift.data.collate import Batch, collate, flatten, share_prefix, stack
from minift.data.encode import IGNORE, Example

PAD = 7  # also a token that occurs: nothing may be masked by its id
# The same examples in every run, and no time limit for one: this machine may be busy.
steady = settings(derandomize=True, deadline=None)
Lesson = tuple[tuple[int, ...], tuple[int, ...], int]

tokens = st.integers(0, 9)


@st.composite
def examples(draw: st.DrawFn, least: int = 1, most: int = 12) -> Example:
    ids = draw(st.lists(tokens, min_size=least, max_size=most))
    trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return Example(ids, [token if t else IGNORE for token, t in zip(ids, trained, strict=True)])


MULTIPLES = st.sampled_from([1, 2, 8])
PACKS = st.lists(st.lists(examples(), min_size=1, max_size=3), min_size=1, max_size=4)


@st.composite
def chats(draw: st.DrawFn) -> list[Example]:
    """Rows that begin alike, as chats do; labels may count anywhere, in the common part as well."""
    common = draw(st.lists(tokens, max_size=14))
    rows = [common + draw(st.lists(tokens, min_size=1, max_size=6)) for _ in range(draw(st.integers(1, 4)))]
    first = draw(st.integers(0, 16))
    out = []
    for ids in rows:
        begin = draw(st.one_of(st.just(first), st.integers(0, 20)))
        out.append(Example(ids, [token if i >= begin else IGNORE for i, token in enumerate(ids)]))
    return out


def lessons(batch: Batch) -> Counter[Lesson]:
    """(tokens seen, their positions, label) for each label that counts, with how often it occurs."""
    found: Counter[Lesson] = Counter()
    ids, labels = batch.input_ids_bs.tolist(), batch.labels_bs.tolist()
    positions, documents = batch.positions_bs.tolist(), batch.documents_bs.tolist()
    if batch.shared_prefix is not None:
        # One sequence. The loss shifts its labels as a whole, so nothing may be trained at the seams: not in the
        # prefix, which several rows share, and not at the first token of a row, which follows another row's last.
        prefix, own = batch.shared_prefix
        ends = [prefix, *(prefix + sum(own[: row + 1]) for row in range(len(own)))]
        assert ends[-1] == len(ids[0])
        assert all(labels[0][i] == IGNORE for i in [*range(1, prefix), *ends[:-1]] if i < len(ids[0]))
        # Attention does not look at the documents here: a token sees the prefix and all of its row that came before.
        documents = [[0] * len(documents[0])]
        ids, labels, positions, documents = (
            [table[0][:prefix] + table[0][begin:end] for begin, end in pairwise(ends)]
            for table in (ids, labels, positions, documents)
        )
    for row in range(len(ids)):
        for i in range(1, len(ids[row])):
            if labels[row][i] == IGNORE:
                continue
            seen = [j for j in range(i) if documents[row][j] == documents[row][i - 1]]
            context = tuple(ids[row][j] for j in seen), tuple(positions[row][j] for j in seen)
            found[(*context, labels[row][i])] += 1
    return found


def expected(rows: list[Example]) -> Counter[Lesson]:
    found: Counter[Lesson] = Counter()
    for row in rows:
        for i in range(1, len(row)):
            if row.labels[i] != IGNORE:
                found[(tuple(row.input_ids[:i]), tuple(range(i)), row.labels[i])] += 1
    return found


A, B = Example([1, 2, 3, 7], [IGNORE, 2, 3, 7]), Example([4, 5], [4, 5])


def test_padding_right():
    batch = collate([A, B], PAD)
    assert batch.input_ids_bs.tolist() == [[1, 2, 3, 7], [4, 5, PAD, PAD]]
    assert batch.labels_bs.tolist() == [[IGNORE, 2, 3, 7], [4, 5, IGNORE, IGNORE]]  # the real 7 keeps its label
    assert batch.positions_bs.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.documents_bs.tolist() == [[0, 0, 0, 0], [0, 0, -1, -1]]
    assert (batch.tokens, batch.trained_tokens) == (6, 4)


def test_padding_left():
    batch = collate([A, B], PAD, padding_side="left")
    assert batch.input_ids_bs.tolist() == [[1, 2, 3, 7], [PAD, PAD, 4, 5]]
    assert batch.labels_bs[1].tolist()[:2] == [IGNORE, IGNORE]
    assert batch.positions_bs.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch.documents_bs.tolist() == [[0, 0, 0, 0], [-1, -1, 0, 0]]
    assert batch.tokens == 6


def test_flattened():
    batch = flatten([A, B])
    assert batch.input_ids_bs.tolist() == [[1, 2, 3, 7, 4, 5]]
    assert batch.labels_bs.tolist() == [[IGNORE, 2, 3, 7, IGNORE, 5]]
    assert batch.positions_bs.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.documents_bs.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert (batch.tokens, batch.trained_tokens) == (6, 4)


def features(rows: list[Example]) -> Any:
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]


@steady
@given(st.lists(examples(), min_size=1, max_size=5))
def test_flatten_equals_transformers(rows: list[Example]):
    theirs: Any = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)(features(rows))
    ours = flatten(rows)
    assert ours.input_ids_bs.tolist() == theirs["input_ids"].tolist()
    assert ours.labels_bs.tolist() == theirs["labels"].tolist()
    assert ours.positions_bs.tolist() == theirs["position_ids"].tolist()
    assert ours.documents_bs.tolist() == theirs["seq_idx"].tolist()
    # What kernels for sequences of unequal length are given follows from the documents.
    sizes = ours.documents_bs[0].bincount()
    assert [0, *sizes.cumsum(0).tolist()] == theirs["cu_seq_lens_q"].tolist()
    assert sizes.max() == theirs["max_length_q"]


@steady
@given(st.lists(examples(), min_size=1, max_size=5), MULTIPLES)
def test_padding_right_equals_trl(rows: list[Example], multiple_of: int):
    theirs = DataCollatorForLanguageModeling(PAD, return_position_ids=True, pad_to_multiple_of=multiple_of)(
        features(rows)
    )
    ours = collate(rows, PAD, multiple_of=multiple_of)
    assert ours.input_ids_bs.shape[1] % multiple_of == 0
    assert torch.equal(ours.input_ids_bs, theirs["input_ids"])
    assert torch.equal(ours.labels_bs, theirs["labels"])
    assert torch.equal(ours.positions_bs, theirs["position_ids"])
    assert torch.equal((ours.documents_bs >= 0).long(), theirs["attention_mask"])


@steady
@given(st.lists(examples(), min_size=1, max_size=5), MULTIPLES)
def test_padding_left_equals_trl(rows: list[Example], multiple_of: int):
    """TRL keeps the label of the first token, which padding would then predict."""

    def theirs(columns: list[list[int]], filler: int) -> torch.Tensor:
        return pad(list(map(torch.tensor, columns)), filler, "left", multiple_of)

    ours = collate(rows, PAD, "left", multiple_of)
    assert torch.equal(ours.input_ids_bs, theirs([row.input_ids for row in rows], PAD))
    assert torch.equal(ours.labels_bs, theirs([[IGNORE, *row.labels[1:]] for row in rows], IGNORE))
    assert torch.equal(ours.positions_bs, theirs([list(range(len(row))) for row in rows], 0))
    assert torch.equal(ours.documents_bs, theirs([[0] * len(row) for row in rows], -1))


@steady
@given(st.lists(examples(), min_size=1, max_size=5), MULTIPLES)
def test_flattened_and_padded_equals_trl(rows: list[Example], multiple_of: int):
    """Its padding is a row of documents of one token; ours is none, and no token sees it."""
    theirs = DataCollatorForLanguageModeling(PAD, padding_free=True, pad_to_multiple_of=multiple_of)(features(rows))
    ours = stack([flatten(rows)], PAD, multiple_of=multiple_of)
    assert torch.equal(ours.input_ids_bs, theirs["input_ids"])
    assert torch.equal(ours.labels_bs, theirs["labels"])
    assert torch.equal(ours.positions_bs, theirs["position_ids"])
    real = ours.documents_bs >= 0
    assert int(real.sum()) == sum(map(len, rows))
    assert torch.equal(ours.documents_bs[real], theirs["seq_idx"][real].long())


def assert_well_formed(batch: Batch) -> None:
    tables = [getattr(batch, name) for name in ("input_ids_bs", "labels_bs", "positions_bs", "documents_bs")]
    assert all(table.dtype == torch.int64 and table.shape == tables[0].shape for table in tables)
    ids, labels, positions, documents = tables
    padding = documents == -1
    assert (labels[padding] == IGNORE).all() and (positions[padding] == 0).all() and (ids[padding] == PAD).all()
    assert ((labels == IGNORE) | (labels == ids)).all()


@steady
@given(st.lists(examples(), min_size=1, max_size=5))
def test_every_layout_teaches_the_same(rows: list[Example]):
    want = expected(rows)
    for batch in (collate(rows, PAD), collate(rows, PAD, multiple_of=8), flatten(rows)):
        assert_well_formed(batch)
        assert lessons(batch) == want
        assert batch.trained_tokens == want.total() == sum(row.trained_tokens for row in rows)
        assert batch.tokens == sum(map(len, rows))


@steady
@given(st.lists(examples(), min_size=1, max_size=5))
def test_padding_left_teaches_the_same(rows: list[Example]):
    """The first token of a row must not be trained: the loss shifts labels by one, and padding would predict it."""
    batch = collate(rows, PAD, "left")
    assert_well_formed(batch)
    assert lessons(batch) == expected(rows)
    assert batch.trained_tokens == collate(rows, PAD).trained_tokens
    assert batch.tokens == sum(map(len, rows))


@steady
@given(PACKS, st.sampled_from(["left", "right"]), MULTIPLES)
def test_stacked_rows_of_several_documents_teach_the_same(packs: list[list[Example]], side: Any, multiple_of: int):
    batch = stack([flatten(documents) for documents in packs], PAD, side, multiple_of)
    assert_well_formed(batch)
    assert lessons(batch) == expected([row for documents in packs for row in documents])


# --- the shared beginning


def test_a_shared_beginning_is_laid_out_once():
    rows = [Example([1, 2, 3, 4, 5], [IGNORE] * 3 + [4, 5]), Example([1, 2, 3, 6], [IGNORE] * 3 + [6])]
    batch = share_prefix(collate(rows, PAD), least=2)
    # Token 3 predicts a trained token in each row, so it belongs to the rows. The padding is gone.
    assert batch.shared_prefix == (2, (3, 2))
    assert batch.input_ids_bs.tolist() == [[1, 2, 3, 4, 5, 3, 6]]
    assert batch.labels_bs.tolist() == [[IGNORE, IGNORE, IGNORE, 4, 5, IGNORE, 6]]
    assert batch.positions_bs.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.documents_bs.tolist() == [[0, 0, 0, 0, 0, 0, 0]]
    assert (batch.tokens, batch.trained_tokens) == (9, 3)


@steady
@given(chats(), st.integers(1, 9))
def test_sharing_teaches_the_same(rows: list[Example], least: int):
    plain = collate(rows, PAD)
    shared = share_prefix(plain, least)
    assert lessons(shared) == lessons(plain) == expected(rows)
    assert shared.trained_tokens == plain.trained_tokens
    assert shared.tokens == plain.tokens
    if shared.shared_prefix is not None:
        prefix, own = shared.shared_prefix
        assert prefix >= least and len(own) > 1
        assert [prefix + count for count in own] == list(map(len, rows))
        assert shared.input_ids_bs.shape == (1, prefix + sum(own))


@steady
@given(st.lists(st.lists(examples(1, 6), min_size=1, max_size=3), min_size=2, max_size=3), st.integers(1, 3))
def test_rows_of_several_documents_are_never_shared_wrongly(packs: list[list[Example]], least: int):
    """A packed row's documents must not see each other, which plain causal attention after a prefix would let them."""
    common = Example([1] * 10, [IGNORE] * 10)
    batch = stack([flatten([common, *documents]) for documents in packs], PAD)
    assert lessons(share_prefix(batch, least)) == lessons(batch)


def untrained_then(ids: list[int], begin: int) -> Example:
    return Example(ids, [IGNORE] * begin + ids[begin:])


@pytest.mark.parametrize(
    ("rows", "prefix"),
    [
        pytest.param([untrained_then([1] * 20, 12)] * 3, 11, id="equal-rows"),
        pytest.param([untrained_then([1] * 20, 12), untrained_then([1] * 20, 9)], 8, id="labels-begin-earlier-in-one"),
        pytest.param([untrained_then([1] * 20, 12), untrained_then([1] * 20, 8)], None, id="labels-too-early-in-one"),
        pytest.param([Example([1] * 20, [1] * 20)] * 2, None, id="all-trained"),
        pytest.param([Example([1] * 20, [IGNORE, 1, *[IGNORE] * 18])] * 2, None, id="second-token-trained"),
        pytest.param([Example([1] * 20, [1, *[IGNORE] * 18, 1])] * 2, 18, id="label-of-the-first-token"),
        pytest.param([untrained_then([1] * 20, 12)], None, id="one-row"),
        pytest.param([untrained_then([1] * 12, 10), untrained_then([1] * 5 + [2] * 7, 10)], None, id="few-alike"),
        pytest.param([untrained_then([1] * 12, 10), untrained_then([1] * 8 + [2] * 4, 10)], 8, id="least-alike"),
        pytest.param([untrained_then([1] * 200, 32)] * 3, 31, id="more-than-a-tenth-is-saved"),  # 62 of 600
        pytest.param([untrained_then([1] * 200, 30)] * 3, None, id="less-than-a-tenth"),  # 58 of 600
        pytest.param([untrained_then([1] * 20, 15), untrained_then([1] * 4, 2)], None, id="one-is-very-short"),
        pytest.param([untrained_then([1] * 20, 15), untrained_then([1] * 9, 9)], 9, id="one-is-nothing-else"),
    ],
)
def test_what_is_shared(rows: list[Example], prefix: int | None):
    plain = collate(rows, PAD)
    shared = share_prefix(plain)
    own = None if prefix is None else (prefix, tuple(len(row) - prefix for row in rows))
    assert shared.shared_prefix == own
    assert lessons(shared) == expected(rows)
    if prefix is None:
        assert shared is plain


def test_left_padded_rows_are_not_shared():
    rows = [untrained_then([1] * 20, 12), untrained_then([1] * 19, 12)]
    plain = collate(rows, 1, "left")  # the pad token is the one that the rows begin with
    assert share_prefix(plain) is plain


# --- the rest


def test_to_keeps_everything():
    batch = share_prefix(collate([untrained_then([1] * 20, 12)] * 2, PAD))
    moved = batch.to("cpu")
    for each in fields(Batch):
        ours, before = getattr(moved, each.name), getattr(batch, each.name)
        assert torch.equal(ours, before) if isinstance(before, torch.Tensor) else ours == before


@pytest.mark.parametrize("make", [collate, stack])
def test_an_unknown_side_is_refused(make: Any):
    rows = [A] if make is collate else [flatten([A])]
    with pytest.raises(ValueError, match=r"padding_side 'middle'.*'left' or 'right'"):
        make(rows, PAD, "middle")


@pytest.mark.parametrize("multiple_of", [0, -8])
def test_a_multiple_below_one_is_refused(multiple_of: int):
    with pytest.raises(ValueError, match=f"multiple_of must be at least 1, got {multiple_of}"):
        collate([A], PAD, multiple_of=multiple_of)


@pytest.mark.parametrize("make", [lambda: collate([], PAD), lambda: stack([], PAD), lambda: flatten([])])
def test_nothing_to_collate_is_refused(make: Any):
    with pytest.raises(ValueError, match="nothing to collate"):
        make()
