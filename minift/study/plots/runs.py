"""Pictures of training runs."""

from collections.abc import Sequence

from minift.study.book_tables import MB
from minift.study.picture import BLUE, ORANGE, Picture, new_figure
from minift.train.loop import StepRecord


def loss_curve(steps: Sequence[StepRecord], title: str = "Training loss") -> Picture:
    """Draw loss and learning rate over the steps of a run."""
    if not steps:
        raise ValueError("nothing to draw: the run has no steps")
    figure = new_figure(7, 4)
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
    return Picture.of(figure)


def run_curves(steps: Sequence[StepRecord], title: str = "Training run") -> Picture:
    """Draw loss (with evaluations), learning rate, gradient norm, seconds and memory over the steps.

    Memory is left out if no record has it. Of a run on a CPU it is the most that the process has held so far, so it
    never falls.
    """
    if not steps:
        raise ValueError("nothing to draw: the run has no steps")
    figure = new_figure(10, 6)
    figure.suptitle(title)
    panels = {
        "mean loss a trained token (nats)": [(record.step, record.loss) for record in steps],
        "learning rate": [(record.step, record.lr) for record in steps],
        "gradient norm before clipping": [(record.step, record.grad_norm) for record in steps],
        "seconds a step": [(record.step, record.seconds) for record in steps],
        "most memory held (MB)": [(r.step, r.peak_memory / MB) for r in steps if r.peak_memory is not None],
    }
    panels = {name: points for name, points in panels.items() if points}
    places = figure.subplots(2, -(-len(panels) // 2)).flat
    for (name, points), axes in zip(panels.items(), places, strict=False):
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=2, label="training")
        axes.set(xlabel="optimizer step", ylabel=name, ylim=(0, None))
        axes.grid(alpha=0.3)
    for axes in list(places):
        axes.remove()
    looks = [(record.step, record.eval_loss) for record in steps if record.eval_loss is not None]
    if looks:
        shown = [step for step, _ in looks], [loss for _, loss in looks]
        figure.axes[0].plot(*shown, color=ORANGE, marker="s", linestyle="--", label="evaluation")
        figure.axes[0].legend(loc="upper right")
    return Picture.of(figure)
