"""Pictures of where memory goes: the ledger of a step, the book's stacks, the book's measurements."""

from collections.abc import Mapping, Sequence
from typing import Any

from minift.study.book_memory import FIGURES, ram_figure
from minift.study.book_tables import ABLATIONS, INT8_ABLATIONS, MB, predicted_ablations
from minift.study.ledger import Ledger
from minift.study.picture import BLUE, GREY, ORANGE, PALETTE, SKY, WIDTH, Picture, new_figure


def ledger_bars(ledger: Ledger) -> Picture:
    """Draw the moments of a training step, each a bar of its categories."""
    figure = new_figure(WIDTH, 1.2 + 0.5 * len(ledger.moments))
    axes = figure.subplots()
    names = [moment.name for moment in ledger.moments]
    columns = [moment.categories() for moment in ledger.moments]
    shown = [name for name in columns[0] if any(column[name] > 1e-3 * ledger.peak for column in columns)]
    _stack(axes, names, {name: [column[name] / MB for column in columns] for name in shown})
    axes.set(xlabel="MB", title=f"Memory of a step: peak {ledger.peak / MB:,.0f} MB, {ledger.at_peak.name}")
    figure.legend(loc="outside lower center", ncols=4)
    return Picture.of(figure)


def ram_figures() -> Picture:
    """Draw the book's five stacks of memory of a model of 360 M parameters, from computed numbers."""
    figure = new_figure(WIDTH, 10)
    for axes, name in zip(figure.subplots(len(FIGURES)), FIGURES, strict=True):
        parts = ram_figure(name)
        colors = [SKY if part.choice else GREY if part.name == "only if eager" else BLUE for part in parts]
        bars = axes.barh([part.name for part in parts], [part.bytes / MB for part in parts], color=colors)
        axes.bar_label(bars, [f"{part.bytes / MB:,.0f}" for part in parts], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"gpu_ram-{name} (MB)" + ("; light: choose one" if parts[0].choice else ""), loc="left")
    return Picture.of(figure)


def ablation_bars() -> Picture:
    """Draw the book's measurements of OPT-350M beside the prediction for the same step here."""
    tables = (predicted_ablations(ABLATIONS), "16 bits"), (predicted_ablations(INT8_ABLATIONS), "8 bits, LoRA")
    figure = new_figure(WIDTH, 8)
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
    return Picture.of(figure)


def _stack(axes: Any, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Horizontal bars, one for each name, of parts side by side."""
    left = [0.0] * len(names)
    hatches = ("", "//", "", "..", "", "\\\\", "", "xx", "", "--")
    for (part, sizes), color, hatch in zip(parts.items(), PALETTE, hatches, strict=False):
        axes.barh(names, sizes, left=left, color=color, hatch=hatch, edgecolor="white", label=part)
        left = [begin + size for begin, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
