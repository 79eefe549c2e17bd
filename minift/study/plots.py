"""Pictures: of a run, of where memory goes, of what rounding does.

Each function computes nothing that it does not draw, writes one PNG file and returns its path. Colours are safe for
colour-blind readers (Okabe and Ito's palette), and nothing is told by colour alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minift.atomic import atomic_file
from minift.study.book_memory import FIGURES, ram_figure
from minift.study.book_tables import ABLATIONS, INT8_ABLATIONS, MB, predicted_ablations
from minift.study.ledger import Ledger
from minift.study.methods import MethodRow
from minift.study.rounding import DECIMALS, Run
from minift.train.loop import StepRecord

BLUE, ORANGE = "#0072B2", "#E69F00"
SKY, GREEN, YELLOW, VERMILION, PURPLE, GREY = "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#999999"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW, GREY, "#000000", "#666666")
WIDTH = 8  # inches, at 150 dots each: that of a notebook's cell


def loss_curve(steps: Sequence[StepRecord], path: str | Path, title: str = "Training loss") -> Path:
    """Draw loss and learning rate over the steps of a run into a PNG file."""
    if not steps:
        raise ValueError("nothing to draw: the run has no steps")
    figure = _figure(7, 4)
    loss_axes = figure.subplots()
    numbers = [record.step for record in steps]
    loss_axes.plot(numbers, [record.loss for record in steps], color=BLUE, marker="o", markersize=3, label="loss")
    loss_axes.set(xlabel="optimizer step", ylabel="mean loss a trained token (nats)", title=title, ylim=(0, None))
    loss_axes.grid(alpha=0.3)
    lr_axes = loss_axes.twinx()
    lr_axes.plot(numbers, [record.lr for record in steps], color=ORANGE, linestyle="--", label="learning rate")
    lr_axes.set(ylabel="learning rate", ylim=(0, None))
    lines = [*loss_axes.get_lines(), *lr_axes.get_lines()]
    loss_axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    return _save(figure, path)


def ledger_bars(ledger: Ledger, path: str | Path) -> Path:
    """Draw the moments of a training step, each a bar of its categories."""
    figure = _figure(WIDTH, 1.2 + 0.5 * len(ledger.moments))
    axes = figure.subplots()
    names = [moment.name for moment in ledger.moments]
    columns = [moment.categories() for moment in ledger.moments]
    shown = [name for name in columns[0] if any(column[name] > 1e-3 * ledger.peak for column in columns)]
    _stack(axes, names, {name: [column[name] / MB for column in columns] for name in shown})
    axes.set(xlabel="MB", title=f"Memory of a step: peak {ledger.peak / MB:,.0f} MB, {ledger.at_peak.name}")
    figure.legend(loc="outside lower center", ncols=4)
    return _save(figure, path)


def ram_figures(path: str | Path) -> Path:
    """Draw the book's five stacks of memory of a model of 360 M parameters, from computed numbers."""
    figure = _figure(WIDTH, 10)
    for axes, name in zip(figure.subplots(len(FIGURES)), FIGURES, strict=True):
        parts = ram_figure(name)
        colors = [SKY if part.choice else GREY if part.name == "only if eager" else BLUE for part in parts]
        bars = axes.barh([part.name for part in parts], [part.bytes / MB for part in parts], color=colors)
        axes.bar_label(bars, [f"{part.bytes / MB:,.0f}" for part in parts], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"gpu_ram-{name} (MB)" + ("; light: choose one" if parts[0].choice else ""), loc="left")
    return _save(figure, path)


def ablation_bars(path: str | Path) -> Path:
    """Draw the book's measurements of OPT-350M beside the prediction for the same step here."""
    tables = (predicted_ablations(ABLATIONS), "16 bits"), (predicted_ablations(INT8_ABLATIONS), "8 bits, LoRA")
    figure = _figure(WIDTH, 8)
    grid = figure.subplots(2, 2, width_ratios=[len(rows) for rows, _ in tables])
    for attention, line in zip(("eager", "sdpa"), grid, strict=True):
        for (rows, weights), axes in zip(tables, line, strict=True):
            places = range(len(rows))
            book = [getattr(row, attention) for row, _ in rows]
            axes.bar([x - 0.2 for x in places], book, 0.4, color=BLUE, label="measured in the book")
            axes.bar([x + 0.2 for x in places], [here[attention] for _, here in rows], 0.4, color=ORANGE, hatch="//",
                     label="predicted here")  # fmt: skip
            axes.set(ylabel="MB", title=f"{weights}, {attention}", xticks=list(places))
            axes.set_xticklabels([row.label for row, _ in rows], rotation=45, ha="right", fontsize="small")
    figure.suptitle("OPT-350M, one row: tokens, what is trained, how; by attention")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return _save(figure, path)


