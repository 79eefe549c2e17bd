"""Pictures of a run. Colours are safe for colour-blind readers (Okabe and Ito's palette)."""

from collections.abc import Sequence
from pathlib import Path

from minift.atomic import atomic_file
from minift.train.loop import StepRecord

BLUE, ORANGE = "#0072B2", "#E69F00"


def loss_curve(steps: Sequence[StepRecord], path: str | Path, title: str = "Training loss") -> Path:
    """Draw loss and learning rate over the steps of a run into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s to import; draws without a display
    from matplotlib.figure import Figure

    if not steps:
        raise ValueError("nothing to draw: the run has no steps")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes = figure.subplots()
    numbers = [record.step for record in steps]
    loss_axes.plot(numbers, [record.loss for record in steps], color=BLUE, marker="o", markersize=3, label="loss")
    loss_axes.set(xlabel="optimizer step", ylabel="mean loss a trained token (nats)", title=title, ylim=(0, None))
    loss_axes.grid(alpha=0.3)
    lr_axes = loss_axes.twinx()
    lr_axes.plot(numbers, [record.lr for record in steps], color=ORANGE, linestyle="--", label="learning rate")
    lr_axes.set(ylabel="learning rate", ylim=(0, None))
    lines = [*loss_axes.get_lines(), *lr_axes.get_lines()]
    loss_axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    path = Path(path)
    with atomic_file(path) as place:
        figure.savefig(place, format="png", dpi=150)
    return path
