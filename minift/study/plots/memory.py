"""Pictures of where memory goes: the ledger of a step, the book's stacks, the book's measurements."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from minift.study.ablations import Filled, ratios
from minift.study.book_memory import EAGER, FIGURES, SQUARE, Part, corrected_figure, ram_figure, stack_bytes
from minift.study.book_tables import ABLATIONS, INT8_ABLATIONS, MB, predicted_ablations
from minift.study.ledger import Ledger
from minift.study.picture import BLUE, GREEN, GREY, ORANGE, PALETTE, PURPLE, SKY, WIDTH, YELLOW, Picture, new_figure


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
        colors = [SKY if part.choice else GREY if part.name == EAGER else BLUE for part in parts]
        bars = axes.barh([part.name for part in parts], [part.bytes / MB for part in parts], color=colors)
        axes.bar_label(bars, [f"{part.bytes / MB:,.0f}" for part in parts], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"gpu_ram-{name} (MB)" + ("; light: choose one" if parts[0].choice else ""), loc="left")
    return Picture.of(figure)


TITLES = {
    "no_lora": "All parameters trained, Adam in FP32", "8bit_adam": "All parameters trained, 8-bit Adam",
    "lora": "Weights in INT8, LoRA", "lora_s": "LoRA, rows as long as the model is wide (s = h)",
    "lora_short_s": "LoRA, rows a quarter as long (s = h/4)",
}  # fmt: skip
KINDS = {
    "NF4": ("white", ""), "INT8": (YELLOW, ""), "FP16": (ORANGE, ""), "FP32": (PURPLE, ""), "FP32+FP16": (GREEN, ".."),
    "scores": (SKY, "///"),
}  # fmt: skip
ROWS, ACROSS, NARROW = 6, 54, 8.5  # squares: height of a block, width of the picture, least room for a block's words


def ram_squares(name: str) -> Picture:
    """Draw one of the book's stacks as squares of 20 MB, and below it what is needed where the book's is off.

    After the figures gpu_ram-* by dvgodoy (CC BY 4.0): no_lora, 8bit_adam, lora, lora_s, lora_short_s. Different here:
    every block says its size, the sums are there, all numbers are computed, and the second stack is not in the book.

    Args:
        name: of the figure, without "gpu_ram-".

    Raises:
        ValueError: another name.
    """
    stacks = {"as in the book": ram_figure(name), "put right": corrected_figure(name)}
    if name in ("no_lora", "8bit_adam"):  # the scales would not be seen: a third of a square
        del stacks["put right"]
    places = [_places(parts) for parts in stacks.values()]
    heights = [bottom + 2.5 for _, bottom in places]
    figure = new_figure(WIDTH, 0.55 + 0.142 * sum(heights))
    grid = figure.subplots(len(stacks), height_ratios=heights, squeeze=False)[:, 0]
    for axes, (title, parts), (corners, bottom) in zip(grid, stacks.items(), places, strict=True):
        axes.set(xlim=(-0.2, ACROSS), ylim=(bottom, -0.5), aspect="equal")
        axes.axis("off")
        axes.set_title(f"{title}: {_sums(parts)}", loc="left", fontsize=10)
        for part, corner in zip(parts, corners, strict=True):
            _block(axes, part, *corner)
    if len(stacks) == 1:
        notes = (
            f"With scales, in squares: {_scales(name)}.\nQuantized weights get no gradients: only FP16 can be trained."
        )
        figure.supxlabel(notes, fontsize=8, x=0.01, ha="left")
    figure.suptitle(f"{TITLES[name]}: 360 M parameters, 1 square = {SQUARE // MB} MB", fontsize=11)
    return Picture.of(figure)


def _places(parts: Sequence[Part]) -> tuple[list[tuple[float, float]], float]:
    """The corner of every block, from left to right and line by line, and where the last line ends."""
    corners, x, y = [], 0.0, 0.0
    for part in parts:
        room = max(math.ceil(part.squares / ROWS), NARROW) + 1
        if x + room > ACROSS + 1 or (part.name.startswith("weight copy") and part.squares > ROWS):
            x, y = 0.0, y + ROWS + 4.5
        corners.append((x, y))
        x += room
    return corners, y + ROWS + 4.5


def _block(axes: Any, part: Part, x: float, y: float) -> None:
    """Its squares, column by column, the last one as much as there is of it; and its words above."""
    from matplotlib.patches import Rectangle

    what, _, kind = (part.name, "", "scores") if part.name == EAGER else part.name.rpartition(" ")
    color, hatch = KINDS[kind]
    axes.text(x, y + 2.7, f"{what}\n{kind}\n{part.squares:.3g} = {part.bytes / MB:,.0f} MB", fontsize=8)
    for n in range(math.ceil(part.squares - 1e-9)):
        share = min(1.0, part.squares - n)
        corner = x + n // ROWS, y + 3.2 + n % ROWS
        axes.add_patch(Rectangle(corner, share, 1, facecolor=color, hatch=hatch, edgecolor="black", linewidth=0.5))


def _sums(parts: Sequence[Part]) -> str:
    """The totals of a stack in words."""
    if parts[0].choice:
        sums = {part.name.split()[-1]: stack_bytes(list(parts), part.name) for part in parts if part.choice}
    elif parts[-1].name == EAGER:
        sums = {"fused attention": stack_bytes(list(parts), eager=False), "eager": stack_bytes(list(parts))}
    else:
        return f"{stack_bytes(list(parts)) / MB:,.0f} MB"
    return ", ".join(f"{name} {size / MB:,.0f} MB" for name, size in sums.items())


def _scales(name: str) -> str:
    """What differs of a figure whose parts are the same."""
    pairs = zip(ram_figure(name), corrected_figure(name), strict=True)
    return ", ".join(f"{right.name} {right.squares:.2f}" for drawn, right in pairs if drawn.bytes != right.bytes)


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


def ablation_runs(results: Sequence[Filled]) -> Picture:
    """Draw steps that were measured on this machine beside the book's, both to the first one with the same attention.

    Args:
        results: what `minift.study.ablations.fill` returns.
    """
    pairs = list(zip(results, ratios(results), strict=True))
    attentions = list(dict.fromkeys(filled.attention for filled in results))
    count = max(sum(filled.attention == name for filled in results) for name in attentions)
    figure = new_figure(WIDTH, 1.6 + 0.36 * count)
    panels = figure.subplots(1, len(attentions), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, attentions, strict=True):
        rows = [(filled.case.label, *both) for filled, both in pairs if filled.attention == name]
        for shift, column, color, hatch, label in (
            (-0.2, 1, BLUE, "", "the book's, of OPT-350M"), (0.2, 2, ORANGE, "//", "measured here"),
        ):  # fmt: skip
            sizes = [row[column] or 0.0 for row in rows]
            bars = axes.barh([n + shift for n in range(len(rows))], sizes, 0.4, color=color, hatch=hatch, label=label)
            axes.bar_label(bars, [f"{size:.2f}" if size else "none" for size in sizes], padding=2, fontsize=7)
        axes.set(title=name, xlabel="peak, to that of the first line", yticks=range(len(rows)))
        axes.set_yticklabels([row[0] for row in rows], fontsize=8)
        axes.margins(x=0.16, y=0.01)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return Picture.of(figure)


def _stack(axes: Any, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Horizontal bars, one for each name, of parts side by side."""
    left = [0.0] * len(names)
    hatches = ("", "//", "", "..", "", "\\\\", "", "xx", "", "--")
    for (part, sizes), color, hatch in zip(parts.items(), PALETTE, hatches, strict=False):
        axes.barh(names, sizes, left=left, color=color, hatch=hatch, edgecolor="white", label=part)
        left = [begin + size for begin, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
