"""Misplaced weight by hand and by its formula; rows of several sentences; what is drawn of both."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from pictures import texts

import minift
from minift.demo import yoda_rows
from minift.study.accumulation import Accumulated, AccumulationStudy
from minift.study.plots.accumulation import accumulation_errors, error_of
from minift.study.unevenness import by_unevenness, joined_row, misplaced_weight


def study(counts: tuple[int, ...], loss: float, error: float) -> AccumulationStudy:
    names = ("one batch of all rows", "right", "wrong")
    values = ((2.0, 0.0), (2.0, 0.0), (loss, error))
    return AccumulationStudy(
        counts, tuple(Accumulated(n, x, 1.0, 0.0, e) for n, (x, e) in zip(names, values, strict=True))
    )


def test_misplaced_weight_by_hand():
    """3 of 14 tokens weigh 1/2; 1 of 4 as much as 3 of 4; three lone tokens and 97."""
    assert misplaced_weight((3, 11)) == pytest.approx(1 / 2 - 3 / 14)
    assert misplaced_weight((3, 1)) == 0.25
    assert misplaced_weight((1, 1, 1, 97)) == pytest.approx(0.97 - 0.25)
    assert misplaced_weight((5,)) == misplaced_weight((7, 7, 7)) == 0
    for counts in ((), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            misplaced_weight(counts)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8))
@settings(deadline=None, derandomize=True)
def test_misplaced_weight_is_what_the_heavy_ones_lack(counts: list[int]):
    """In exact fractions: what is missing where it is too little, which is as much as is too much elsewhere."""
    total, share = sum(counts), Fraction(1, len(counts))
    lacking = sum((max(Fraction(count, total) - share, Fraction(0)) for count in counts), Fraction(0))
    assert misplaced_weight(counts) == pytest.approx(float(lacking), abs=1e-12)


def test_a_row_of_several_sentences():
    rows = yoda_rows("train")[:2]
    turns = joined_row(rows)["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    for place, turn in enumerate(turns):
        assert turn["content"] == f"{rows[0]['messages'][place]['content']} {rows[1]['messages'][place]['content']}"


def test_the_error_grows_with_the_misplaced_weight(tiny: Path):
    model = minift.load_model(tiny, dtype=torch.float32).requires_grad_(True)
    rows = yoda_rows("train")
    studies = by_unevenness(model, minift.load_tokenizer(tiny), rows, (1, 8))
    few, many = (each.trained_tokens for each in studies)
    assert few[0] == many[0] and many[1] > 5 * few[1]
    assert error_of(studies[1], "gradient") > 2 * error_of(studies[0], "gradient") > 0.01
    with pytest.raises(ValueError, match="2 rows are too few for 1 and 8"):
        by_unevenness(model, minift.load_tokenizer(tiny), rows[:2], (8,))


def test_the_points(figures: list[Figure]):
    group = [study((3, 1), loss=2.2, error=0.5), study((2, 2), loss=2.0, error=0.0)]
    accumulation_errors({"toy": group, "other": [study((1, 1, 2), loss=1.9, error=0.25)]})
    gradient, loss, *others = figures[0].axes[0].get_lines()
    assert torch.as_tensor(gradient.get_xdata()).tolist() == [0, 25] and torch.as_tensor(
        gradient.get_ydata()
    ).tolist() == [0, 50]
    assert torch.as_tensor(loss.get_ydata()).tolist() == pytest.approx([0, 10])
    assert torch.as_tensor(others[0].get_xdata()).tolist() == pytest.approx([100 * (0.5 - 1 / 3)]) and torch.as_tensor(
        others[1].get_ydata()
    ).tolist() == pytest.approx([5])
    written = texts(figures[0])
    assert "3 : 1 tokens" in written and "gradient, toy" in written and "loss, other" in written
    assert gradient.get_linestyle() != loss.get_linestyle() and gradient.get_marker() != others[0].get_marker()
