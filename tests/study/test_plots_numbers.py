"""Pictures of numbers: the bits and sizes that are drawn are those of torch and of the book."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pictures import texts

from minift.numerics.floats import FORMATS
from minift.study.plots.numbers import model_sizes, number_fields, spacings, steps_of


def squares(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def test_the_bits_of_the_books_example(figures: list[Figure]):
    number_fields(23.375, ("float32", "bfloat16", "float16", "int8", "uint8")[:3])
    digits = [t.get_text() for t in figures[0].axes[0].texts if t.get_text() in ("0", "1")]
    patterns = [f"{torch.tensor(23.375).view(torch.int32).item():032b}"]
    patterns += [f"{torch.tensor(23.375, dtype=d).view(torch.int16).item():016b}" for d in (torch.bfloat16, torch.half)]
    assert "".join(digits) == "".join(patterns) and "10000011" + "0111011" in patterns[1]
    assert len(squares(figures[0])) == 32 + 16 + 16
    written = texts(figures[0])
    assert all(label in written for label in ("exponent, 8", "fraction, 23", "fraction, 7", "fraction, 10", "23.375"))


def test_integers_have_no_exponent(figures: list[Figure]):
    number_fields(-125, ("int8",))
    assert "integer, 7" in texts(figures[0]) and "exponent" not in texts(figures[0])
    assert "".join(t.get_text() for t in figures[0].axes[0].texts[: 8 + 1] if t.get_text() in "01") == "10000011"


@pytest.mark.parametrize("name", FORMATS)
def test_the_distance_to_the_next_number_is_torchs(name: str):
    dtype = getattr(torch, name)
    x, gap = steps_of(FORMATS[name])
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    values = torch.tensor(x, dtype=torch.float64).to(dtype)
    assert torch.equal(values.double(), torch.tensor(x))  # all of them are numbers of the type
    above = (values[:-1].view(integers) + 1).view(dtype)
    assert np.array_equal((above.double() - values[:-1].double()).numpy(), gap[:-1])
    assert not ((values[-1:].view(integers) + 1).view(dtype).double().isfinite()).all()


def test_the_lines_are_those_distances(figures: list[Figure]):
    spacings(("float16", "float32"))
    (axes,) = figures[0].axes
    x, gap = steps_of(FORMATS["float16"])
    assert np.array_equal(axes.get_lines()[0].get_xdata(), x) and np.array_equal(axes.get_lines()[0].get_ydata(), gap)
    styles = {line.get_linestyle() for line in axes.get_lines()[::2]}
    assert len(styles) == 2


def test_360_million_parameters(figures: list[Figure]):
    """Figure 2.2 of the book."""
    model_sizes()
    written = texts(figures[0])
    assert all(f"\n{size} MB" in written for size in ("1,440", "720", "360", "180"))
    assert len(squares(figures[0])) == 144 + 72 + 36 + 18
