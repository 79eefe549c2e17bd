"""From numbers to something readable: the README's table and a plot, out of the files in benchmarks/results/.

Each file is one run on one machine: `{"machine", "device", "versions", "rows": [...]}` (harness.py says what is in a
row). A ratio is the time of the peer over the time of minift, so more than 1 means faster. Its axis is logarithmic:
twice as fast and half as fast are equally far from 1.

Rendering again changes nothing, so `git diff` shows whether the README still tells what the files say.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import times, whiskers, why_not
from minift.atomic import atomic_file
from minift.study.picture import BLUE, ORANGE

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PLOT = "ratios.png"
KEYS = {"machine": str, "device": str, "versions": dict, "rows": list}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def update(readme: Path, folder: Path) -> None:
    """Render all results in `folder` between the markers of `readme`, and into `folder`/ratios.png.

    Raises:
        ValueError: no results, a file that holds none, nothing measured, or no markers. Nothing is written then.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} must hold the lines {BEGIN} and {END} once each, in this order: put them in")
    results = read(folder)
    plot = folder / PLOT
    draw(results, plot)
    link = Path(os.path.relpath(plot, readme.parent)).as_posix()
    parts = [f"{describe(result)}:\n\n{table(result)}" for result in results]
    parts.append(f"![Time of the peer / time of minift, one bar a row]({link})")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    with atomic_file(readme) as place:
        place.write_text("\n\n".join([before + BEGIN, *parts, after]), encoding="utf-8")


def read(folder: Path) -> list[dict[str, Any]]:
    """The results in `folder`, in the order of their file names."""
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        for key, kind in KEYS.items():
            if not isinstance(result, dict) or not isinstance(result.get(key), kind):
                raise ValueError(f"{path} holds no results: {key!r} must be a {kind.__name__}; measure it again")
        results.append(result)
    if not results:
        raise ValueError(f"{folder} holds no results: run python -m benchmarks --json {folder}/NAME.json first")
    return results


def describe(result: dict[str, Any]) -> str:
    """Machine and versions in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"**{result['machine']}** ({result['device']}), {versions}"


def table(result: dict[str, Any]) -> str:
    """A Markdown table of one run, one line a row; the last column says what the numbers do not."""
    with_bandwidth = any("bandwidth_share" in row for row in result["rows"])
    head = ["", "the peer", "minift", "ratio (10th to 90th percentile)", "goal"]
    head += ["bandwidth, the peer", "minift", ""] if with_bandwidth else [""]
    lines = [head, ["---"] * len(head)]
    for row in result["rows"]:
        cells = _measured(row) if "ratio" in row else ["", "", why_not(row), ""]
        if with_bandwidth:
            shares = row.get("bandwidth_share", {})
            cells += [f"{shares[side]:.0%}" if side in shares else "" for side in ("theirs", "ours")]
        lines.append([_name(row), *cells, row.get("note", "")])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _name(row: dict[str, Any]) -> str:
    honest = " (expected to lose)" if row.get("honest") else ""
    return f"{row['benchmark']}: {row['name']}{honest}"


def _measured(row: dict[str, Any]) -> list[str]:
    median, (low, high) = row["ratio"]["median"], whiskers(row)
    number = f"{times(median)}x"
    seconds = [duration(row["seconds"][side]) for side in ("theirs", "ours")]
    goal = f"{row['goal']:g}x, {'met' if median >= row['goal'] else 'missed'}" if "goal" in row else ""
    return [*seconds, f"{f'**{number}**' if median > 1 else number} ({times(low)} to {times(high)})", goal]


def duration(seconds: float) -> str:
    """Three digits and a unit: 1.72 s, 24.1 ms, 850 us."""
    rounded = float(f"{seconds:.3g}")
    unit, scale = next((pair for pair in (("s", 1.0), ("ms", 1e3)) if rounded * pair[1] >= 1), ("us", 1e6))
    return f"{rounded * scale:.4g} {unit}"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of the median ratios with the 10th to 90th percentile as whiskers, one panel a run, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s to import; draws without a display
    from matplotlib.figure import Figure

    panels = [(result, [row for row in result["rows"] if "ratio" in row]) for result in results]
    panels = [(result, rows) for result, rows in panels if rows]
    if not panels:
        raise ValueError("nothing to draw: no row was measured")
    heights = [len(rows) for _, rows in panels]
    figure = Figure(figsize=(10, 1 + sum(0.32 * height + 0.7 for height in heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (result, rows) in zip(grid[:, 0], panels, strict=True):
        _draw_panel(axes, rows)
        axes.set_title(f"{result['machine']} ({result['device']})", loc="left", fontsize=10)
    lows, highs = zip(*(whiskers(row) for _, rows in panels for row in rows), strict=True)
    axes = grid[-1, 0]
    low, high = min(*lows, 0.9), max(*highs, 1.1)
    # 2 % of the axis on the left, 12 % on the right for the numbers.
    low, high = low * (low / high) ** 0.02, high * (high / low) ** 0.14
    ticks = [tick for tick in (TICKS if high / low < 100 else TICKS[::3]) if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xlabel("time of the peer / time of minift: right of the line minift is faster")
    with atomic_file(path) as place:
        figure.savefig(place, format="png", dpi=120)


def _draw_panel(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    axes.set_xscale("log")
    axes.minorticks_off()
    for number, row in enumerate(rows):
        median, (low, high) = row["ratio"]["median"], whiskers(row)
        axes.barh(number, median - 1, left=1, height=0.7, color=BLUE if median > 1 else ORANGE)
        axes.plot([low, high], [number, number], color="black", linewidth=1)
        place = {"xy": (max(high, 1), number), "xytext": (4, 0), "textcoords": "offset points"}
        axes.annotate(f"{times(median)}x", va="center", fontsize=8, **place)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
