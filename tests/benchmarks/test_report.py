"""The README's table and the plot from results written by hand."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from benchmarks import __main__ as program
from benchmarks import report
from benchmarks.report import BEGIN, END, duration, update

BLUE, ORANGE = "#0072B2", "#E69F00"  # faster, slower


def row(name: str, median: float, **more: Any) -> dict[str, Any]:
    ratio = {"p10": median * 0.9, "median": median, "p90": median * 1.1}
    return {
        "benchmark": "fourbit", "name": name, "rounds": 15, "ratio": ratio,
        "seconds": {"ours": 0.5, "theirs": 0.5 * median},
    } | more  # fmt: skip


def run(*rows: dict[str, Any], machine: str = "Some CPU, 2 threads", device: str = "cpu") -> dict[str, Any]:
    versions = {"torch": "2.13.0", "bitsandbytes": "0.50.2"}
    return {"machine": machine, "device": device, "versions": versions, "rows": list(rows)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A README with markers and an empty folder of results."""
    (tmp_path / "README.md").write_text(f"# Title\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    (tmp_path / "some" / "results").mkdir(parents=True)
    return tmp_path


def write(place: Path, **results: dict[str, Any]) -> tuple[Path, Path]:
    folder = place / "some" / "results"
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return place / "README.md", folder


# --- the table --------------------------------------------------------------------------------------------------------


def test_table():
    result = run(
        row("quantize", 8.0, goal=7.0),
        row("decode", 0.25, goal=1.5, note="a | b"),
        row("cast", 0.01, honest=True),
        {"benchmark": "int8", "name": "forward", "disagrees": "ValueError: 3 of 8 values differ"},
        {"benchmark": "int8", "name": "backward", "skipped": "RuntimeError: no kernel"},
        {
            "benchmark": "train", "name": "as shipped", "seconds": {"ours": 1.72, "theirs": 5.709},
            "ratio": {"least": 1.68, "median": 3.32, "most": 3.49},
        },
    )  # fmt: skip
    assert report.table(result).splitlines() == [
        "|  | the peer | minift | ratio (10th to 90th percentile) | goal |  |",
        "| --- | --- | --- | --- | --- | --- |",
        "| fourbit: quantize | 4 s | 500 ms | **8.00x** (7.20 to 8.80) | 7x, met |  |",
        "| fourbit: decode | 125 ms | 500 ms | 0.25x (0.23 to 0.28) | 1.5x, missed | a \\| b |",
        "| fourbit: cast (expected to lose) | 5 ms | 500 ms | 0.01x (0.009 to 0.011) |  |  |",
        "| int8: forward |  |  | disagrees: ValueError: 3 of 8 values differ |  |  |",
        "| int8: backward |  |  | skipped: RuntimeError: no kernel |  |  |",
        "| train: as shipped | 5.71 s | 1.72 s | **3.32x** (1.68 to 3.49) |  |  |",
    ]


def test_bandwidth_has_columns_where_it_was_measured():
    result = run(row("decode", 2.0, bandwidth_share={"ours": 0.81, "theirs": 0.4}), row("forward", 2.0), device="cuda")
    head, _, decode, forward = report.table(result).splitlines()
    assert head.endswith("| goal | bandwidth, the peer | minift |  |")
    assert decode.endswith("|  | 40% | 81% |  |")
    assert forward.endswith("|  |  |  |  |")
    assert {line.count("|") for line in (head, decode, forward)} == {9}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5710.0, "5710 s"), (5.7088, "5.71 s"), (1.0, "1 s"), (0.99951, "1 s"), (0.9994, "999 ms"), (0.0241, "24.1 ms"),
        (1e-3, "1 ms"), (850e-6, "850 us"), (12.34e-6, "12.3 us"), (0.5e-6, "0.5 us"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


# --- the README -------------------------------------------------------------------------------------------------------


def test_readme_is_filled_between_the_markers(place: Path):
    readme, folder = write(
        place, cpu=run(row("quantize", 8.0)), gpu=run(row("decode", 0.5), machine="Some GPU", device="cuda")
    )
    update(readme, folder)
    text = readme.read_text()
    assert text.startswith(
        f"# Title\n\nBefore.\n\n{BEGIN}\n\n**Some CPU, 2 threads** (cpu), torch 2.13.0, bitsandbytes"
    )
    assert text.endswith(f"](some/results/ratios.png)\n\n{END}\n\nAfter.\n")
    assert "old" not in text
    assert text.index("fourbit: quantize") < text.index("**Some GPU** (cuda)") < text.index("fourbit: decode")
    assert sorted(path.name for path in folder.iterdir()) == ["cpu.json", "gpu.json", "ratios.png"]
    assert sorted(path.name for path in place.iterdir()) == ["README.md", "some"]


def test_rendering_again_changes_nothing_and_new_numbers_replace_old_ones(place: Path):
    readme, folder = write(place, cpu=run(row("quantize", 8.0), row("decode", 0.5)))
    update(readme, folder)
    once = readme.read_bytes(), (folder / "ratios.png").read_bytes()
    update(readme, folder)
    assert (readme.read_bytes(), (folder / "ratios.png").read_bytes()) == once
    write(place, cpu=run(row("quantize", 9.0), row("decode", 0.5)))
    update(readme, folder)
    assert "**9.00x**" in readme.read_text() and "**8.00x**" not in readme.read_text()
    assert (folder / "ratios.png").read_bytes() != once[1]


@pytest.mark.parametrize(
    "text", ["# Title\n", f"{BEGIN}\n", f"{END}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"]
)
def test_missing_markers_are_refused(
    place: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    readme, folder = write(place, cpu=run(row("quantize", 8.0)))
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md must hold the lines <!-- benchmarks:begin --> and"):
        update(readme, folder)
    assert readme.read_text() == text
    assert not (folder / "ratios.png").exists()
    monkeypatch.setattr(program, "ROOT", place)
    assert program.main(["report"]) == 1
    assert "must hold the lines" in capsys.readouterr().err


def test_the_command_renders_the_projects_results(place: Path, monkeypatch: pytest.MonkeyPatch):
    (place / "benchmarks" / "results").mkdir(parents=True)
    (place / "benchmarks" / "results" / "cpu.json").write_text(json.dumps(run(row("quantize", 8.0))))
    monkeypatch.setattr(program, "ROOT", place)
    assert program.main(["report"]) == 0
    assert "](benchmarks/results/ratios.png)" in (place / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "holds no results: run python -m benchmarks --json"),
        ("{", "cpu.json is not JSON"),
        ("[]", "cpu.json holds no results: 'machine' must be a str"),
        (json.dumps(run() | {"rows": {"train": []}}), "cpu.json holds no results: 'rows' must be a list"),
        (json.dumps({"machine": "m", "versions": {}, "rows": []}), "'device' must be a str"),
        (json.dumps(run()), "nothing to draw"),
        (json.dumps(run({"benchmark": "int8", "name": "x", "skipped": "no"})), "nothing to draw"),
    ],
)
def test_results_that_are_none(place: Path, content: str | None, sentence: str):
    readme, folder = write(place)
    if content is not None:
        (folder / "cpu.json").write_text(content)
    before = readme.read_text()
    with pytest.raises(ValueError, match=sentence):
        update(readme, folder)
    assert readme.read_text() == before


