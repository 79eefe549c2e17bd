"""Layouts against packing by hand; documents in a row against the same documents alone; what is drawn of both."""

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from pictures import texts
from transformers import AutoModelForCausalLM

import minift
from minift.data.encode import IGNORE, Example
from minift.study.contamination import Contamination, contamination
from minift.study.layouts import Layouts, compare_layouts, letters, mixed_lengths, numbered
from minift.study.plots.packing import contamination_bars, layout_bars, packing_flow

LENGTHS = [7, 5, 3, 2, 1, 12]


@pytest.fixture(scope="module")
def layouts() -> Layouts:
    return compare_layouts(LENGTHS, length=8, batch_size=3)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_layouts_by_hand(layouts: Layouts):
    """Cut to 8, the documents have 7 5 3 2 1 8 tokens, 26 in all; 4 of the last one's are lost.

    bfd: 8 | 7 1 | 5 3 | 2. Split: pieces of 8 and 4 of the last: 8 | 7 1 | 5 3 | 4 2. Wrapped: 30 tokens, cut after 8,
    16 and 24. Documents end at 7, 12, 15, 17, 18 and 30, so the second, the fourth and the last are cut.
    """
    found = {row.name: (row.rows, row.places, row.tokens, row.cut, row.dropped) for row in layouts.rows}
    assert found["padded to max_length"] == (6, 48, 26, 1, 4)
    assert found["bfd"] == (4, 32, 26, 1, 4)
    assert found["bfd_split"] == (4, 32, 30, 1, 0)
    assert found["wrapped"] == (4, 32, 30, 3, 0)
    assert found["similar lengths"][1] == 3 * 8 + 3 * 3  # 8 7 5 | 3 2 1
    assert 26 < found["padded to the batch"][1] <= 2 * 3 * 8
    assert layouts["bfd"].useful == 26 / 32


def test_the_table_has_every_layout(layouts: Layouts):
    lines = str(layouts).splitlines()
    assert lines[0] == "6 documents of 30 tokens, rows of at most 8"
    assert [line.split("  ")[0] for line in lines[3:]] == [row.name for row in layouts.rows]
    assert lines[6].split() == ["bfd", "4", "32", "81.2%", "1", "4"]


