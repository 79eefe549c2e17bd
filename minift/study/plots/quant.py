"""Pictures of quantized tensors: bins and codebooks, what they cost, outliers, and which dtype flows where."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from minift.numerics.affine import histogram_quantize_book
from minift.study.dtype_flow import Flow
from minift.study.fourbit import code_shares
from minift.study.picture import BLUE, GREY, PALETTE, VERMILION, WIDTH, Picture, new_figure

STYLES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D")


def histogram_bins(x: Tensor, bits: int = 2) -> Picture:
    """Draw a histogram of values, the edges of 2^bits bins, and what a bin becomes by its left edge and by its middle.

    Args:
        x: floating point, the weights.
        bits: at most 4, else nothing can be read.
    """
    book = histogram_quantize_book(x, bits)
    first, width = float(book.first), float(book.width)
    figure = new_figure(WIDTH, 3.6)
    axes = figure.subplots()
    axes.hist(x.numpy(), bins=60, color=GREY, alpha=0.6)
    top = axes.get_ylim()[1]
    for edge in range(2**bits + 1):
        axes.axvline(first + edge * width, color="black", linewidth=1)
    for code in range(2**bits):
        left = first + code * width
        axes.text(left + width / 2, 0.97 * top, f"code {code}", ha="center", va="top", fontsize=9)
        axes.plot(left, -0.05 * top, "<", color=VERMILION, clip_on=False, label="left edge (book)" * (not code))
        axes.plot(left + width / 2, -0.05 * top, "o", color=BLUE, clip_on=False, label="middle" * (not code))
    axes.set(xlabel="weight", ylabel="number of weights", ylim=(-0.1 * top, top))
    figure.legend(loc="outside upper center", ncols=2, title="a code comes back as", fontsize=9)
    return Picture.of(figure)


def weight_ranges(weights: Mapping[str, Tensor]) -> Picture:
    """Draw for each weight its range from smallest to largest, and the range that holds 99 % of its values."""
    figure = new_figure(WIDTH, 1.1 + 0.28 * len(weights))
    axes = figure.subplots()
    for row, weight in enumerate(weights.values()):
        flat = weight.detach().float().flatten()
        low, high = (float(flat.kthvalue(max(1, round(q * len(flat)))).values) for q in (0.005, 0.995))
        axes.plot([float(flat.min()), float(flat.max())], [row, row], color=GREY, linewidth=2, marker="|", markersize=9,
                  label="all values" * (not row))  # fmt: skip
        axes.plot([low, high], [row, row], color=BLUE, linewidth=7, solid_capstyle="butt", label="99 %" * (not row))
    axes.set_yticks(range(len(weights)), list(weights), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="weight")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    return Picture.of(figure)


def codebook_lines(codes: Mapping[str, Tensor]) -> Picture:
    """Draw the entries of codebooks, a line each, and the middles between them, where the next code begins.

    The book's figures nf4_bins and fp4_bins, on one scale.
    """
    figure = new_figure(WIDTH, 0.9 + 0.75 * len(codes))
    axes = figure.subplots()
    for row, (code, color, mark) in enumerate(zip(codes.values(), PALETTE, MARKS, strict=False)):
        entries = code.unique()
        axes.hlines(row, -1, 1, color=GREY, linewidth=0.8)
        axes.plot((entries[:-1] + entries[1:]) / 2, [row] * (len(entries) - 1), "|", color=GREY, markersize=16)
        axes.plot(entries, [row] * len(entries), mark, color=color, markersize=7)
        axes.text(1.04, row, f"{len(entries)} values", va="center", fontsize=9)
    axes.set_yticks(range(len(codes)), list(codes))
    axes.set(xlim=(-1.05, 1.28), ylim=(len(codes) - 0.5, -0.5), xlabel="value / largest magnitude of its block")
    return Picture.of(figure)


def code_use(weight: Tensor, codes: Mapping[str, Tensor], blocksize: int = 64) -> Picture:
    """Draw which share of a weight's values gets each entry of each codebook; an equal share is a line."""
    figure = new_figure(WIDTH, 1.6 * len(codes) + 0.5)
    places: Any = figure.subplots(len(codes), sharex=True, sharey=True, squeeze=False)
    for (name, code), axes, color in zip(codes.items(), places.flat, PALETTE, strict=False):
        shares = code_shares(weight, code, blocksize)
        bars = axes.bar(range(len(code)), [100 * share for share in shares], color=color)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # the line may cross a label
        axes.bar_label(bars, [f"{entry:.2g}" for entry in code.tolist()], fontsize=7, padding=2, bbox=behind)
        axes.axhline(100 / len(code), color="black", linestyle="--", linewidth=0.8)
        axes.set(ylabel="% of weights")
        axes.set_title(f"{name}: {len(code)} entries, above each bar its value", fontsize=10, loc="left")
    axes = places.flat[-1]
    axes.margins(y=0.18)
    axes.set_xticks(range(0, 16, 2))
    axes.set(xlabel="entry, in order of value")
    return Picture.of(figure)


