"""Pictures of tokens: which comes next, what each costs, and which label belongs to which logits."""

from collections.abc import Mapping, Sequence

from minift.study.next_token import Cost, Guess
from minift.study.picture import BLUE, ORANGE, PALETTE, WIDTH, Picture, new_figure

HATCHES = ("", "//", "..", "xx", "\\\\")
IGNORED, DIM = "-100", "#666666"


def next_token_bars(guesses: Mapping[str, Sequence[Guess]]) -> Picture:
    """Draw the likeliest next tokens of several texts, a panel for each.

    The idea of the book's first figures of chapter 4 (a base model goes on, a template makes it answer), with a real
    model's probabilities.
    """
    if not guesses:
        raise ValueError("nothing to draw: no texts")
    longest = max(map(len, guesses.values()))
    figure = new_figure(WIDTH, 1 + 0.36 * longest)
    panels = figure.subplots(1, len(guesses), squeeze=False)[0]
    for axes, (name, found), color in zip(panels, guesses.items(), PALETTE, strict=False):
        bars = axes.barh([guess.text for guess in found], [guess.probability for guess in found], color=color)
        axes.bar_label(bars, [f"{guess.probability:.2f}" for guess in found], padding=3)
        axes.set(title=name, xlim=(0, 1.2), xticks=[0, 0.5, 1], xlabel="probability of the next token")
        axes.invert_yaxis()
    return Picture.of(figure)


def cost_bars(costs: Mapping[str, Sequence[Cost]]) -> Picture:
    """Draw what each token of the same answer costs in different surroundings, bars side by side.

    Raises:
        ValueError: nothing to draw, or answers of different lengths.
    """
    sizes = {len(found) for found in costs.values()}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"the answers must have the same number of tokens, and at least one; got {sorted(sizes)}")
    (size,) = sizes
    figure = new_figure(WIDTH, 3.6)
    axes = figure.subplots()
    width = 0.8 / len(costs)
    for number, (name, found) in enumerate(costs.items()):
        places = [place - 0.4 + width * (number + 0.5) for place in range(size)]
        mean = sum(cost.nats for cost in found) / size
        axes.bar(places, [cost.nats for cost in found], width, color=PALETTE[number], hatch=HATCHES[number % 5],
                 edgecolor="white", label=f"{name} (mean {mean:.2f})")  # fmt: skip
    names = [cost.text for cost in next(iter(costs.values()))]
    axes.set_xticks(range(size), names, rotation=30, ha="right")
    axes.set(ylabel="-log p of the token (nats)")
    axes.legend()
    return Picture.of(figure)


def label_shift(texts: Sequence[str], trained: Sequence[bool]) -> Picture:
    """Draw tokens, their labels, and from which token each label is predicted.

    After the book's figure 4.6. Here the labels that do not count are drawn, too: an arrow for each that does.

    Args:
        texts: the tokens.
        trained: whether each has a label.
    """
    if not texts or len(texts) != len(trained):
        raise ValueError(f"give a label for each token, got {len(texts)} tokens and {len(trained)} labels")
    figure = new_figure(WIDTH, 2.6)
    axes = figure.subplots()
    rows = {"token": 2.0, "label": 0.0}
    for place, (text, counts) in enumerate(zip(texts, trained, strict=True)):
        used = counts and place > 0
        for row, words in (("token", text), ("label", text if counts else IGNORED)):
            color = BLUE if row == "label" and used else "black" if row == "token" else DIM
            box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": color}
            axes.text(place, rows[row], words, ha="center", va="center", color=color, fontsize=9, bbox=box,
                      fontweight="bold" if row == "label" and used else "normal")  # fmt: skip
        if used:
            arrow = {"arrowstyle": "->", "color": ORANGE, "linewidth": 1.5}
            axes.annotate("", (place - 0.05, 0.33), (place - 1 + 0.05, 1.67), arrowprops=arrow)
    for row, height in rows.items():
        axes.text(-0.7, height, row, ha="right", va="center", fontweight="bold")
    axes.text(-0.7, 1.0, "its logits\npredict", ha="right", va="center", color="#8a5f00", fontsize=9)
    axes.set(xlim=(-1.6, len(texts) - 0.2), ylim=(-0.4, 2.4))
    axes.set_axis_off()
    return Picture.of(figure)


def embedding_rows(models: Mapping[str, tuple[int, int]]) -> Picture:
    """Draw how many rows of the embedding have no token, for models given as (tokens, rows).

    The bars begin at the last 100 rows, or the spare ones would not be seen.
    """
    if not models:
        raise ValueError("nothing to draw: no models")
    for name, (tokens, rows) in models.items():
        if not 0 <= rows - tokens <= 100:
            raise ValueError(f"{name}: {tokens} tokens and {rows} rows; 0 to 100 spare rows can be drawn")
    figure = new_figure(WIDTH, 0.9 + 0.6 * len(models))
    axes = figure.subplots()
    for name, (tokens, rows) in models.items():
        axes.barh(name, 100 - (rows - tokens), color=BLUE, label="has a token")
        axes.barh(name, rows - tokens, left=100 - (rows - tokens), color=ORANGE, hatch="//", edgecolor="white",
                  label="spare")  # fmt: skip
        axes.text(101, name, f"{rows - tokens} spare of {rows:,}", va="center")
    axes.invert_yaxis()
    axes.set(xlim=(0, 135), xlabel="the last 100 rows of the embedding", xticks=[])
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside upper center", ncols=2, frameon=False)
    return Picture.of(figure)
