"""What the page of a trace consists of, and how a terminal shows it (as HTML: page.py).

Text     lines as they are                      Chips   tokens in a row, each with a word below
Table    with a header                          Cards   a few numbers with names, as bars
Lanes    what lies behind what, to scale        Figure  a picture with its words
"""

import textwrap
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from minift.study.picture import Picture

WIDTH = 100  # columns of a terminal
BAR = 24
NARROW = 8  # a name fits into an eighth of a page, even on a telephone
Kind = Literal["plain", "trained", "heat0", "heat1", "heat2", "heat3"]


@dataclass(frozen=True)
class Text:
    """Lines as they are; `title` stands above."""

    kind: ClassVar[str] = "text"
    text: str
    title: str = ""

    def lines(self) -> Iterator[str]:
        if self.title:
            yield f"{self.title}:"
        yield from (f"  {line}" for line in self.text.split("\n"))


@dataclass(frozen=True)
class Table:
    """Rows of words below a head; all but the first column are set to the right."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> Iterator[str]:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        for row in (self.head, *self.rows):
            first, *rest = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
            yield "  ".join([f"  {first.strip():<{widths[0]}}", *rest])


@dataclass(frozen=True)
class Chip:
    """A token and what stands below it. `heat0` to `heat3` are ever darker; a control token is set in italics."""

    text: str
    below: str
    kind: Kind = "plain"
    is_control: bool = False


@dataclass(frozen=True)
class Chips:
    """Tokens in a row."""

    kind: ClassVar[str] = "chips"
    chips: Sequence[Chip]

    def lines(self) -> Iterator[str]:
        words = [f"{chip.text}({chip.below})" for chip in self.chips]
        line = " "
        for word in words:
            if len(line) + len(word) >= WIDTH and line.strip():
                yield line
                line = " "
            line += f" {word}"
        yield line


@dataclass(frozen=True)
class Bar:
    """A name, a share from 0 to 1 drawn as a bar, the number beside it, and whether it is the one to look at."""

    name: str
    share: float
    number: str
    is_marked: bool = False


@dataclass(frozen=True)
class Bars:
    """A card of bars."""

    kind: ClassVar[str] = "bars"
    title: str
    bars: Sequence[Bar]

    def lines(self) -> Iterator[str]:
        yield f"  {self.title}"
        width = max(len(bar.name) for bar in self.bars)
        for bar in self.bars:
            mark = "*" if bar.is_marked else " "
            yield f"  {mark} {bar.name:<{width}}  {bar.number:>7}  {'#' * round(BAR * bar.share)}".rstrip()


@dataclass(frozen=True)
class Cards:
    """Bars beside each other, as many as there is room for."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[Bars]

    def lines(self) -> Iterator[str]:
        for card in self.cards:
            yield from card.lines()


@dataclass(frozen=True)
class Lane:
    """What lies behind what: (name, size, whether to look at it), and a size that stays free."""

    name: str
    parts: Sequence[tuple[str, int, bool]]
    free: int

    @property
    def labels(self) -> list[str]:
        """The names, only their last word where a part is narrow."""
        size = self.free + sum(size for _, size, _ in self.parts)
        return [name if size_of * NARROW >= size else name.split()[-1] for name, size_of, _ in self.parts]

    @property
    def free_label(self) -> str:
        size = self.free + sum(size for _, size, _ in self.parts)
        return "free" if self.free * NARROW >= size else ""


@dataclass(frozen=True)
class Lanes:
    """Lanes below each other, to one scale."""

    kind: ClassVar[str] = "lanes"
    lanes: Sequence[Lane]

    def lines(self) -> Iterator[str]:
        for lane in self.lanes:
            parts = [f"*{name} ({size})*" if marked else f"{name} ({size})" for name, size, marked in lane.parts]
            yield f"  {lane.name}: {' | '.join([*parts, f'free ({lane.free})'])}"


@dataclass(frozen=True)
class Figure:
    """A picture and what it shows; a terminal has only the words."""

    kind: ClassVar[str] = "figure"
    picture: Picture
    caption: str

    def lines(self) -> Iterator[str]:
        yield from wrapped(f"[picture on the page: {self.caption}]", "  ")

    @property
    def data(self) -> str:
        """The image itself, as an address."""
        return "data:image/png;base64," + b64encode(self.picture.png).decode()


Block = Text | Table | Chips | Cards | Lanes | Figure


@dataclass(frozen=True)
class Station:
    """One stop of a trace.

    Attributes:
        title: its name.
        lesson: what happens here and why, paragraphs with an empty line between.
        uses: the functions of the library that it shows.
        blocks: what is seen.
    """

    title: str
    lesson: str
    uses: tuple[str, ...]
    blocks: Sequence[Block]

    @property
    def paragraphs(self) -> list[str]:
        return self.lesson.split("\n\n")


def as_text(title: str, stations: Sequence[Station]) -> str:
    """The whole for a terminal."""
    lines = [title, "=" * len(title)]
    for number, station in enumerate(stations, start=1):
        lines += ["", f"{number}. {station.title}"]
        for paragraph in station.paragraphs:
            lines += [*wrapped(paragraph, "   "), ""]
        lines += [f"   {', '.join(station.uses)}"]
        for block in station.blocks:
            lines += ["", *(line.rstrip() for line in block.lines())]
    return "\n".join(lines)


def wrapped(text: str, indent: str) -> list[str]:
    """Lines of a paragraph."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
