"""Pictures of tokens show the numbers that they are given."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from pictures import texts

from minift.study.next_token import Cost, Guess
from minift.study.picture import Picture
from minift.study.plots.tokens import cost_bars, embedding_rows, label_shift, next_token_bars

GUESSES = {"plain": [Guess("·a", 5, 0.7), Guess("↵", 6, 0.21)], "chat": [Guess("Al", 7, 0.17), Guess("The", 8, 0.16)]}
COSTS = {"own": [Cost("A", 1, 2.0), Cost("·b", 2, 0.5)], "other": [Cost("A", 1, 3.0), Cost("·b", 2, 0.1)]}
TEXTS, TRAINED = ["2", "·is", "4", "«</s>»"], [False, False, True, True]
MODELS = {"Phi-3": (32011, 32064), "OPT": (50265, 50272), "full": (49152, 49152)}
DRAWINGS: dict[str, Callable[[], Picture]] = {
    "guesses": lambda: next_token_bars(GUESSES),
    "costs": lambda: cost_bars(COSTS),
    "shift": lambda: label_shift(TEXTS, TRAINED),
    "rows": lambda: embedding_rows(MODELS),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_a_png_of_a_notebooks_width(name: str, tmp_path: Path):
    height, width, _ = matplotlib.image.imread(DRAWINGS[name]().save(tmp_path / "picture.png")).shape
    assert width == 1200 and 200 <= height <= 900


def test_a_panel_for_each_text_and_a_bar_for_each_guess(figures: list[Figure]):
    next_token_bars(GUESSES)
    for axes, (name, guesses) in zip(figures[0].axes, GUESSES.items(), strict=True):
        assert axes.get_title() == name
        assert [bar.get_width() for bar in axes.patches] == [guess.probability for guess in guesses]  # pyright: ignore[reportAttributeAccessIssue]
        assert [label.get_text() for label in axes.get_yticklabels()] == [guess.text for guess in guesses]
    assert "0.70" in texts(figures[0])


def test_costs_stand_side_by_side_with_their_mean(figures: list[Figure]):
    cost_bars(COSTS)
    (axes,) = figures[0].axes
    assert [bar.get_height() for bar in axes.patches] == [2.0, 0.5, 3.0, 0.1]  # pyright: ignore[reportAttributeAccessIssue]
    assert len({bar.get_hatch() for bar in axes.patches}) == 2  # not told by colour alone
    written = texts(figures[0])
    assert "own (mean 1.25)" in written and "other (mean 1.55)" in written


def test_an_arrow_for_each_label_that_counts_and_from_the_token_before(figures: list[Figure]):
    label_shift(TEXTS, TRAINED)
    (axes,) = figures[0].axes
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    assert [(round(arrow.xyann[0]), round(arrow.xy[0])) for arrow in arrows] == [(1, 2), (2, 3)]  # pyright: ignore[reportAttributeAccessIssue]
    shown = [text.get_text() for text in axes.texts]
    assert shown.count("-100") == 2 and shown.count("4") == shown.count("«</s>»") == 2 and shown.count("2") == 1


def test_a_label_of_the_first_token_has_no_arrow(figures: list[Figure]):
    label_shift(["a", "b"], [True, True])
    arrows = [text for text in figures[0].axes[0].texts if getattr(text, "arrow_patch", None) is not None]
    assert len(arrows) == 1


def test_spare_rows_are_counted(figures: list[Figure]):
    embedding_rows(MODELS)
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [47, 53, 93, 7, 100, 0]  # pyright: ignore[reportAttributeAccessIssue]
    written = texts(figures[0])
    assert "53 spare of 32,064" in written and "7 spare of 50,272" in written and "0 spare of 49,152" in written


@pytest.mark.parametrize(
    "draw",
    [
        lambda: next_token_bars({}),
        lambda: cost_bars({}),
        lambda: cost_bars({"one": COSTS["own"], "two": COSTS["own"][:1]}),
        lambda: label_shift([], []),
        lambda: label_shift(["a"], []),
        lambda: embedding_rows({}),
        lambda: embedding_rows({"more tokens than rows": (10, 9)}),
        lambda: embedding_rows({"too many to draw": (10, 200)}),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Callable[[], Picture]):
    with pytest.raises(ValueError):
        draw()
