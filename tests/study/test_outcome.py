"""The end of a run in words and pictures: the numbers are those of the records, the pictures show what they should."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from minift.study.outcome import outcome
from minift.study.plots.runs import run_curves
from minift.train.loop import TrainResult
from minift.train.records import StepRecord


def records(evaluated: bool) -> list[StepRecord]:
    looks: list[dict[str, Any]] = [{}, {"eval_loss": 1.5, "eval_perplexity": 4.48, "eval_accuracy": 0.25}, {}]
    return [
        StepRecord(n, 3.0 / n, 0.5 * n, 1e-3 / n, 10, 20, 0.1 * n, **(looks[n - 1] if evaluated else {}))
        for n in (1, 2, 3)
    ]


@pytest.mark.parametrize("evaluated", [False, True])
def test_curves_hold_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: bool):
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw))[1])
    path = run_curves(records(evaluated), "a title").save(tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    drawn = [[np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()] for axes in figures[0].axes]
    looks = [[1.5]] if evaluated else []
    assert drawn == [
        [[3.0, 1.5, 1.0], *looks], [[1e-3, 5e-4, 1e-3 / 3]], [[0.5, 1.0, 1.5]], [[0.1, 0.2, pytest.approx(0.3)]]
    ]  # fmt: skip
    with pytest.raises(ValueError, match="nothing to draw"):
        run_curves([])


def test_what_is_said_at_the_end(tmp_path: Path):
    result = TrainResult(records(True), True, tmp_path, tmp_path / "adapter", stopped_early=True, weights_of=2)
    said = outcome(result, "some-model")
    assert said.splitlines()[:3] == [
        "Loss 3.000 -> 1.000 in 3 steps",
        "Stopped early: the evaluation loss no longer fell",
        "Evaluation of the weights of step 2: loss 1.500, perplexity 4.48, 25.0% of the trained tokens right",
    ]
    assert f"minift train --like {tmp_path} --output-dir {tmp_path}-again" in said
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", "curves.png"}
