"""Pictures of quantized tensors: what is drawn is what was computed, and all of it is legible."""

from collections.abc import Callable
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pictures import texts

from minift.quant import codebook, dynamic_map
from minift.study.dtype_flow import Flow
from minift.study.fourbit import code_shares, codebooks
from minift.study.picture import Picture
from minift.study.plots.quant import (
    code_use,
    codebook_lines,
    column_magnitudes,
    dynamic_steps,
    error_curves,
    histogram_bins,
    type_flow,
    weight_ranges,
)

X = torch.randn(1000, generator=torch.Generator().manual_seed(11)) * 0.07
MAPS = {"signed": dynamic_map(True), "unsigned": dynamic_map(False)}
FLOWS = [
    Flow("model.embed_tokens", "Embedding", "bf16", "int64", "bf16"),
    Flow("model.layers.0.mlp.up_proj", "Linear4bit", "nf4", "bf16", "bf16", ["uint8 -> fp32"], ["fp32 x fp32"]),
]
DRAWINGS: dict[str, Callable[[], Picture]] = {
    "bins": lambda: histogram_bins(X),
    "ranges": lambda: weight_ranges({"a": X, "b": 2 * X}),
    "lines": lambda: codebook_lines(codebooks()),
    "use": lambda: code_use(X, codebooks()),
    "errors": lambda: error_curves({"a": [0.1, 0.2], "b": [0.3, 0.4]}, (32, 64)),
    "steps": lambda: dynamic_steps(MAPS),
    "columns": lambda: column_magnitudes(X.view(10, 100), 0.15),
    "flow": lambda: type_flow(FLOWS),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_of_a_notebooks_width(name: str, tmp_path):
    path = DRAWINGS[name]().save(tmp_path / "picture.png")
    height, width, _ = matplotlib.image.imread(path).shape
    assert 1000 <= width <= 1200 and 200 <= height <= 1600


def test_the_edges_of_the_books_bins(figures: list[Figure]):
    """The example of chapter 2: seed 11 of torch's own generator, four bins."""
    state = torch.random.get_rng_state()
    torch.manual_seed(11)
    weights = torch.randn(1000) * 0.07
    torch.random.set_rng_state(state)
    histogram_bins(weights, 2)
    lines = [np.asarray(line.get_xdata()) for line in figures[0].axes[0].get_lines()]
    edges = [round(float(x[0]), 4) for x in lines if len(x) == 2]
    assert edges == [-0.2066, -0.1026, 0.0015, 0.1056, 0.2097]
    dots = [line for line in figures[0].axes[0].get_lines() if line.get_marker() == "o"]
    middles = [round(float(np.asarray(line.get_xdata())[0]), 4) for line in dots]
    assert middles == pytest.approx([(a + b) / 2 for a, b in pairwise(edges)], abs=1e-4)


def test_ranges_are_those_of_the_weights(figures: list[Figure]):
    weight_ranges({"a": X})
    everything, most = (np.asarray(line.get_xdata(), dtype=float) for line in figures[0].axes[0].get_lines())
    assert everything.tolist() == [float(X.min()), float(X.max())]
    assert float(((most[0] <= X) & (most[1] >= X)).float().mean()) == pytest.approx(0.99, abs=0.002)


def test_entries_and_the_middles_between_them(figures: list[Figure]):
    codebook_lines({"NF4": codebook("nf4"), "FP4": codebook("fp4")})
    (axes,) = figures[0].axes
    middles, entries = (np.asarray(line.get_xdata()) for line in axes.get_lines()[:2])
    printed = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0,
               0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]  # fmt: skip
    assert [round(float(x), 4) for x in entries] == printed
    assert np.allclose(middles, (entries[:-1] + entries[1:]) / 2)
    assert "16 values" in texts(figures[0]) and "15 values" in texts(figures[0])  # FP4 has two zeros


def test_bars_are_shares(figures: list[Figure]):
    code_use(X, {"NF4": codebook("nf4")})
    heights = [bar.get_height() for bar in figures[0].axes[0].patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert heights == pytest.approx([100 * share for share in code_shares(X, codebook("nf4"))])
    assert sum(heights) == pytest.approx(100)


def test_curves_are_the_errors(figures: list[Figure]):
    error_curves({"a": [0.1, 0.2], "b": [0.3, 0.4]}, (32, 64), "layer")
    first, second = figures[0].axes[0].get_lines()
    assert np.allclose(first.get_ydata(), [10, 20]) and np.allclose(second.get_ydata(), [30, 40])
    assert first.get_linestyle() != second.get_linestyle() and "layer" in texts(figures[0])


def test_steps_of_the_map_grow_with_the_decade(figures: list[Figure]):
    dynamic_steps(MAPS)
    line = figures[0].axes[0].get_lines()[0]
    x, step = np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)
    assert len(x) == 127 and x[0] == pytest.approx(5.5e-7)
    assert step[x > 0.11][:-1] == pytest.approx(0.9 / 64, rel=1e-3)  # 64 values from 0.1 to 1


def test_outlier_columns_are_counted(figures: list[Figure]):
    x = torch.ones(3, 10)
    x[1, 4], x[2, 8] = -7.0, 6.0
    column_magnitudes(x)
    assert "2 of 10 columns reach 6" in texts(figures[0])
    marked = next(line for line in figures[0].axes[0].get_lines() if line.get_marker() == "D")
    assert np.asarray(marked.get_xdata()).tolist() == [4, 8] and np.asarray(marked.get_ydata()).tolist() == [7, 6]


def test_the_flow_says_every_dtype(figures: list[Figure]):
    type_flow(FLOWS, "NF4")
    written = texts(figures[0]).splitlines()
    for text in ("embed_tokens", "mlp.up_proj", "nf4", "uint8 -> fp32", "fp32 x fp32", "NF4"):
        assert text in written
    assert written.count("bf16") == 1 + 2  # stored once, goes out twice
