"""Pictures of attention: what it moves, where heads look, what a wrong mask does, and what the three ways cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from minift.study.book_tables import MB
from minift.study.picture import BLUE, ORANGE, PALETTE, SKY, WIDTH, Picture, new_figure
from minift.study.showdown import ATTENTIONS, BOOK, Cost
from minift.study.traffic import Step, eager_traffic, fused_traffic, moved


def traffic_picture(n: int = 5, d: int = 3) -> Picture:
    """Draw what written-out and fused attention load and write, a cell for each number.

    After a figure by dvgodoy (CC BY 4.0), figure 5.13 of the book: the same three steps of 5 tokens of width 3. Counts
    and the fused kernel are added, and each step stands beside what it loads and writes.
    """
    eager, fused = eager_traffic(n, d), fused_traffic(n, d)
    places = _Places(n, d)
    figure = new_figure(WIDTH, WIDTH * (4 * places.pitch + 5) / (places.end + 1))
    axes = figure.subplots()
    axes.axis("off")
    axes.set(xlim=(-0.5, places.end + 0.5), ylim=(-4 * places.pitch - 1, 3.5), aspect="equal")
    for lane, step in enumerate((*eager, fused)):
        _lane(axes, step, places, -lane * places.pitch - (2.5 if step is fused else 0))
    for text, y in (("Written out", 2.2), ("Fused", -3 * places.pitch - 0.3)):
        total = moved(eager) if text == "Written out" else fused.moved
        axes.text(0, y, f"{text}: {total:,} numbers moved", fontsize=13, weight="bold")
    axes.set_title(f"One head, {n} tokens of width {d}: loaded from memory, computed, written to memory", fontsize=12)
    return Picture.of(figure)


class _Places:
    """Where things stand, in cells: three matrices, an arrow, a formula, an arrow, a matrix."""

    def __init__(self, n: int, d: int):
        self.n, self.d, self.pitch = n, d, n + 2
        self.load = (n + 2 * d + 2.5, n + 2 * d + 6.5)
        self.formula = self.load[1] + 5
        self.write = (self.formula + 5, self.formula + 9)
        self.end = self.write[1] + 0.5 + max(n, d)


def _lane(axes: Any, step: Step, places: _Places, top: float) -> None:
    """One step: what it loads on the left, its formula, what it writes on the right."""
    n, d = places.n, places.d
    x, middle = 0.0, top - n / 2
    for name in step.loads:
        rows, columns = (d, n) if name == "K" else (n, n) if name in "SP" else (n, d)
        _grid(axes, x, top, rows, columns, SKY, "Kᵀ" if name == "K" else name)
        x += columns + 1
    _arrow(axes, *places.load, middle, f"load {sum(step.loads.values()):,}")
    axes.text(places.formula, middle, step.formula, ha="center", va="center", fontsize=11,
              bbox={"facecolor": "white", "edgecolor": "black", "boxstyle": "round,pad=0.5"})  # fmt: skip
    _arrow(axes, *places.write, middle, f"write {sum(step.writes.values()):,}")
    for name in step.writes:
        _grid(axes, places.write[1] + 0.5, top, n, n if name in "SP" else d, ORANGE, name)


def _arrow(axes: Any, begin: float, end: float, y: float, label: str) -> None:
    axes.annotate("", (end, y), (begin, y), arrowprops={"arrowstyle": "-|>", "linewidth": 2, "color": "black"})
    axes.text((begin + end) / 2, y + 0.5, label, ha="center", fontsize=12)


def _grid(axes: Any, left: float, top: float, rows: int, columns: int, color: str, name: str) -> None:
    from matplotlib.patches import Rectangle

    for row in range(rows):
        for column in range(columns):
            axes.add_patch(Rectangle((left + column, top - row - 1), 1, 1, facecolor=color, edgecolor="white"))
    axes.text(left + columns / 2, top + 0.3, f"{name}  {rows} x {columns}", ha="center", fontsize=10)


def attention_maps(maps: Mapping[str, Tensor], tokens: Sequence[str]) -> Picture:
    """Draw the probabilities of a few heads as heat maps, a row for each query.

    Args:
        maps: probabilities [s, t] by title.
        tokens: the text of each token.
    """
    figure = new_figure(WIDTH, 1.5 + WIDTH / len(maps))
    grid = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (title, p_st) in zip(grid, maps.items(), strict=True):
        image = axes.imshow(p_st.float().numpy(), vmin=0, vmax=1, cmap="Blues")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=9)
        axes.set_yticks(range(len(tokens)), tokens if axes is grid[0] else [""] * len(tokens), fontsize=9)
        axes.set_xlabel("is looked at")
    grid[0].set_ylabel("looks")
    figure.colorbar(image, ax=list(grid), location="bottom", shrink=0.5, label="weight")
    return Picture.of(figure)


def noise_curves(losses: Mapping[str, Sequence[float]], floor: float) -> Picture:
    """Draw losses of training on noise, with the value below which no honest model gets."""
    figure = new_figure(WIDTH, 4)
    axes = figure.subplots()
    for (name, curve), color, style in zip(losses.items(), PALETTE, ("-", "--", "-.", ":"), strict=False):
        axes.plot(range(1, len(curve) + 1), curve, style, color=color, label=f"{name}, ends at {curve[-1]:.3f}")
    axes.axhline(floor, color="black", linewidth=0.8)
    axes.text(len(curve), floor + 0.05, f"log of the vocabulary: {floor:.3f}", ha="right")
    axes.set(xlabel="step", ylabel="loss (nats)", title="Trained on random tokens", ylim=(-0.1, floor + 0.6))
    axes.legend(loc="center right")
    return Picture.of(figure)


def showdown_bars(costs: Sequence[Cost], where: str) -> Picture:
    """Draw the memory of each way to attend, here and in the book, and how much longer four times the tokens take.

    Args:
        costs: of `minift.study.showdown.showdown`, with times.
        where: this machine, in a word or two.
    """
    figure = new_figure(WIDTH, 7)
    sides = {where: (costs, BLUE, ""), "book, RTX 4090": (BOOK, ORANGE, "//")}
    short, long = (pick(cost.tokens for cost in BOOK) for pick in (min, max))
    panels: dict[str, tuple[str, Callable[[Cost, Cost], float]]] = {
        f"memory at {long:,} tokens (MB)": ("{:,.0f}", lambda one, four: four.bytes / MB),
        f"memory at {long:,} tokens / at {short}": ("{:.1f}", lambda one, four: four.bytes / one.bytes),
        f"time at {long:,} tokens / at {short}": ("{:.1f}", lambda one, four: four.seconds / one.seconds),
    }
    for axes, (title, (form, value)) in zip(figure.subplots(len(panels)), panels.items(), strict=True):
        for side, (label, (rows, color, hatch)) in enumerate(sides.items()):
            found = {(cost.attention, cost.tokens): cost for cost in rows}
            names = [name for name in ATTENTIONS if (name, long) in found]
            values = [value(found[name, short], found[name, long]) for name in names]
            places = [list(ATTENTIONS).index(name) + 0.4 * side - 0.2 for name in names]
            bars = axes.barh(places, values, 0.4, color=color, hatch=hatch, edgecolor="white", label=label)
            axes.bar_label(bars, [form.format(number) for number in values], padding=3)
        axes.set_yticks(range(len(ATTENTIONS)), list(ATTENTIONS))
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(title, loc="left", fontsize=12)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return Picture.of(figure)
