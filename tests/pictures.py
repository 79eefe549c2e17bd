"""What is drawn in a matplotlib figure."""

from typing import Any

from matplotlib.figure import Figure


def texts(figure: Figure) -> str:
    """Everything that is written in a figure, a line each."""
    found: list[Any] = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return "\n".join(artist.get_text() for artist in found)