def rounding_walks(walks: Mapping[str, Tensor], path: str | Path) -> Path:
    """Draw a weight under random updates, rounded to 3 to 7 decimals: down on the left, by chance on the right.

    Args:
        walks: what `minift.study.rounding.walks` returns.
    """
    figure = _figure(WIDTH, 4)
    left, right = figure.subplots(1, 2)
    every = max(1, len(walks["exact"]) // 2000)  # more points than the picture has dots
    for axes, mode, title in ((left, "down", "rounded down"), (right, "stochastic", "rounded by chance")):
        steps = range(0, len(walks["exact"]), every)
        for column, (decimals, style) in enumerate(zip(DECIMALS, ("-", "--", "-.", ":", "-"), strict=True)):
            label = f"{decimals} decimals, ends at {walks[mode][-1, column]:.4f}"
            axes.plot(steps, walks[mode][::every, column], style, color=PALETTE[column], label=label)
        axes.plot(steps, walks["exact"][::every], color="black", linewidth=0.8, label="fp32")
        axes.set(xlabel="update", title=title)
        axes.legend(fontsize="small")
    left.set_ylabel("weight")
    return _save(figure, path)


def stalled_losses(runs: Mapping[str, Run], path: str | Path) -> Path:
    """Draw the losses of `minift.study.rounding.stalled_run`."""
    figure = _figure(7, 4)
    axes = figure.subplots()
    for (name, run), color, style in zip(runs.items(), PALETTE, ("-", "--", ":"), strict=False):
        label = name if name == "fp32" else f"bfloat16, {name}"
        axes.semilogy(run.loss, style, color=color, label=f"{label}: {run.loss[-1]:.2g}")
    axes.set(xlabel="step", ylabel="mean squared error", title="Weights rounded after every step")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def _stack(axes: Any, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Horizontal bars, one for each name, of parts side by side."""
    left = [0.0] * len(names)
    hatches = ("", "//", "", "..", "", "\\\\", "", "xx", "", "--")
    for (part, sizes), color, hatch in zip(parts.items(), PALETTE, hatches, strict=False):
        axes.barh(names, sizes, left=left, color=color, hatch=hatch, edgecolor="white", label=part)
        left = [begin + size for begin, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s to import; draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    with atomic_file(path) as place:
        figure.savefig(place, format="png", dpi=150)
    return path


def run_curves(steps: Sequence[StepRecord], path: str | Path, title: str = "Training run") -> Path:
    """Draw loss (with evaluations), learning rate, gradient norm, seconds and memory over the steps into one PNG file.

    Memory is left out if no record has it. Of a run on a CPU it is the most that the process has held so far, so it
    never falls.
    """
    if not steps:
        raise ValueError("nothing to draw: the run has no steps")
    figure = _figure(10, 6)
    figure.suptitle(title)
    panels = {
        "mean loss a trained token (nats)": [(record.step, record.loss) for record in steps],
        "learning rate": [(record.step, record.lr) for record in steps],
        "gradient norm before clipping": [(record.step, record.grad_norm) for record in steps],
        "seconds a step": [(record.step, record.seconds) for record in steps],
        "most memory held (MB)": [(r.step, r.peak_memory / MB) for r in steps if r.peak_memory is not None],
    }
    panels = {name: points for name, points in panels.items() if points}
    places = figure.subplots(2, -(-len(panels) // 2)).flat
    for (name, points), axes in zip(panels.items(), places, strict=False):
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=2, label="training")
        axes.set(xlabel="optimizer step", ylabel=name, ylim=(0, None))
        axes.grid(alpha=0.3)
    for axes in list(places):
        axes.remove()
    looks = [(record.step, record.eval_loss) for record in steps if record.eval_loss is not None]
    if looks:
        shown = [step for step, _ in looks], [loss for _, loss in looks]
        figure.axes[0].plot(*shown, color=ORANGE, marker="s", linestyle="--", label="evaluation")
        figure.axes[0].legend(loc="upper right")
    return _save(figure, path)


def methods_plot(rows: Sequence[MethodRow], path: str | Path) -> Path:
    """Draw the comparison of methods into a PNG file: trained parameters, memory, time and loss, a bar for each."""
    if not rows:
        raise ValueError("nothing to draw: no method was compared")
    panels = (
        ("trained parameters", [row.trained for row in rows], BLUE, "{:,}"),
        ("peak of a step (MB)", [row.peak / 1e6 for row in rows], ORANGE, "{:,.4g}"),
        ("seconds a step", [row.seconds for row in rows], GREEN, "{:.3g}"),
        ("loss after (line: before)", [row.loss_after for row in rows], VERMILION, "{:.3g}"),
    )
    figure = _figure(12, 1.5 + 0.32 * len(rows))
    for axes, (title, values, color, form) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        bars = axes.barh([row.method for row in rows], values, color=color)
        if title.startswith("loss"):
            axes.axvline(rows[0].loss_before, color="black", linestyle="--")
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # bars may end near the line
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, bbox=behind)
        axes.set(title=title)
        axes.margins(x=0.6)
        if title.startswith("trained"):
            axes.set_xscale("log")
            axes.set_xlim(min(values) / 10, max(values) * 1e4)  # room for the labels
    axes.invert_yaxis()
    return _save(figure, path)