@pytest.mark.parametrize("lengths, length, batch_size, told", [
    ([], 8, 3, "nothing to lay out"), ([3, 0], 8, 3, "nothing to lay out"), ([3], 1, 3, "at least 2 tokens"),
    ([3], 8, 0, "batch_size must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_laid_out_is_refused(lengths: list[int], length: int, batch_size: int, told: str):
    with pytest.raises(ValueError, match=told):
        compare_layouts(lengths, length, batch_size)


def test_the_two_rows_of_the_book():
    """Chapter 4: 38 and 28 tokens; flattened (1, 66), positions 0..37 and 0..27, -100 at each start."""
    two = numbered([38, 28])
    flat = minift.flatten(two)
    assert flat.input_ids_bs.shape == (1, 66) and minift.collate(two, pad_id=0).input_ids_bs.shape == (2, 38)
    assert flat.positions_bs.tolist() == [[*range(38), *range(28)]]
    assert (flat.labels_bs == IGNORE).nonzero()[:, 1].tolist() == [0, 38]


def test_letters():
    rows = minift.pack(numbered([7, 5, 3, 2, 1]), length=8, strategy="wrapped")
    assert letters(rows, 8).splitlines() == ["aaaaaaab", "bbbbcccd", "de......"]
    padded = minift.collate(numbered([1, 3]), pad_id=0)
    assert letters([padded], 3).splitlines() == ["a..", "bbb"]


def test_mixed_lengths():
    lengths = mixed_lengths(2000, middle=100, spread=0.5, seed=3)
    assert lengths == mixed_lengths(2000, middle=100, spread=0.5, seed=3) != mixed_lengths(2000, 100, 0.5, seed=4)
    # Half lie below the middle: of 2000 draws within 4 * sqrt(2000) / 2 of 1000.
    assert abs(sum(size < 100 for size in lengths) - 1000) < 90
    assert max(lengths) > 300 and min(mixed_lengths(2000, least=20)) == 20


# --- neighbours -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 120, (size,), generator=generator).tolist() for size in (9, 6, 11)]
    return [Example(ids, [IGNORE] * 3 + ids[3:]) for ids in drawn]


def test_documents_alone_and_together_as_transformers_computes_them(tiny: Path, documents: list[Example]):
    """Alone: the model's own mean loss. Neither: the rows concatenated, with nothing else told."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.tensor([[token for each in documents for token in each.input_ids]])
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([each.input_ids]), labels=torch.tensor([each.labels])).loss.item()
            for each in documents
        ]
        log_p = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
    together, start = [], 0
    for each in documents:
        places = range(start + 3, start + len(each))
        together.append(-sum(float(log_p[place - 1, ids[0, place]]) for place in places) / len(places))
        start += len(each)
    study = contamination(minift.load_model(tiny, dtype=torch.float32), documents)
    # Losses near 5, fp32 through two layers of small sums: 2^-20 of them.
    assert study.losses["alone"] == pytest.approx(alone, rel=2**-18)
    assert study.losses["neither"] == pytest.approx(together, rel=2**-18)
    assert study.trained == (6, 3, 8)


def test_mask_and_positions_each_do_their_part(tiny: Path, documents: list[Example]):
    study = contamination(minift.load_model(tiny, dtype=torch.float32), documents)
    assert study.worst("packed") < 1e-5 and study.worst("positions run on") < 1e-5  # rotary: only differences count
    assert study.worst("no mask") > 1e-3 and study.worst("neither") > 1e-3
    assert study.losses["no mask"][0] == pytest.approx(study.losses["alone"][0], rel=1e-5)  # nothing before it
    expected = sum(n * loss for n, loss in zip((6, 3, 8), study.losses["neither"], strict=True)) / 17
    assert study.mean("neither") == pytest.approx(expected)


def test_what_has_no_neighbours_is_refused(tiny: Path, documents: list[Example]):
    model = minift.load_model(tiny, dtype=torch.float32)
    with pytest.raises(ValueError, match="a row of 1 documents has no neighbours"):
        contamination(model, documents[:1])
    with pytest.raises(ValueError, match="document 1 has no trained token"):
        contamination(model, [documents[0], Example([5, 6], [IGNORE, IGNORE])])


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_the_bars_of_the_layouts(layouts: Layouts, figures: list[Figure]):
    layout_bars(layouts)
    (axes,) = figures[0].axes
    widths = [bar.get_width() for bar in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
    rows = layouts.rows
    assert widths == [row.tokens for row in rows] + [row.places - row.tokens for row in rows]
    assert "81.2% useful, 1 cut, 4 tokens lost" in texts(figures[0])
    assert {bar.get_hatch() for bar in axes.patches} == {None, "//"}


def test_the_flow_names_every_option_with_its_numbers(layouts: Layouts, figures: list[Figure]):
    packing_flow(layouts)
    written = texts(figures[0])
    for setting in ('packing="none"', "group_by_length=True", 'packing="bfd"', 'packing="bfd_split"', '"wrapped"'):
        assert setting in written
    for name in ("padded to the batch", "similar lengths", "bfd", "bfd_split", "wrapped"):
        row = layouts[name]
        assert f"{row.rows:,} rows, {row.useful:.1%} useful\n{row.cut:,} cut, {row.dropped:,} tokens lost" in written


def test_the_bars_of_the_documents(figures: list[Figure]):
    losses = {
        name: (1.0 + n, 2.0, 3.0) for n, name in enumerate(("alone", "packed", "positions run on", "no mask", "x"))
    }
    contamination_bars(Contamination((1, 1, 2), losses))
    (axes,) = figures[0].axes
    heights = [bar.get_height() for bar in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert heights == [height for group in losses.values() for height in group]
    assert "alone: mean 2.25" in texts(figures[0]) and len({bar.get_hatch() for bar in axes.patches}) == 5
