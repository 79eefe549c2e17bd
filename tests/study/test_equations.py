"""The book's equations: every worked number again, from whole numbers and fractions, and what a notebook shows."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from pictures import texts

from minift.study.equations import (
    attention,
    equations,
    head_dim,
    lora_example,
    sheet,
    terms_shrunk_by,
)
from minift.study.plots.equations import equation_sheet

FIRST, LATER = [f"3.{n}" for n in range(1, 5)], [f"5.{n}" for n in range(1, 9)]
NUMBERS = [*FIRST, *LATER, "5.9a", "5.9b", "5.10", "5.11"]


def worked(number: str) -> dict[str, tuple[float | None, float]]:
    return {w.what: (w.book, w.here) for w in equations()[number].worked}


def here(number: str) -> list[float]:
    return [w.here for w in equations()[number].worked]


def test_all_of_them_in_order():
    assert list(equations()) == NUMBERS
    assert all(equation.number == number for number, equation in equations().items())


# --- chapter 3 --------------------------------------------------------------------------------------------------------


def test_book_eq_3_1_to_3_4():
    """Printed in the book: the outputs with alpha = r and alpha = 2 r, and what the adapter adds. The frozen layer's
    output is the book's own, whose weights have no seed, so two roundings to four decimals stand between."""
    x, a, b = (t.double() for t in lora_example())
    added = F.linear(F.linear(x, a), b)[0]
    for place, frozen, added_in_book, once, twice in (
        (0, -0.3383, -0.0357, -0.3740, -0.4097), (-1, 0.0186, 0.5041, 0.5227, 1.0268),
    ):  # fmt: skip
        value = added[place].item()
        assert value == pytest.approx(added_in_book, abs=5e-5)
        assert frozen + value == pytest.approx(once, abs=1e-4)
        assert frozen + 2 * value == pytest.approx(twice, abs=1.5e-4)  # the factor doubles nothing but our own value
    first, last = (added[i].item() for i in (0, -1))
    # fp32 sums of 1024 terms of about 0.1: 1e-5 is a hundred times their rounding.
    assert here("3.1") == pytest.approx([1024**2, 2 * 8 * 1024, 8, first - 0.3383, last + 0.0186], abs=1e-5)
    assert here("3.2") == pytest.approx([first, last, 1024**2], abs=1e-5)
    assert here("3.3") == pytest.approx([first, last, 2 * 8 * 1024], abs=1e-5)
    assert here("3.4") == pytest.approx([2, 2 * first - 0.3383, 2 * last + 0.0186], abs=1e-5)


def test_the_examples_draws_leave_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    lora_example()
    assert torch.equal(torch.randn(2), expected)


# --- chapter 5 --------------------------------------------------------------------------------------------------------


def test_book_eq_5_1_of_the_first_figure():
    """288 squares of 20 MB; 2 + 2 + 4 + 4 + 4 bytes of 360 million parameters."""
    assert here("5.1") == [288 * 20] == [16 * 360]


def test_book_eq_5_2_to_5_4():
    """18 squares of weights; 3 and 8 times as many numbers, of twice as many bits."""
    assert worked("5.2")["s = h, 16 heads, 16 bits on 8: squares, of 18 of weights"] == (396, 18 * (3 + 8) * 2)
    assert here("5.4") == [108] == [18 * 3 * 2]
    found = here("5.3")
    short, own = Fraction(500, 2048), Fraction(500, 1024)
    exact = [
        Fraction(45),
        18 * (3 * short + 8 * short**2) * 2,
        18 * (Fraction(34, 12) * short + Fraction(80, 12) * short**2) * 2,
        18 * (Fraction(34, 12) * short + Fraction(80, 12) * short**2),
        18 * (Fraction(34, 12) * own + Fraction(80, 12) * own**2),
    ]
    assert found == pytest.approx([float(value) for value in exact], rel=1e-12)
    assert [round(value, 2) for value in found] == [45, 43.53, 39.21, 19.60, 53.51]
    assert all(w.book == 45 for w in equations()["5.3"].worked)
    assert [w.differs for w in equations()["5.3"].worked] == [False, True, True, True, True]
    assert "not its width" in equations()["5.3"].remark


