"""Pictures of what rounding does to a weight that is updated many times."""

from collections.abc import Mapping

from torch import Tensor

from minift.study.picture import PALETTE, WIDTH, Picture, new_figure
from minift.study.rounding import DECIMALS, Run


def rounding_walks(walks: Mapping[str, Tensor]) -> Picture:
    """Draw a weight under random updates, rounded to 3 to 7 decimals: down on the left, by chance on the right.

    Args:
        walks: what `minift.study.rounding.walks` returns.
    """
    figure = new_figure(WIDTH, 4)
    left, right = figure.subplots(1, 2)
    every = max(1, len(walks["exact"]) // 2000)  # more points than the picture has dots
    for axes, mode, title in ((left, "down", "rounded down"), (right, "stochastic", "rounded by chance")):
        steps = range(0, len(walks["exact"]), every)
        for column, (decimals, style) in enumerate(zip(DECIMALS, ("-", "--", "-.", ":", "-"), strict=True)):
            label = f"{decimals} decimals, ends at {walks[mode][-1, column]:.4f}"
            axes.plot(steps, walks[mode][::every, column], style, color=PALETTE[column], label=label)
        axes.plot(steps, walks["exact"][::every], color="black", linewidth=0.8, label="fp32")
        axes.set(xlabel="update", title=title)
        axes.legend(fontsize="small")
    left.set_ylabel("weight")
    return Picture.of(figure)


def stalled_losses(runs: Mapping[str, Run]) -> Picture:
    """Draw the losses of `minift.study.rounding.stalled_run`."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for (name, run), color, style in zip(runs.items(), PALETTE, ("-", "--", ":"), strict=False):
        label = name if name == "fp32" else f"bfloat16, {name}"
        axes.semilogy(run.loss, style, color=color, label=f"{label}: {run.loss[-1]:.2g}")
    axes.set(xlabel="step", ylabel="mean squared error", title="Weights rounded after every step")
    axes.grid(alpha=0.3)
    axes.legend()
    return Picture.of(figure)
