"""For tests of pictures: what was drawn, not only its pixels."""

from typing import Any

import pytest
from matplotlib.figure import Figure

from minift.study.picture import Picture


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that becomes a picture."""
    seen: list[Figure] = []
    render = Picture.of

    def remember(figure: Any) -> Picture:
        seen.append(figure)
        return render(figure)

    monkeypatch.setattr(Picture, "of", remember)
    return seen
