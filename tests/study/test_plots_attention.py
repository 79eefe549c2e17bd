"""Pictures of attention show the numbers that they are given, and those of the book."""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pictures import texts

from minift.study.again import tiny_model, watch_model
from minift.study.picture import Picture
from minift.study.plots.attention import attention_maps, noise_curves, showdown_bars, traffic_picture
from minift.study.plots.checkpointing import live_curves
from minift.study.showdown import BOOK, Cost

COSTS = [Cost(name, s, 10**7 * (place + 1) * s // 256, 0.01 * s) for s in (256, 1024)
         for place, name in enumerate(("steps", "eager", "sdpa", "flash"))]  # fmt: skip
MAPS = {"one": torch.eye(4), "two": torch.full((4, 4), 0.25)}
LOSSES = {"right": [2.9, 2.78, 2.77], "wrong": [2.9, 1.0, 0.125]}
IDS = torch.randint(512, (1, 32), generator=torch.Generator().manual_seed(0))
PASSES = {"off": watch_model(tiny_model(layers=2), IDS, False), "on": watch_model(tiny_model(layers=2), IDS, True)}
DRAWINGS: dict[str, Callable[[], Picture]] = {
    "traffic": traffic_picture,
    "maps": lambda: attention_maps(MAPS, ["a", "b", "c", "d"]),
    "noise": lambda: noise_curves(LOSSES, math.log(16)),
    "showdown": lambda: showdown_bars(COSTS, "this CPU"),
    "live": lambda: live_curves(PASSES),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_a_png_of_a_notebooks_width(name: str, tmp_path: Path):
    height, width, _ = matplotlib.image.imread(DRAWINGS[name]().save(tmp_path / "picture.png")).shape
    assert 1000 <= width <= 1200 and 200 <= height <= 1600


def test_the_books_traffic(figures: list[Figure]):
    """A cell for each number that is moved: 160 and 60."""
    traffic_picture(5, 3)
    (axes,) = figures[0].axes
    cells = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(cells) == 160 + 60
    written = texts(figures[0])
    for text in ("Written out: 160 numbers moved", "Fused: 60 numbers moved", "load 30", "load 25", "load 40",
                 "load 45", "P = softmax(S)", "Kᵀ  3 x 5", "V  5 x 3"):  # fmt: skip
        assert text in written
    assert written.count("write 25") == written.count("write 15") == 2


def test_other_sizes_are_counted_too(figures: list[Figure]):
    traffic_picture(4, 6)
    cells = [patch for patch in figures[0].axes[0].patches if isinstance(patch, Rectangle)]
    assert len(cells) == 4 * 16 + 4 * 24 + 4 * 24
    assert "Written out: 160 numbers moved" in texts(figures[0])  # 64 + 96: as many as the book's by chance


def test_maps_show_the_weights(figures: list[Figure]):
    attention_maps(MAPS, ["a", "b", "c", "d"])
    *panels, _bar = figures[0].axes
    for axes, p in zip(panels, MAPS.values(), strict=True):
        assert np.array_equal(np.asarray(axes.images[0].get_array()), p.numpy())
        assert axes.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["a", "b", "c", "d"]


def test_noise_has_a_floor(figures: list[Figure]):
    noise_curves(LOSSES, math.log(16))
    *curves, floor = figures[0].axes[0].get_lines()
    assert [list(map(float, line.get_ydata())) for line in curves] == list(LOSSES.values())  # pyright: ignore[reportArgumentType]
    assert len({line.get_linestyle() for line in curves}) == 2
    assert np.asarray(floor.get_ydata()).tolist() == [math.log(16)] * 2
    assert "2.773" in texts(figures[0]) and "wrong, ends at 0.125" in texts(figures[0])


def test_the_showdown_beside_the_book(figures: list[Figure]):
    showdown_bars(COSTS, "this CPU")
    memory, growth, time = ([bar.get_width() for bar in axes.patches] for axes in figures[0].axes)  # pyright: ignore[reportAttributeAccessIssue]
    assert memory == pytest.approx([40, 80, 120, 160, 746.72, 98.05, 85.47])
    assert growth == pytest.approx([4, 4, 4, 4, 9.87, 2.58, 2.45], abs=0.006)
    assert time == pytest.approx([4, 4, 4, 4, 1.89, 1.0, 1.0], abs=0.006)
    assert "this CPU" in texts(figures[0]) and "book, RTX 4090" in texts(figures[0]) and len(BOOK) == 6


def test_memory_over_a_pass(figures: list[Figure]):
    live_curves(PASSES)
    lines = figures[0].axes[0].get_lines()
    for line, dot, taken in zip(lines[::2], lines[1::2], PASSES.values(), strict=True):
        assert np.asarray(line.get_ydata()).tolist() == [size / 1e6 for size in taken.history]
        assert np.asarray(dot.get_xydata()).tolist() == [[taken.turn - 1, taken.kept / 1e6]]
    assert f"off: keeps {PASSES['off'].kept / 1e6:.1f} MB" in texts(figures[0])
