"""Pictures of one step: what the gradient of a LoRA layer looks like."""

from collections.abc import Sequence

from torch import Tensor

from minift.study.picture import Picture, new_figure

COLUMNS = 64  # of A, and rows of B: as many as can be told apart
DARKEST = 0.98  # what lies above has the darkest colour: a few large ones would leave the others blank


def gradient_maps(a: Sequence[Tensor], b: Sequence[Tensor]) -> Picture:
    """Draw the gradients of A (above) and B (below, lying on its side), a column a step, each on a scale of its own.

    Args:
        a, b: gradients [r, in] and [out, r] of one layer in one or more steps; the first 64 inputs and outputs are
            drawn.
    """
    figure = new_figure(5.2, 3.6)
    panels = figure.subplots(2, len(a), squeeze=False)
    for name, row, gradients in (("A", panels[0], a), ("B", panels[1], [gradient_or.T for gradient_or in b])):
        for step, (axes, gradient) in enumerate(zip(row, gradients, strict=True), start=1):
            shown_rn = gradient[:, :COLUMNS]
            shown, most = shown_rn.numpy(), shown_rn.abs().max().item()
            limit = shown_rn.abs().flatten().quantile(DARKEST).item() or most or 1.0
            axes.imshow(shown, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            said = f"up to {most:.1e}" if most else "all 0"
            axes.set_title(f"{name}, step {step}: {said}", fontsize=10)
            axes.set(yticks=[], ylabel=f"{len(gradient)} ranks" if step == 1 else "")
            of = "input" if name == "A" else "output"
            axes.set_xlabel(f"{of} 1 to {shown.shape[1]} of {gradient.shape[1]}", fontsize=9)
            axes.tick_params(labelsize=8)
    return Picture.of(figure)
