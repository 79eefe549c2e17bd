"""A data set before it is trained on: the report, how it fits into batches, the first rows token by token.

What `minift inspect --data` prints, and in a notebook what `look_at(tokenizer, rows)` shows. Unlike training it refuses
nothing: a row that cannot be trained on is counted in the report and says why in its place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from minift.atomic import atomic_file
from minift.data.batching import by_length, order, padding
from minift.data.encode import Example, LossOn, encode
from minift.data.formats import Row
from minift.data.packing import lay_out, pack_report
from minift.data.report import DataReport, examine
from minift.data.tokenizer import Tokenizer
from minift.study.show import Shown, ShownRow, harmless, show_example
from minift.train.config import TrainConfig


@dataclass(frozen=True, repr=False)
class DataLook:
    """What `look_at` found: `print` it, leave it at the end of a notebook's cell, or save it as a page.

    Attributes:
        report: of all rows.
        batches: how full the batches would be, a line for each way to make them.
        shown: the first rows.
    """

    report: DataReport
    batches: str
    shown: Shown

    def __str__(self) -> str:
        return "\n\n".join([*self._texts(), str(self.shown)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        style = "font-family:monospace;white-space:pre-wrap"
        pages = [f'<pre style="{style}">{escape(text)}</pre>' for text in self._texts()]
        return "\n".join([*pages, self.shown._repr_html_()])

    def save_html(self, path: str | Path) -> Path:
        """Write a page that any browser shows, in place of what was there."""
        path = Path(path)
        head = '<meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>minift inspect</title>'
        with atomic_file(path) as place:
            place.write_text(f'<!doctype html>\n<html lang="en">{head}\n{self._repr_html_()}\n</html>\n', "utf-8")
        return path

    def _texts(self) -> list[str]:
        report = "\n".join(map(harmless, self.report.format().split("\n")))
        return [report, self.batches] if self.batches else [report]


def look_at(
    tokenizer: Tokenizer, rows: Sequence[Row], config: TrainConfig | None = None, first: int = 3, color: bool = False
) -> DataLook:
    """Examine all rows with the settings of a run, and show the first.

    Args:
        config: `loss_on`, `max_length`, `packing`, `batch_size` and `seed` count.
        first: how many rows to show.
        color: whether str() has ANSI colours.
    """
    config = config or TrainConfig()
    report = examine(tokenizer, rows, config.loss_on, config.row_limit, problems="show")
    shown = show_rows(tokenizer, rows[:first], config.loss_on, config.row_limit, color)
    return DataLook(report, _batches(report.examples, config) if report.examples else "", shown)


def show_rows(
    tokenizer: Tokenizer,
    rows: Iterable[Row],
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    color: bool = False,
) -> Shown:
    """Rows of a data set, numbered from 1, as `encode` makes them; one that it refuses, with its reason."""
    shown = []
    for number, row in enumerate(rows, start=1):
        name = f"row {number}"
        try:
            example = encode(tokenizer, row, loss_on, max_length, where=name)
        except ValueError as error:
            shown.append(ShownRow(str(error), []))
            continue
        (alone,) = show_example(tokenizer, example).rows
        shown.append(ShownRow(f"{name}: {alone.title}", alone.parts))
    return Shown(shown, color)


def _batches(examples: Sequence[Example], config: TrainConfig) -> str:
    """Padding of the first epoch's batches, shuffled and of similar length; and what packing would do."""
    lengths, size = [len(example) for example in examples], config.batch_size
    drawn = order(len(lengths), config.seed, epoch=0)
    at_random = [drawn[start : start + size] for start in range(0, len(drawn), size)]
    found = [
        (f"batches of {size}, at random", padding(at_random, lengths).format()),
        (f"batches of {size}, by length", padding(by_length(lengths, size, config.seed, epoch=0), lengths).format()),
    ]
    if config.packing != "none":
        layout = lay_out(lengths, config.max_length, config.packing)
        packed = pack_report(layout, [layout.row(examples, number) for number in range(len(layout))])
        found += zip((f"packed ({config.packing})", "", ""), packed.format().splitlines(), strict=False)
    width = max(len(name) for name, _ in found) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in found)
