"""The book's equations as a picture, with the numbers that come out of them."""

from minift.study.equations import Sheet
from minift.study.picture import GREY, VERMILION, WIDTH, Picture, new_figure

LINE, ROW, GAP = 0.62, 0.2, 0.3  # inches: of a formula, of a number, between equations


def equation_sheet(sheet: Sheet) -> Picture:
    """Draw formulas, one below the other, and their worked numbers; "differs" where the book's is another one.

    After figures by dvgodoy (CC BY 4.0), which have the formulas alone.
    """
    heights = [LINE * (len(e.lines) + 0.25) + ROW * len(e.worked) + GAP for e in sheet.equations]
    figure = new_figure(WIDTH, sum(heights))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(sum(heights), 0))
    axes.axis("off")
    top = 0.0
    for equation, height in zip(sheet.equations, heights, strict=True):
        axes.text(0.15, top + 0.22, f"{equation.number}  {equation.says}", fontsize=10, weight="bold")
        y = top + 0.22 + LINE * 0.7
        for line in equation.lines:
            _formula(axes, figure, y, line)
            y += LINE
        y -= LINE * 0.2
        for worked in equation.worked:
            book, here = worked.numbers()
            axes.text(0.5, y, worked.what, fontsize=9)
            if worked.book is not None:
                axes.text(5.5, y, f"book {book}", fontsize=9, ha="right")
            axes.text(7.0, y, f"here {here}", fontsize=9, ha="right")
            if worked.differs:
                axes.text(7.1, y, "differs", fontsize=9, color=VERMILION, weight="bold")
            y += ROW
        top += height
        axes.axhline(top, color=GREY, linewidth=0.6)
    return Picture.of(figure)


def _formula(axes: object, figure: object, y: float, line: str) -> None:
    """As large as fits into the width."""
    text = axes.text(0.5, y, f"${line}$", fontsize=14, va="center", math_fontfamily="cm")  # pyright: ignore[reportAttributeAccessIssue]
    wide = text.get_window_extent(figure.canvas.get_renderer()).width / figure.dpi  # pyright: ignore[reportAttributeAccessIssue]
    if wide > WIDTH - 0.7:
        text.set_fontsize(14 * (WIDTH - 0.7) / wide)
