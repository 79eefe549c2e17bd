"""Pictures of adapters: the low-rank product, where each method sits, what is stored and lost, two claims tried out."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from minift.adapters.merge import MergeReport
from minift.adapters.report import AdapterReport
from minift.study.claims import Trial, best, gaps, mean_and_spread, means
from minift.study.lora import customer_storage
from minift.study.methods import MethodRow
from minift.study.picture import BLUE, GREEN, ORANGE, PALETTE, SKY, VERMILION, WIDTH, YELLOW, Picture, new_figure

LEAST = 1e-8  # smaller differences are rounding of fp32 alone
STYLES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))


def product_picture(a_ri: Tensor, b_or: Tensor) -> Picture:
    """Draw B, A and their product with all numbers: an entry is the row of B to its left times the column of A above.

    The idea of the book's figures lowrank_matrices, two_matrices and matmul. They draw empty cells, call the tall
    matrix A and the flat one B, and the product B@A; as PyTorch stores them (and as B@A can be computed) the tall one
    is B.

    Args:
        a_ri: [r, in], at most 12 columns.
        b_or: [out, r], at most 12 rows.

    Raises:
        ValueError: matrices that do not fit together, or too large to read.
    """
    (r, columns), rows = a_ri.shape, len(b_or)
    if b_or.shape[1] != r or max(rows, columns) > 12:
        raise ValueError(f"B {tuple(b_or.shape)} and A {tuple(a_ri.shape)}: at most [12, r] and [r, 12]")
    figure = new_figure(WIDTH, 0.6 + WIDTH * (rows + r + 2.5) / (columns + r + 6))
    axes = figure.subplots()
    place = r + 1  # of the product's first row and column
    _cells(axes, a_ri, place, 0, ORANGE)
    _cells(axes, b_or, 0, place, YELLOW)
    _cells(axes, b_or @ a_ri, place, place, SKY)
    right = place + columns + 0.4
    small = {"fontsize": 11, "va": "center"}
    axes.text(right, r / 2, f"A [{r}, {columns}]\ntrained: {a_ri.numel()}", **small)
    axes.text(right, place + rows / 2, f"B A [{rows}, {columns}]\nnever stored:\n{rows * columns}", **small)
    axes.text(
        r / 2, place + rows + 0.3, f"B [{rows}, {r}]\ntrained: {b_or.numel()}", fontsize=11, ha="center", va="top"
    )
    axes.set(xlim=(-1.2, right + 3.4), ylim=(place + rows + 1.7, -0.2), aspect="equal")
    axes.axis("off")
    return Picture.of(figure)


def _cells(axes: Any, matrix: Tensor, left: int, top: int, color: str) -> None:
    from matplotlib.patches import Rectangle

    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            axes.add_patch(Rectangle((left + column, top + row), 1, 1, facecolor=color, edgecolor="white", alpha=0.75))
            axes.text(left + column + 0.5, top + row + 0.5, f"{value:g}", ha="center", va="center", fontsize=10)


# The parts of a block in the order in which a token passes them: heading, and ends of the paths that belong to it.
PARTS: dict[str, tuple[str, ...]] = {
    "before the text": ("encoder",), "embedding": ("embed_tokens",), "norm": ("input_layernorm",), "q": ("q_proj",),
    "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj",), "behind attention": (),
    "norm ": ("post_attention_layernorm",), "gate": ("gate_proj",), "up": ("up_proj",), "down": ("down_proj",),
    "behind, beside MLP": (), "last norm": ("model.norm",), "head": ("lm_head",),
}  # fmt: skip


def parts_of(report: AdapterReport) -> dict[str, int]:
    """Trained parameters by the part of the decoder (PARTS) in which they sit."""
    found: dict[str, int] = {}
    for layer in report.matched:
        part = _part(layer.path, report.method)
        for name in ("k", "v") if part == "k, v" else (part,):
            found[name] = found.get(name, 0) + layer.trained // (2 if part == "k, v" else 1)
    return found


def _part(path: str, method: str) -> str:
    if ".encoder." in path:  # a prefix is keys and values of every block, a prompt a row of embeddings
        return "k, v" if method == "prefix-tuning" else "before the text"
    if ".adapter_" in path:
        return "behind attention" if "o_proj" in path else "behind, beside MLP"
    return next(part for part, ends in PARTS.items() if any(f"{end}." in f"{path}." for end in ends))


def method_places(reports: Mapping[str, AdapterReport]) -> Picture:
    """Draw the way of a token through a decoder, and for each method where its trained parameters sit, and how many."""
    figure = new_figure(WIDTH, 1.9 + 0.36 * len(reports))
    axes = figure.subplots()
    parts, last = list(PARTS), len(reports)
    for column, part in enumerate(parts):
        color = VERMILION if part in ("before the text", "behind attention", "behind, beside MLP") else BLUE
        axes.text(column, -0.75, part.strip(), rotation=60, ha="left", va="bottom", fontsize=10, color=color)
        axes.plot([column, column], [-0.6, last - 0.5], color="#dddddd", linewidth=1, zorder=0)
    axes.annotate("", (len(parts) - 0.3, -0.6), (-0.7, -0.6), arrowprops={"arrowstyle": "->", "color": "black"})
    for row, (name, report) in enumerate(reports.items()):
        counts = parts_of(report)
        places = [parts.index(part) for part in counts]
        new = [places[n] for n, part in enumerate(counts) if _is_new(part, report.method)]
        axes.plot(new, [row] * len(new), "s", color=ORANGE, markersize=11, markeredgecolor="black")
        own = [place for place in places if place not in new]
        axes.plot(own, [row] * len(own), "o", color=BLUE, markersize=9)
        axes.text(-0.7, row, name, ha="right", va="center", fontsize=10)
        axes.text(len(parts) - 0.3, row, f"{report.trained:,}", ha="left", va="center", fontsize=10)
    axes.plot([], [], "s", color=ORANGE, markeredgecolor="black", markersize=10, label="new parameters")
    axes.plot([], [], "o", color=BLUE, markersize=9, label="the model's own")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, frameon=False)
    axes.set(xlim=(-4.2, len(parts) + 2.6), ylim=(last + 0.3, -4.4))
    axes.axis("off")
    return Picture.of(figure)


def _is_new(part: str, method: str) -> bool:
    return method not in ("norms", "full") or part.startswith(("before", "behind"))


def method_bars(rows: Sequence[MethodRow], seconds: bool = False) -> Picture:
    """Draw trained parameters, memory and loss of each method; with `seconds`, which depend on the machine, those too.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("nothing to draw: no method was compared")
    panels = [
        ("trained parameters", [row.trained for row in rows], BLUE, "{:,}"),
        ("peak of a step (MB)", [row.peak / 1e6 for row in rows], ORANGE, "{:,.4g}"),
        ("loss after (line: before)", [row.loss_after for row in rows], VERMILION, "{:.3g}"),
    ]
    if seconds:
        panels.insert(2, ("seconds a step", [row.seconds for row in rows], GREEN, "{:.3g}"))
    figure = new_figure(WIDTH * len(panels) / 3, 1.0 + 0.34 * len(rows))
    for axes, (title, values, color, form) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        bars = axes.barh([row.method for row in rows], values, color=color)
        if title.startswith("loss"):
            axes.axvline(rows[0].loss_before, color="black", linestyle="--")
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # bars may end near the line
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9, bbox=behind)
        axes.set_title(title, fontsize=11)
        axes.set_xlim(0, max(values) * 1.6)  # room for the labels
        if title.startswith("trained"):
            axes.set_xscale("log")
            axes.set_xlim(min(values) / 10, max(values) * 1e4)
            axes.set_xticks([])
        if title.startswith("loss"):
            axes.set_xlim(0, max(rows[0].loss_before, *values) * 1.3)
    axes.invert_yaxis()
    return Picture.of(figure)


