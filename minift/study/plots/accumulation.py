"""A picture of what the mean of means does to a step (minift/study/unevenness.py)."""

from collections.abc import Mapping, Sequence

from minift.study.accumulation import AccumulationStudy
from minift.study.picture import PALETTE, Picture, new_figure
from minift.study.unevenness import misplaced_weight


def accumulation_errors(studies: Mapping[str, Sequence[AccumulationStudy]]) -> Picture:
    """Draw the errors of gradient and loss of the mean of means over the share of weight that it misplaces.

    Args:
        studies: several of a kind, by the name of the kind. Trained tokens of two micro-batches stand at their point.
    """
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for (name, group), color, marker in zip(studies.items(), PALETTE, ("o", "s", "^", "D"), strict=False):
        points = sorted(((100 * misplaced_weight(s.trained_tokens), s) for s in group), key=lambda point: point[0])
        places = [x for x, _ in points]
        for quantity, style, filled in (("gradient", "-", color), ("loss", "--", "white")):
            errors = [100 * error_of(study, quantity) for _, study in points]
            label = f"{quantity}, {name}"
            axes.plot(places, errors, style, marker=marker, color=color, markerfacecolor=filled, label=label)
            for x, y, (_, study) in zip(places, errors, points, strict=True):
                if quantity == "gradient" and len(study.trained_tokens) == 2:
                    text = " : ".join(map(str, study.trained_tokens)) + " tokens"
                    axes.annotate(text, (x, y), (10, -3), textcoords="offset points", fontsize=9)
    axes.set(xlabel="misplaced weight (%)", ylabel="error of the mean of means (%)")
    axes.set(xlim=(0, 1.25 * axes.get_xlim()[1]), ylim=(0, None))  # room for what is written at the last point
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return Picture.of(figure)


def error_of(study: AccumulationStudy, quantity: str) -> float:
    """Of the mean of means, relative to the truth."""
    truth, _, wrong = study.ways
    return wrong.error if quantity == "gradient" else abs(wrong.loss - truth.loss) / truth.loss