# --- the plot ---------------------------------------------------------------------------------------------------------


def pixels(place: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    """The picture as [height, width] masks of the two colours."""
    path = place / "plot.png"
    report.draw([run(*rows)], path)
    picture = imread(path)[..., :3]
    # 8 bits a channel: a colour is met within half of 1/255; half of 1/100 leaves room and keeps the two apart.
    return {colour: (numpy.abs(picture - to_rgb(colour)) < 0.005).all(-1) for colour in (BLUE, ORANGE)}


def test_wins_and_losses_differ_in_colour(place: Path):
    assert not pixels(place, row("a", 2.0), row("b", 1.01))[ORANGE].any()
    assert not pixels(place, row("a", 0.5), row("b", 0.9))[BLUE].any()


def test_bars_start_at_one_on_a_logarithmic_axis(place: Path):
    """Rows of 4x, 2x and 1/2x: from one common column to the right, half as far, and as far to the left."""
    found = pixels(place, row("a", 4.0), row("b", 2.0), row("c", 0.5))
    blue, orange = found[BLUE], found[ORANGE]
    lines = numpy.flatnonzero(blue.any(1))
    first, second = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    spans = [numpy.flatnonzero(mask.any(0))[[0, -1]] for mask in (blue[first], blue[second], orange)]
    (four_left, four_right), (two_left, two_right), (half_left, half_right) = spans
    # A column more or less for the line at 1 and for anti-aliased edges, on either end: 4 pixels.
    assert four_left == two_left and abs(two_left - half_right) <= 4
    length = two_right - two_left
    assert length > 20
    assert abs((four_right - four_left) - 2 * length) <= 4
    assert abs((half_right - half_left) - length) <= 4
    assert numpy.flatnonzero(orange.any(1))[0] > lines[-1], "rows go from top to bottom"


def test_many_rows_and_machines_fit(place: Path):
    """A picture grows with its rows, so labels keep their size."""
    heights = []
    for count in (5, 25):
        path = place / "plot.png"
        report.draw([run(*(row(f"row {n}", 1 + n) for n in range(count)))] * 2, path)
        heights.append(imread(path).shape[0])
    # 0.32 inches a row at 120 dots an inch, twice 20 more rows.
    assert abs(heights[1] - heights[0] - 2 * 20 * 0.32 * 120) <= 2