def storage_lines(customers: Sequence[int] = (1, 3, 10, 30, 100, 300, 1000)) -> Picture:
    """Draw the parameters of one 4096 x 4096 matrix for many customers: a copy each, or an adapter of rank 8 each."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    stores = [customer_storage(n) for n in customers]
    copies, shared = [store.copies for store in stores], [store.shared for store in stores]
    axes.loglog(customers, copies, "s--", color=ORANGE, label="a fine-tuned copy for each")
    axes.loglog(customers, shared, "o-", color=BLUE, label="one matrix, an adapter for each")
    axes.axhline(stores[0].full, color="black", linewidth=0.8, linestyle=":", label="the matrix alone")
    hundred = customer_storage(100)
    for value in (hundred.copies, hundred.shared):
        axes.annotate(f"{value / 1e6:,.1f} million", (100, value), (-6, 8), textcoords="offset points", ha="right")
    axes.set(xlabel="customers", ylabel="parameters to store")
    axes.grid(alpha=0.3)
    axes.legend()
    return Picture.of(figure)


def drift_bars(merges: Mapping[str, MergeReport]) -> Picture:
    """Draw what merging did to the weights (relative rounding) and to the logits (KL divergence), on logarithmic axes.

    Raises:
        ValueError: a merge whose drift was not measured.
    """
    if any(report.drift is None for report in merges.values()):
        raise ValueError("a merge without drift: give merge_lora some token_ids")
    figure = new_figure(WIDTH, 1.2 + 0.45 * len(merges))
    panels = {
        "rounding of the weights": [report.rounding for report in merges.values()],
        "KL divergence of what is said (nats)": [abs(report.drift.kl) for report in merges.values() if report.drift],
    }
    for axes, (title, values) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        bars = axes.barh(
            list(merges), [max(value, LEAST) for value in values], color=SKY, edgecolor="black", hatch="//"
        )
        labels = [f"{value:.1e}" if value >= LEAST else f"below {LEAST:g}" for value in values]
        axes.bar_label(bars, labels, padding=3, fontsize=10)
        axes.set_xscale("log")
        axes.set_xlim(LEAST / 2, max(*values, 1e-5) * 1000)
        axes.set_title(title, fontsize=11)
    axes.invert_yaxis()
    return Picture.of(figure)


def rate_curves(trials: Sequence[Trial]) -> Picture:
    """Draw the excess loss over the learning rate, a panel for each batch size: seeds as dots, their mean as a line."""
    sizes, methods = sorted({t.batch_size for t in trials}), list(dict.fromkeys(t.method for t in trials))
    figure = new_figure(WIDTH, 3.6)
    every = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    rows = means(trials)
    top = 1.15 * max(min(row.values()) for row in rows.values()) + 0.3  # diverged runs leave the picture
    for axes, size in zip(every, sizes, strict=True):
        for method, color, (marker, line) in zip(methods, PALETTE, STYLES, strict=False):
            row = rows[method, size]
            axes.semilogx(list(row), list(row.values()), line, color=color, label=method)
            own = [t for t in trials if (t.method, t.batch_size) == (method, size)]
            axes.plot([t.lr for t in own], [t.excess for t in own], marker, color=color, markersize=4, alpha=0.6)
            lowest = min(row, key=row.__getitem__)
            axes.plot([lowest], [row[lowest]], marker, markersize=11, markerfacecolor="none", markeredgecolor="black")
        axes.set_title(f"batches of {size}", fontsize=11)
        axes.grid(alpha=0.3)
        axes.set_ylim(0, top)
    rates = sorted({t.lr for t in trials})
    every[0].set_xticks(rates[::3], [f"{lr:g}" for lr in rates[::3]])
    every[0].minorticks_off()
    every[0].set_ylabel("excess loss (nats)")
    every[len(sizes) // 2].set_xlabel("learning rate")
    every[-1].legend(loc="lower left")
    return Picture.of(figure)


def batch_gap(trials: Sequence[Trial], one: str = "lora", other: str = "full") -> Picture:
    """Draw the excess loss at each one's best rate over the batch size, and the difference of the two."""
    sizes, seeds = sorted({t.batch_size for t in trials}), sorted({t.seed for t in trials})
    figure = new_figure(WIDTH, 3.6)
    left, right = figure.subplots(1, 2)
    for method, color, (marker, line) in zip((one, other), PALETTE, STYLES, strict=False):
        lowest = [[best(trials, method, size, seed).excess for seed in seeds] for size in sizes]
        left.loglog(sizes, [sum(row) / len(row) for row in lowest], line, color=color, label=method)
        for size, row in zip(sizes, lowest, strict=True):
            left.plot([size] * len(row), row, marker, color=color, markersize=5, alpha=0.6)
    left.set(xlabel="batch size", ylabel="excess loss, best rate (nats)")
    left.set_yticks([0.1, 0.2, 0.4], ["0.1", "0.2", "0.4"])
    left.legend()
    found = [mean_and_spread(gaps(trials, size, one, other)) for size in sizes]
    right.errorbar(
        sizes, [m for m, _ in found], [2 * error for _, error in found], fmt="o-", color=VERMILION, capsize=4
    )
    right.set(xlabel="batch size", ylabel=f"{one} minus {other} (nats)", xscale="log", title="bars: 2 standard errors")
    right.set_ylim(0, None)
    for axes in (left, right):
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    return Picture.of(figure)
