"""Pictures are written whole, are legible, and show the numbers that they are given."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pictures import texts

from minift.adapters.lora import LoraConfig
from minift.study.book_memory import OPT_PARAMETERS
from minift.study.book_tables import OPT_350M
from minift.study.ledger import predict
from minift.study.picture import PALETTE, Picture
from minift.study.plots.memory import ablation_bars, ledger_bars, ram_figures
from minift.study.plots.rounding import rounding_walks, stalled_losses
from minift.study.plots.runs import run_curves
from minift.study.rounding import stalled_run, walks
from minift.study.setting import Setting
from minift.train.records import StepRecord

LEDGER = predict(Setting(OPT_350M, 2, 256, torch.bfloat16, None, LoraConfig(), attention="eager"))
WALKS, RUNS = walks(10_000), stalled_run(steps=30)
DRAWINGS: dict[str, Callable[[], Picture]] = {
    "ledger": lambda: ledger_bars(LEDGER),
    "ram": ram_figures,
    "ablations": ablation_bars,
    "walks": lambda: rounding_walks(WALKS),
    "stall": lambda: stalled_losses(RUNS),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_a_png_of_a_notebooks_width(name: str, tmp_path: Path):
    path = DRAWINGS[name]().save(tmp_path / "picture.png")
    assert path == tmp_path / "picture.png" and list(tmp_path.iterdir()) == [path]
    height, width, _ = matplotlib.image.imread(path).shape
    assert 1000 <= width <= 1300 and 200 <= height <= 1600


def test_the_bars_of_a_ledger(figures: list[Figure]):
    ledger_bars(LEDGER)
    (figure,) = figures
    (axes,) = figure.axes
    widths: dict[float, float] = {}
    for bar in axes.patches:
        middle = round(bar.get_y() + bar.get_height() / 2, 3)  # pyright: ignore[reportAttributeAccessIssue]
        widths[middle] = widths.get(middle, 0.0) + bar.get_width()  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(widths.values()) == pytest.approx(sorted(m.total / 1e6 for m in LEDGER.moments), rel=0.005)
    written = texts(figure)
    assert all(moment.name in written for moment in LEDGER.moments)
    assert "attention scores" in written and "MB" in written and LEDGER.peak > 2 * OPT_PARAMETERS


def test_the_figures_of_the_book(figures: list[Figure]):
    ram_figures()
    written = texts(figures[0])
    assert len(figures[0].axes) == 5
    for number in ("180", "360", "720", "1,440", "20", "40", "2,160", "5,760", "540"):
        assert f"\n{number}\n" in f"\n{written}\n"


def test_measured_and_predicted_stand_side_by_side(figures: list[Figure]):
    ablation_bars()
    heights = [bar.get_height() for axes in figures[0].axes for bar in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(heights) == 2 * 2 * (12 + 8)
    assert {3441, 15266, 914, 3435, 1603, 2908, 20491, 904} <= set(heights)
    written = texts(figures[0])
    assert all(text in written for text in ("measured in the book", "2000, LoRA, ckpt", "500, mixed", "8-bit Adam"))


def test_the_walks_end_where_they_end(figures: list[Figure]):
    rounding_walks(WALKS)
    written = texts(figures[0])
    for number in ("-4.2350", "0.2762", "0.7298", "0.7210", "0.7797"):
        assert f"ends at {number}" in written


def test_the_losses_of_the_stalled_run(figures: list[Figure]):
    stalled_losses(RUNS)
    (axes,) = figures[0].axes
    for line, run in zip(axes.get_lines(), RUNS.values(), strict=True):
        assert torch.equal(torch.as_tensor(line.get_ydata()), run.loss)
    assert "bfloat16, stochastic" in texts(figures[0])
    assert len({line.get_linestyle() for line in axes.get_lines()}) == 3  # not told by colour alone
    assert len({line.get_color() for line in axes.get_lines()}) == 3


@pytest.mark.parametrize("known", [0, 1, 3])
def test_the_curves_have_memory_where_it_is_known(figures: list[Figure], known: int):
    """Of the last `known` steps, as after a run of an older version was resumed; no empty axes are left."""
    steps = [StepRecord(n, 3.0 / n, 1.0, 1e-3, 10, 20, 0.1, peak_memory=n * 10**8 if n > 3 - known else None)
             for n in (1, 2, 3)]  # fmt: skip
    run_curves(steps)
    labels = [axes.get_ylabel() for axes in figures[0].axes]
    assert len(labels) == 4 + (known > 0) and all(labels)
    if known:
        (line,) = figures[0].axes[4].get_lines()
        shown = [np.asarray(data).astype(float).tolist() for data in (line.get_xdata(), line.get_ydata())]
        assert labels[4] == "most memory held (MB)"
        assert shown == [[4 - known + n for n in range(known)], [100.0 * (4 - known + n) for n in range(known)]]


def test_colours_differ_in_brightness_or_hue():
    """Okabe and Ito's colours, and none twice."""
    assert len(set(PALETTE)) == len(PALETTE) >= 10
    assert {"#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442"} <= set(PALETTE)


def test_nothing_half_written_is_left(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        ram_figures().save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
