"""Pictures of how one number is stored: its fields, the distance to the next one, the size of many."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minift.numerics.floats import FORMATS, INTEGERS, FloatFormat, bits
from minift.study.picture import BLUE, GREY, ORANGE, PALETTE, SKY, VERMILION, WIDTH, Picture, new_figure

FIELDS = {"sign": VERMILION, "exponent": ORANGE, "fraction": SKY}
PITCH = 2.0  # from row to row, in heights of a square
SIZES = {"fp32": 32, "bf16, fp16": 16, "int8": 8, "NF4, FP4": 4}  # bits of one parameter


def number_fields(x: float, types: Sequence[str] = ("float32", "bfloat16", "float16", "float8_e4m3fn")) -> Picture:
    """Draw the bits of one number in several types, a square each, and what is stored.

    The idea of two figures of the book (type_sizes, types_comparison), with the bits of a number in the squares.

    Args:
        x: what is stored, rounded to each type.
        types: names of `minift.numerics.FORMATS`, "int8" or "uint8".
    """
    figure = new_figure(WIDTH, 0.2 + 0.95 * len(types))
    axes = figure.subplots()
    for number, name in enumerate(types):
        stored, row = bits(x, name), PITCH * number
        column = 0
        fields = {"sign": stored.sign, "exponent": stored.exponent, "fraction": stored.fraction}
        for field, text in fields.items():
            if text:
                _box_row(axes, column, row, text, FIELDS[field])
                label = "integer" if name in INTEGERS and field == "fraction" else field
                label = f"{label}, {len(text)}" if len(text) > 3 else {"sign": "s"}.get(field, str(len(text)))
                axes.text(column + len(text) / 2, row + 0.46, label, ha="center", va="top", fontsize=8)
            column += len(text)
        title = f"{name}: {stored.value:.10g}"
        axes.text(0, row - 0.45, title, va="bottom", fontsize=10, weight="bold", family="monospace")
    axes.set(xlim=(-0.2, 32.2), ylim=(PITCH * (len(types) - 1) + 1.0, -1.1))
    axes.axis("off")
    return Picture.of(figure)


def _box_row(axes: Any, left: int, row: float, text: str, color: str) -> None:
    from matplotlib.patches import Rectangle

    for place, digit in enumerate(text):
        axes.add_patch(
            Rectangle((left + place, row - 0.38), 1, 0.76, facecolor=color, edgecolor="white", linewidth=1.5)
        )
        axes.text(left + place + 0.5, row, digit, ha="center", va="center", fontsize=10, family="monospace")


def spacings(types: Sequence[str] = tuple(FORMATS)) -> Picture:
    """Draw the distance of neighbouring numbers over their magnitude: where a type begins, is flat, and ends."""
    figure = new_figure(WIDTH, 4.2)
    axes = figure.subplots()
    styles = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
    for name, color, style in zip(types, PALETTE, styles, strict=False):
        x, gap = steps_of(FORMATS[name])
        axes.step(x, gap, where="post", color=color, linestyle=style, linewidth=2, label=name)
        axes.plot(x[-1], gap[-1], marker="|", markersize=14, markeredgewidth=2, color=color)  # the largest number
    axes.set(xscale="log", yscale="log", xlim=(1e-9, 1e9), ylim=(1e-17, 1e9),
             xlabel="magnitude of the number", ylabel="distance to the next number")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(title="a bar ends a type", fontsize=9)
    return Picture.of(figure)


def steps_of(fmt: FloatFormat) -> tuple[np.ndarray, np.ndarray]:
    """Where the distance of neighbours changes, fp64 [k], and what it is from there on; the last is the largest number.

    It is flat below the smallest normal number, and doubles at each power of two above.
    """
    lowest, highest = 1 - fmt.bias, int(np.floor(np.log2(fmt.max)))
    powers = np.arange(lowest + 1, highest + 1)
    x = np.concatenate([[fmt.smallest_subnormal], 2.0**powers, [fmt.max]])
    gap = np.concatenate([[fmt.smallest_subnormal], 2.0 ** (powers - fmt.fraction_bits)])
    return x, np.append(gap, gap[-1])


def model_sizes(parameters: int = 360_000_000, square: int = 10) -> Picture:
    """Draw the megabytes of a model's parameters in each type, one square for every `square` MB.

    The book's figure 2.2 is the one of 360 million parameters; scales of quantized blocks are left out, as there.
    """
    from matplotlib.patches import Rectangle

    megabytes = {name: parameters * size / 8 / 1e6 for name, size in SIZES.items()}
    rows = max(1, round(float(np.sqrt(megabytes["fp32"] / square))))
    figure = new_figure(WIDTH, 3.6)
    axes = figure.subplots()
    left, hatches = 0.0, ("", "//", "..", "xx")
    for (name, size), color, hatch in zip(megabytes.items(), (BLUE, SKY, ORANGE, GREY), hatches, strict=True):
        squares = round(size / square)
        for number in range(squares):
            place = (left + number // rows, number % rows)
            axes.add_patch(Rectangle(place, 1, 1, facecolor=color, edgecolor="white", hatch=hatch))
        width = -(-squares // rows)
        axes.text(left + width / 2, -0.6, f"{name}\n{size:,.0f} MB", ha="center", va="top", fontsize=11)
        left += max(width, 4) + 2.5
    axes.set(xlim=(-1, left - 1), ylim=(-3.4, rows + 0.5), aspect="equal")
    axes.set_title(f"{parameters / 1e6:,.0f} million parameters; one square is {square} MB", fontsize=11)
    axes.axis("off")
    return Picture.of(figure)