def test_book_eq_5_5_and_5_6():
    assert here("5.5") == [16]
    assert terms_shrunk_by("quantization") == ["mem_model"]
    assert terms_shrunk_by("gradient accumulation") == ["mem_batch", "mem_grad", "mem_optim"]
    assert terms_shrunk_by("gradient checkpointing") == terms_shrunk_by("flash attention") == ["mem_act"]
    with pytest.raises(ValueError, match="'prayer': choose one of 8-bit paged optimizer, LoRA, flash attention"):
        terms_shrunk_by("prayer")
    assert here("5.6") == [1]  # not less: the book's third line does not hold for accumulation


def test_book_eq_5_7_and_5_8():
    assert here("5.7") == [24 * 12 * 1024**2, 24 * 12 * 1024**2 + 2 * 512 * 1024]
    # Tables 5.2 and 5.3, LoRA: 3109 and 1603 MB fused without and with checkpointing, 15266 eager.
    alpha = (3109 - 1603) * 1e6 / (24 * 1024 * 2000)
    beta = (15266 - 3109) * 1e6 / (24 * 16 * 2000**2)
    linear, square = 24 * 34 * 1024 * 500 / 1e6, 24 * 5 * 16 * 500**2 / 1e6
    assert here("5.8") == pytest.approx([alpha, beta, linear + square, linear], rel=1e-12)
    assert [w.differs for w in equations()["5.8"].worked] == [False, True, False, False]


def test_book_eq_5_9():
    assert here("5.9a") == pytest.approx([17 / 6, 5 / 12]) and here("5.9b") == pytest.approx([17 / 6])


def test_book_eq_5_10_and_5_11():
    numbers = here("5.10")
    assert numbers[:2] == [256 * 1024, 16 * 256 * 256] and numbers[3] == math.sqrt(1024)
    assert numbers[2] == pytest.approx(32.5935, abs=1.5)
    q, k, v = (torch.randn(n, 6, dtype=torch.float64) for n in (3, 5, 5))
    assert torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-12)
    assert head_dim(1024, 16) == 64 == here("5.11")[0]
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"a width of 1024 cannot be cut into {heads} heads"):
            head_dim(1024, heads)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_only_where_the_book_is_off_does_it_say_so():
    off = [(e.number, w.what) for e in equations().values() for w in e.worked if w.differs]
    assert [number for number, _ in off] == ["5.3"] * 4 + ["5.8", "5.9a", "5.9a", "5.9b"]


def test_a_sheet_as_a_notebook_shows_it():
    shown = sheet("5.3", "5.10")
    text = shown._repr_markdown_()
    assert text.count("$$") == 2 * 3 and "**5.3**" in text and "**5.10**" in text
    assert "| not rounded | 45 | 43.533 (differs) |" in text and "`worked_example`" in text
    assert "| sqrt(d_k) | 32 | 32 |" in text
    assert repr(shown).count("\n\n") == 1 and "not rounded: 45 in the book, 43.533 here" in repr(shown)
    assert "0x" not in repr(sheet())  # no address of a function
    assert [e.number for e in sheet("5.9").equations] == ["5.9a", "5.9b"]
    assert [e.number for e in sheet("3").equations] == FIRST
    assert [e.number for e in sheet("5.1").equations] == ["5.1"]
    assert len(sheet().equations) == 16
    with pytest.raises(ValueError, match=r"no equation 5\.12: choose of 3\.1"):
        sheet("5.12")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_formula_can_be_drawn(number: str):
    """By matplotlib, whose mathtext is the narrower of the two; braces are balanced for the other."""
    for line in equations()[number].lines:
        box = MathTextParser("path").parse(f"${line}$")
        assert box.width > 0 and line.count("{") == line.count("}") and "$" not in line


def test_a_sheet_as_a_picture(figures: list[Figure]):
    picture = equation_sheet(sheet("5.3", "5.6", "5.11"))
    assert picture.png.startswith(b"\x89PNG")
    (figure,) = figures
    written = texts(figure)
    assert "here 43.533" in written and "book 45" in written and written.count("differs") == 4
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    for text in figure.axes[0].texts:
        text.set_fontsize(float(text.get_fontsize()) + 1e-9)  # forget the size at the picture's resolution
        assert text.get_window_extent(renderer).x1 <= figure.bbox.width
