"""Pictures of gradient checkpointing: memory over a pass forward and back."""

from collections.abc import Mapping

from minift.study.again import Pass
from minift.study.book_tables import MB
from minift.study.picture import PALETTE, WIDTH, Picture, new_figure


def live_curves(passes: Mapping[str, Pass], title: str = "Memory of a pass forward and back") -> Picture:
    """Draw the bytes that exist after each operation, a curve for each way to keep activations.

    A dot marks the end of the forward pass, where what is kept is there.
    """
    figure = new_figure(WIDTH, 4.5)
    axes = figure.subplots()
    for (name, taken), color, style in zip(passes.items(), PALETTE, ("-", "--", "-."), strict=False):
        sizes = [size / MB for size in taken.history]
        label = f"{name}: keeps {taken.kept / MB:.1f} MB, peak {taken.peak / MB:.1f} MB"
        axes.plot(range(len(sizes)), sizes, style, color=color, label=label)
        axes.plot([taken.turn - 1], [taken.kept / MB], "o", color=color, markersize=7)
    axes.set(xlabel="operations (dot: end of the forward pass)", ylabel="MB", title=title, ylim=(0, None))
    figure.legend(loc="outside lower center", fontsize=11)
    return Picture.of(figure)