def error_curves(errors: Mapping[str, Sequence[float]], blocksizes: Sequence[int], what: str = "") -> Picture:
    """Draw relative errors over the block size, a line for each codebook (`errors_by_blocksize`)."""
    figure = new_figure(7, 3.8)
    axes = figure.subplots()
    for (name, values), color, style, mark in zip(errors.items(), PALETTE, STYLES, MARKS, strict=False):
        axes.plot(blocksizes, [100 * v for v in values], color=color, linestyle=style, marker=mark, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(blocksizes), [str(size) for size in blocksizes])
    axes.set(xlabel="weights that share a scale", ylabel="relative error (%)", ylim=(0, None), title=what)
    axes.grid(alpha=0.3)
    axes.legend()
    return Picture.of(figure)


def dynamic_steps(codes: Mapping[str, Tensor]) -> Picture:
    """Draw the distance of neighbouring entries over their magnitude, for 8-bit maps (positive entries only)."""
    figure = new_figure(7, 3.4)
    axes = figure.subplots()
    for (name, code), color, style in zip(codes.items(), PALETTE, ("-", "--", ":"), strict=False):
        entries = code[code > 0]
        axes.step(entries[:-1], entries.diff(), where="post", color=color, linestyle=style, linewidth=2, label=name)
    axes.set(xscale="log", yscale="log", xlabel="value / largest magnitude of its block", ylabel="distance to the next")
    axes.grid(alpha=0.3)
    axes.legend()
    return Picture.of(figure)


def column_magnitudes(x_ni: Tensor, threshold: float = 6.0, title: str = "") -> Picture:
    """Draw the largest magnitude of each column of a layer's input; outlier columns are marked and counted."""
    figure = new_figure(WIDTH, 3.2)
    axes = figure.subplots()
    magnitude_i = x_ni.detach().float().abs().amax(0).cpu()
    places, magnitude_i = np.arange(len(magnitude_i)), magnitude_i.numpy()
    outlier = magnitude_i >= threshold
    axes.bar(places[~outlier], magnitude_i[~outlier], color=BLUE, width=1.0)
    axes.plot(places[outlier], magnitude_i[outlier], "D", color=VERMILION, markersize=5,
              label=f"{int(outlier.sum())} of {len(outlier)} columns reach {threshold:g}")  # fmt: skip
    axes.vlines(places[outlier], 0, magnitude_i[outlier], color=VERMILION)
    axes.axhline(threshold, color="black", linestyle="--", linewidth=0.8)
    axes.set(xlabel="column (input feature)", ylabel="largest |x|", title=title, xlim=(-5, len(outlier) + 4))
    axes.legend()
    return Picture.of(figure)


def type_flow(flows: Sequence[Flow], title: str = "") -> Picture:
    """Draw a forward pass from top to bottom: what comes in, what is cast, what is multiplied, what goes out.

    The book's figures type_flow_regular and type_flow_qt, from the trace of a real pass instead of a plan.

    Args:
        flows: what `minift.study.dtype_flow.trace_dtypes` returned, or some of it.
    """
    figure = new_figure(WIDTH, 1.0 + 0.5 * len(flows))
    axes = figure.subplots()
    columns = {"weight stored as": 3.1, "casts inside": 5.0, "multiplied": 7.45, "goes out": 9.6}
    for name, x in columns.items():
        axes.text(x, -0.85, name, fontsize=9, weight="bold", va="center")
    axes.text(0, -0.85, "module", fontsize=9, weight="bold", va="center")
    for row, flow in enumerate(flows):
        axes.text(0, row, _short_path(flow.path), fontsize=9, va="center")
        cells = (flow.stored, "\n".join(flow.casts), "\n".join(flow.products), flow.left)
        for (name, x), text in zip(columns.items(), cells, strict=True):
            color = _shade(name, text)
            if text:
                box = {"facecolor": color, "edgecolor": "black", "linewidth": 0.6, "boxstyle": "round,pad=0.25"}
                axes.text(x, row, text, fontsize=8, va="center", family="monospace", bbox=box, linespacing=1.1)
        if row:
            axes.annotate("", (10.75, row - 0.2), (10.75, row - 0.8), arrowprops={"arrowstyle": "->", "color": "black"})
    axes.set(xlim=(-0.1, 11), ylim=(len(flows) - 0.4, -1.2))
    axes.set_title(title, fontsize=11)
    axes.axis("off")
    return Picture.of(figure)


def _short_path(path: str) -> str:
    """The last two names; enough to tell the modules of one block apart."""
    names = [name for name in path.split(".") if name not in ("model", "layers")]
    return ".".join(names[-2:]).removeprefix("0.") or "(the model)"


def _shade(column: str, text: str) -> str:
    """Light enough for black text: yellow for casts, pink where there are codes, blue for floating point."""
    if column == "casts inside":
        return "#FFF3D6"
    return "#F6DCE9" if any(code in text for code in ("nf4", "fp4", "int8")) else "#D6ECFA"
