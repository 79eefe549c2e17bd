"""Pictures of adapters: the drawn numbers are those of the library, and the book's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pictures import texts

import minift
from minift.adapters.drift import Drift
from minift.adapters.merge import MergedLayer, MergeReport
from minift.study.claims import Trial
from minift.study.methods import MethodRow, every_method, reports
from minift.study.plots.lora import (
    PARTS,
    batch_gap,
    drift_bars,
    method_bars,
    method_places,
    parts_of,
    product_picture,
    rate_curves,
    storage_lines,
)

A = torch.tensor([[1.0, 2, 0], [0, 1, 7]])
B = torch.tensor([[1.0, 0], [0, 1], [2, -1], [0.5, 0]])
LOSSES = {("lora", 8): (0.5, 0.3, 0.4), ("full", 8): (0.2, 0.25, 0.9),
          ("lora", 64): (0.9, 0.8, 0.7), ("full", 64): (0.4, 0.3, 0.6)}  # fmt: skip
GIVEN = [
    Trial(method, size, lr, seed, excess + 0.01 * seed)
    for (method, size), losses in LOSSES.items()
    for lr, excess in zip((1e-3, 1e-2, 1e-1), losses, strict=True)
    for seed in (0, 1)
]


def numbers(data: Any) -> list[float]:
    return np.asarray(data).astype(float).tolist()


def written(figures: list[Figure]) -> list[str]:
    return texts(figures[-1]).split("\n")


def test_the_product(figures: list[Figure]):
    """All numbers of A, B and what they make, and how many of them are trained."""
    assert product_picture(A, B).png[:4] == b"\x89PNG"
    cells = sorted(float(text) for text in written(figures) if text.replace("-", "").replace(".", "").isdigit())
    product = [[1, 2, 0], [0, 1, 7], [2, 3, -7], [0.5, 1, 0]]
    own = [*A.flatten().tolist(), *B.flatten().tolist(), *(float(v) for row in product for v in row)]
    assert cells == sorted([*own, 12.0])  # 12: how many numbers the product has
    assert {"trained: 6", "trained: 8", "B A [4, 3]"} <= set(written(figures))


@pytest.mark.parametrize(("a", "b"), [(A, B[:, :1]), (A, torch.zeros(13, 2)), (torch.zeros(2, 13), B)])
def test_a_product_that_cannot_be_drawn(a: torch.Tensor, b: torch.Tensor):
    with pytest.raises(ValueError, match="at most"):
        product_picture(a, b)


def test_places_and_counts_of_all_methods(tiny: Path, figures: list[Figure]):
    """Counts by hand for the tiny Llama: width 64, keys 32, MLP 128, 2 blocks."""
    found = reports(lambda: minift.load_model(tiny), every_method() | {"dora": minift.LoraConfig(r=2, use_dora=True)})
    counts = {name: parts_of(report) for name, report in found.items()}
    for name, report in found.items():
        assert sum(counts[name].values()) == report.trained and set(counts[name]) <= set(PARTS)
    assert counts["ia3"] == {"k": 2 * 32, "v": 2 * 32, "down": 2 * 128}
    assert counts["norms"] == {"norm": 2 * 64, "norm ": 2 * 64, "last norm": 64}
    assert counts["dora"]["gate"] == 2 * (2 * (64 + 128) + 128)
    assert counts["lora"]["q"] == 2 * 8 * (64 + 64) and set(counts["lora"]) == set(counts["bitfit"])
    assert counts["houlsby"]["behind attention"] == counts["houlsby"]["behind, beside MLP"] > 0
    assert set(counts["pfeiffer"]) == set(counts["parallel"]) == {"behind, beside MLP"}
    assert counts["prompt-tuning"] == {"before the text": 20 * 64} and set(counts["p-tuning"]) == {"before the text"}
    assert counts["prefix-tuning"] == {"k": 20 * 2 * 32, "v": 20 * 2 * 32}
    assert counts["full"]["embedding"] == 384 * 64 and "head" not in counts["full"]  # tied

    method_places(found)
    shown = written(figures)
    assert all(name in shown and f"{report.trained:,}" in shown for name, report in found.items())
    (axes,) = figures[-1].axes
    rows: dict[int, set[int]] = {}
    for line in axes.get_lines():
        if line.get_marker() in ("s", "o"):
            for x, y in zip(numbers(line.get_xdata()), numbers(line.get_ydata()), strict=True):
                rows.setdefault(int(y), set()).add(int(x))
    assert rows == {row: {list(PARTS).index(part) for part in counts[name]} for row, name in enumerate(found)}


ROW = MethodRow("lora", 1234, 10**6, 1, 1, 1, 5_600_000, 1.0, 3.0, 2.25)


def test_bars_of_methods(figures: list[Figure]):
    method_bars([ROW, MethodRow("full", 987_654, 10**6, 1, 1, 1, 78_000_000, 1.0, 3.0, 1.5)])
    widths = [[bar.get_width() for bar in axes.patches] for axes in figures[0].axes]  # pyright: ignore[reportAttributeAccessIssue]
    assert widths == [[1234, 987_654], [5.6, 78.0], [2.25, 1.5]]
    assert {"1,234", "987,654", "5.6", "78", "2.25", "1.5", "lora", "full"} <= set(written(figures))
    method_bars([ROW], seconds=True)
    assert [axes.patches[0].get_width() for axes in figures[1].axes] == [1234, 5.6, 1.0, 2.25]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="no method"):
        method_bars([])


def test_storage_is_the_books(figures: list[Figure]):
    storage_lines()
    assert {"1,677.7 million", "23.3 million"} <= set(written(figures))
    (axes,) = figures[0].axes
    copies, shared, *_ = axes.get_lines()
    at = numbers(copies.get_xdata()).index(100)
    assert (numbers(copies.get_ydata())[at], numbers(shared.get_ydata())[at]) == (1_677_721_600, 23_330_816)


def merged(rounding: float, kl: float | None) -> MergeReport:
    drift = None if kl is None else Drift(10, 1.0, 0.1, kl, 0.9)
    return MergeReport(("a",), (), (MergedLayer("x", "bf16", 2.0, 2 * rounding),), drift)


def test_drift(figures: list[Figure]):
    drift_bars({"fp32": merged(0.0, 1e-13), "bf16": merged(0.002, 3e-5)})
    assert written(figures).count("below 1e-08") == 2 and {"2.0e-03", "3.0e-05"} <= set(written(figures))
    with pytest.raises(ValueError, match="token_ids"):
        drift_bars({"bf16": merged(0.1, None)})


def test_curves_of_rates(figures: list[Figure]):
    rate_curves(GIVEN)
    assert [axes.get_title() for axes in figures[0].axes] == ["batches of 8", "batches of 64"]
    lora, dots, ring, full, *_ = figures[0].axes[0].get_lines()
    assert numbers(lora.get_ydata()) == pytest.approx([0.505, 0.305, 0.405]) and len(numbers(dots.get_xdata())) == 6
    assert (numbers(ring.get_xdata()), numbers(ring.get_ydata())) == ([1e-2], [pytest.approx(0.305)])
    assert lora.get_linestyle() != full.get_linestyle()


def test_gap_over_the_batch_size(figures: list[Figure]):
    batch_gap(GIVEN)
    left, right = figures[0].axes
    assert numbers(left.get_lines()[0].get_ydata()) == pytest.approx([0.305, 0.705])
    assert numbers(right.get_lines()[0].get_ydata()) == pytest.approx([0.1, 0.4])
    assert {"lora minus full (nats)", "batch size"} <= set(written(figures))
