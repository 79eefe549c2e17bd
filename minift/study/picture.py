"""What a drawing is made of: colours, a width, and a picture that a notebook shows or a file keeps.

Colours are safe for colour-blind readers (Okabe and Ito's palette), and nothing is told by colour alone. The ground is
white, so that a picture reads the same on a dark page.
"""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minift.atomic import atomic_file

BLUE, ORANGE = "#0072B2", "#E69F00"
SKY, GREEN, YELLOW, VERMILION, PURPLE, GREY = "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#999999"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW, GREY, "#000000", "#666666")
WIDTH = 8  # inches, at 150 dots each: that of a notebook's cell


@dataclass(frozen=True)
class Picture:
    """A PNG image. A notebook shows it; `save` writes it."""

    png: bytes = field(repr=False)

    @classmethod
    def of(cls, figure: Any) -> "Picture":
        """Render a matplotlib figure."""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})  # no version: the same bytes
        return cls(file.getvalue())

    def save(self, path: str | Path) -> Path:
        """Write the image, whole or not at all, and return its path."""
        with atomic_file(Path(path)) as place:
            place.write_bytes(self.png)
        return Path(path)

    def _repr_png_(self) -> bytes:
        return self.png


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, which needs no display and is kept by nobody else."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
