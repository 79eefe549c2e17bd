"""Pictures of the training loop: its stages in memory, its learning rate, its lines in the wrong order."""

from collections.abc import Mapping, Sequence

from minift.optim.schedule import SCHEDULES, lr_factor
from minift.study.book_tables import MB
from minift.study.loop_mistakes import WILD, LoopRun
from minift.study.picture import BLUE, GREY, ORANGE, PALETTE, SKY, WIDTH, Picture, new_figure
from minift.study.shrinking import STAGES, Shrinking

COLORS = (BLUE, SKY, ORANGE, GREY)


def training_loop(parts: Sequence[Shrinking], title: str = "") -> Picture:
    """Draw the four stages of a step, what fills memory in each, and what each technique leaves of it.

    After a figure by dvgodoy (CC BY 4.0), chapter 5. There, equal boxes with the names of techniques beside them; here
    the lengths of the bars are the bytes of a real setting, before and after.
    """
    if not parts:
        raise ValueError("nothing to draw: no parts")
    bars: list[tuple[str, int, int, bool]] = []  # what is written, bytes, stage, whether as it is
    for part in parts:
        bars.append((part.part, part.bytes, part.stage, True))
        bars += [(f"with {name}", left, part.stage, False) for name, left in part.left.items()]
    figure = new_figure(WIDTH, 1.2 + 0.3 * len(bars))
    axes = figure.subplots()
    largest = max(size for _, size, _, _ in bars) / MB
    for number, (_, size, stage, is_plain) in enumerate(bars):
        axes.barh(
            number, size / MB, 0.8, color=COLORS[stage] if is_plain else "white", edgecolor=COLORS[stage],
            hatch="" if is_plain else "//",
        )  # fmt: skip
        text = f"{size / MB:,.0f} MB" if size >= MB else f"{size / MB:.2f} MB"
        axes.text(size / MB + 0.01 * largest, number, text, va="center", fontsize=9)
    for stage, name in enumerate(STAGES):
        places = [number for number, bar in enumerate(bars) if bar[2] == stage]
        if places:
            axes.axhline(places[0] - 0.5, color="black", linewidth=0.8)
            axes.text(1.39 * largest, places[0] - 0.3, f"stage {stage}\n{name}", va="top", ha="right", fontsize=9)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=9)
    for label, (*_, is_plain) in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if is_plain else "normal")
    axes.set(xlim=(0, 1.4 * largest), ylim=(len(bars) - 0.5, -0.5), xlabel="MB")
    axes.set_title(title, fontsize=11, loc="left")
    return Picture.of(figure)


def schedule_curves(total_steps: int, warmup_steps: int, lr: float = 1.0) -> Picture:
    """Draw the learning rate of each step, for each schedule of the library."""
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    for name, color, style in zip(SCHEDULES, PALETTE, ("-", "--", ":"), strict=False):
        rates = [lr * lr_factor(name, step, total_steps, warmup_steps) for step in range(total_steps)]
        axes.plot(range(1, total_steps + 1), rates, style, color=color, marker="o", markersize=3, label=name)
    axes.axvspan(1, warmup_steps + 1, color=GREY, alpha=0.2, label="warm-up")
    axes.set(xlabel="optimizer step", ylabel="learning rate", title=f"{total_steps} steps, {warmup_steps} of warm-up")
    axes.legend()
    return Picture.of(figure)


def loop_mistakes(runs: Mapping[str, LoopRun]) -> Picture:
    """Draw the losses of the loops of `minift.study.loop_mistakes`."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for (name, run), color, style in zip(runs.items(), PALETTE, ("-", "--", ":", "-."), strict=False):
        axes.semilogy(run.losses, style, color=color, linewidth=2, label=f"{name}: {run.losses[-1]:.3g} at the end")
    axes.axvline(WILD + 1, color=GREY, linewidth=0.8)
    axes.text(WILD + 1.3, 0.98, "wild batch", transform=axes.get_xaxis_transform(), va="top", fontsize=9)
    axes.set(xlabel="steps taken", ylabel="mean squared error", title="The same lines in another order")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return Picture.of(figure)
