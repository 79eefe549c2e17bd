"""Pictures of layouts: which one to choose, how much of each is of use, what neighbours do to a document."""

from collections.abc import Sequence
from typing import Any

from minift.study.contamination import Contamination
from minift.study.layouts import LayoutRow, Layouts
from minift.study.picture import BLUE, GREEN, ORANGE, PALETTE, WIDTH, Picture, new_figure


def layout_bars(layouts: Layouts) -> Picture:
    """Draw the places of each layout: those that hold a token, and those that are computed for nothing."""
    figure = new_figure(WIDTH, 3.6)
    axes = figure.subplots()
    names = [row.name for row in layouts.rows]
    tokens, wasted = [row.tokens for row in layouts.rows], [row.places - row.tokens for row in layouts.rows]
    axes.barh(names, tokens, color=BLUE, label="tokens")
    axes.barh(names, wasted, left=tokens, color="white", edgecolor=ORANGE, hatch="//", label="padding")
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.9}  # the dotted line may be there
    for number, row in enumerate(layouts.rows):
        said = f"{row.useful:.1%} useful" + (f", {row.cut:,} cut" if row.cut else "")
        said += f", {row.dropped:,} tokens lost" if row.dropped else ""
        axes.annotate(
            said, (row.places, number), (8, 0), textcoords="offset points", va="center", fontsize=9, bbox=behind
        )
    axes.axvline(layouts.tokens, color="black", linestyle=":", label="tokens of the data", zorder=0)
    axes.set(xlabel="places in all rows", title=f"{layouts.documents:,} documents, rows of at most {layouts.length}")
    axes.set_xlim(0, max(row.places for row in layouts.rows) * 1.75)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3)
    return Picture.of(figure)


def contamination_bars(study: Contamination) -> Picture:
    """Draw the loss of each document, for each way of packing."""
    figure = new_figure(WIDTH, 4)
    axes = figure.subplots()
    width = 0.8 / len(study.losses)
    hatches = ("", "..", "//", "xx", "\\\\")
    for number, ((way, losses), hatch) in enumerate(zip(study.losses.items(), hatches, strict=True)):
        places = [document + (number - 2) * width for document in range(len(losses))]
        label = f"{way}: mean {study.mean(way):.2f}"
        axes.bar(places, losses, width, color=PALETTE[number], hatch=hatch, edgecolor="white", label=label)
    axes.set(xlabel="document in the row", ylabel="loss a trained token (nats)", xticks=range(len(study.trained)))
    figure.legend(loc="outside lower center", ncols=3)
    return Picture.of(figure)


def packing_flow(layouts: Layouts) -> Picture:
    """Draw how to choose among minift's layouts, with what each would do to these documents.

    After a figure by dvgodoy (CC BY 4.0), chapter 4, which asks three questions: completions only? Flash Attention 2? a
    supported model? None of them is asked here. Which tokens are trained is decided before (encode), and the mask is
    made of document numbers for every attention and every model. What is left to ask are facts of the data.
    """
    figure = new_figure(WIDTH, 6.6)
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0.2, 9.6))
    axes.axis("off")
    questions = (
        (8.6, "Do lengths differ much?"),
        (6.7, "Must each step hold just\nbatch_size documents?"),
        (4.8, "May the ends of long\ndocuments be dropped?"),
        (2.9, "May short documents\nbe torn, too?"),
    )
    answers = (
        ("no", 'packing="none"', (layouts["padded to the batch"],)),
        ("yes", 'packing="none"\ngroup_by_length=True', (layouts["similar lengths"],)),
        ("yes", 'packing="bfd"', (layouts["bfd"],)),
        ("no", 'packing="bfd_split"', (layouts["bfd_split"],)),
    )
    for number, ((y, question), (answer, setting, rows)) in enumerate(zip(questions, answers, strict=True)):
        _question(axes, y, question)
        _arrow(axes, (3.4, y), (5.0, y), answer)
        _leaf(axes, y, setting, rows, GREEN if "bfd" in setting else ORANGE)
        below = questions[number + 1][0] if number + 1 < len(questions) else 1.0
        _arrow(axes, (2.1, y - 0.45), (2.1, below + 0.48), "no" if answer == "yes" else "yes")
    _leaf(axes, 1.0, 'packing="wrapped"', (layouts["wrapped"],), GREEN, left=0.6)
    axes.text(5.15, 1.0, "trained tokens: loss_on, in every layout\nmask: from document numbers, in every\n"
              "attention and every model", va="center", fontsize=8.5)  # fmt: skip
    title = f"{layouts.documents:,} documents of {layouts.tokens:,} tokens, rows of {layouts.length}"
    axes.set_title(f"Which layout? In the boxes: what it does to\n{title}", fontsize=11)
    return Picture.of(figure)


def _question(axes: Any, y: float, text: str) -> None:
    box = {"boxstyle": "round,pad=0.5,rounding_size=0.9", "facecolor": f"{BLUE}22", "edgecolor": BLUE}
    axes.text(2.1, y, text, ha="center", va="center", fontsize=9.5, bbox=box)


def _leaf(axes: Any, y: float, setting: str, rows: Sequence[LayoutRow], color: str, left: float = 5.05) -> None:
    lines = [setting]
    for row in rows:
        lines.append(f"{row.rows:,} rows, {row.useful:.1%} useful")
        lines.append(f"{row.cut:,} cut, {row.dropped:,} tokens lost")
    axes.text(left + 0.1, y, "\n".join(lines), ha="left", va="center", fontsize=9.5, family="monospace",
              bbox={"boxstyle": "square,pad=0.4", "facecolor": f"{color}33", "edgecolor": color})  # fmt: skip


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black"})
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(*middle, text, ha="center", va="center", fontsize=9.5, bbox={"facecolor": "white", "edgecolor": "none",
              "pad": 1})  # fmt: skip
