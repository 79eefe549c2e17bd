"""Pictures of one forward and one backward pass through the smallest network (minift/study/network.py)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minift.study.network import NetworkPass
from minift.study.picture import BLUE, GREEN, ORANGE, VERMILION, WIDTH, Picture, new_figure

# Where things stand: columns of numbers, of which the second token's stands to the right, and the nodes of the layers.
NUMBERS, NODES, LOSS = (0.0, 4.1, 8.2, 11.9), (2.5, 6.6, 10.3), 14.0
CELL, HEIGHT = 0.72, 0.62
NAMES = ("inputs", "activations 1", "activations 2", "predictions")


def forward_pass(run: NetworkPass) -> Picture:
    """Draw the forward pass with its numbers.

    After a figure by dvgodoy (CC BY 4.0), chapter 5, of the same net. Here the numbers are those of a real run: cells
    show activations, lines are weights, thick if large and dashed if negative.
    """
    figure, axes = _canvas(f"Forward: {run.kept} activations are kept for the backward pass")
    for number, weight in enumerate(run.weights):
        _lines(axes, number, weight, BLUE, backward=False)
        _name(axes, number, f"{weight.numel()} weights", f"linear {number + 1}\n{tuple(weight.shape)}")
    for number, values in enumerate(run.activations):
        kept = number < len(run.weights)
        _cells(axes, NUMBERS[number], values, ORANGE if number == 0 else GREEN)
        _label(axes, NUMBERS[number], f"{NAMES[number]}\n{tuple(values.shape)}" + ("\nkept" if kept else ""))
    _loss(axes, run, "-|>")
    return Picture.of(figure)


def backward_pass(run: NetworkPass) -> Picture:
    """Draw the backward pass with its numbers.

    After a figure by dvgodoy (CC BY 4.0), chapter 5. Cells show gradients of activations, lines gradients of weights.
    Different from there: nothing flows into the inputs, because nobody asks for their gradient.
    """
    count = sum(grad.numel() for grad in run.weight_grads)
    figure, axes = _canvas(f"Backward: {count} gradients of weights stay for the update")
    for number, grad in enumerate(run.weight_grads):
        _lines(axes, number, grad, VERMILION, backward=True)
        _name(axes, number, f"{grad.numel()} gradients", f"linear {number + 1}\n{tuple(grad.shape)}")
    for number, values in enumerate(run.activation_grads):
        if values is None:
            _cells(axes, NUMBERS[number], run.activations[number], "#DDDDDD", blank=True)
            _label(axes, NUMBERS[number], f"{NAMES[number]}\nno gradient")
        else:
            _cells(axes, NUMBERS[number], values, GREEN)
            _label(axes, NUMBERS[number], f"gradients of\n{NAMES[number]}\n{tuple(values.shape)}")
    _loss(axes, run, "<|-")
    return Picture.of(figure)


def _canvas(title: str) -> tuple[Any, Any]:
    figure = new_figure(WIDTH, 3.8)
    axes = figure.subplots()
    axes.set(xlim=(-0.9, LOSS + 1.2), ylim=(-3.0, 1.9))
    axes.set_title(title, loc="left")
    axes.axis("off")
    return figure, axes


def _rows(count: int) -> list[float]:
    """Heights of so many things under each other, around 0."""
    return [0.8 * ((count - 1) / 2 - number) for number in range(count)]


def _cells(axes: Any, left: float, values: Tensor, color: str, blank: bool = False) -> None:
    """The numbers [1, token, width]: a column of cells for each token."""
    from matplotlib.patches import FancyBboxPatch

    for token, column in enumerate(values[0].tolist()):
        for y, value in zip(_rows(len(column)), column, strict=True):
            corner = left - CELL + token * (CELL + 0.06), y - HEIGHT / 2
            axes.add_patch(
                FancyBboxPatch(
                    corner, CELL, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", facecolor=f"{color}44",
                    edgecolor=color,
                )
            )  # fmt: skip
            text = "" if blank else f"{value:.2f}"
            axes.text(corner[0] + CELL / 2, y, text, ha="center", va="center", fontsize=8)


def _lines(axes: Any, layer: int, numbers: Tensor, color: str, backward: bool) -> None:
    """A line for each number (out, in) from the cells before the layer to its nodes, and arrows to the cells behind."""
    out, width = numbers.shape
    largest = float(numbers.abs().max())
    start, node, behind = NUMBERS[layer] + CELL + 0.06, NODES[layer], NUMBERS[layer + 1] - CELL
    for y_node, row in zip(_rows(out), numbers.tolist(), strict=True):
        for y, number in zip(_rows(width), row, strict=True):
            strong = abs(number) / largest
            axes.plot(
                [start, node], [y, y_node], "-" if number >= 0 else "--", color=color, linewidth=0.3 + 2.2 * strong,
                alpha=0.75, zorder=0,
            )  # fmt: skip
        axes.plot(node, y_node, "o", markersize=13, color="white", markeredgecolor="black", zorder=2)
        arrow = {"arrowstyle": "<|-" if backward else "-|>", "color": "black", "linewidth": 0.8}
        axes.annotate("", (behind, y_node), (node + 0.3, y_node), arrowprops=arrow)


def _loss(axes: Any, run: NetworkPass, arrow: str) -> None:
    axes.annotate("", (LOSS - 0.75, 0), (NUMBERS[-1] + CELL + 0.1, 0), arrowprops={"arrowstyle": arrow})
    box = {"boxstyle": "round,pad=0.4", "facecolor": f"{VERMILION}44", "edgecolor": VERMILION}
    axes.text(LOSS, 0, f"{run.loss:.2f}", ha="center", va="center", fontsize=9, bbox=box)
    targets = _listed(run.target[0, :, 0].tolist())
    _label(axes, LOSS, f"loss\ntargets\n{targets}")


def _name(axes: Any, layer: int, above: str, below: str) -> None:
    """What is written above the lines of a layer, and below its nodes."""
    middle = (NUMBERS[layer] + CELL + NODES[layer]) / 2
    axes.text(middle, 1.6, above, ha="center", va="bottom", fontsize=8)
    _label(axes, NODES[layer], below)


def _label(axes: Any, x: float, text: str) -> None:
    axes.text(x, -1.75, text, ha="center", va="top", fontsize=8)


def _listed(numbers: Sequence[float]) -> str:
    return "\n".join(f"{number:.2f}" for number in numbers)
