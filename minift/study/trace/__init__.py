"""One row of text, followed through everything, as one page.

    row -> text -> tokens -> labels -> pack -> mask -> logits -> loss -> gradient of A and B -> 8-bit state -> pages
        -> updated weights -> changed answer

Each mechanism has a file of its own, and none of them says how they hang together. A trace takes a single row through
all of them and writes down what is there at each station, so that one number can be followed to the next: the least
likely token has the largest loss, the loss makes the gradient, its sign the first update, the update the new answer.

    trace(model, tokenizer, rows, row=0)                 in a notebook: the page; print(...) for a terminal
    trace(model, tokenizer, rows).save("trace.html")     one file, that needs nothing else

numbers.py and steps.py record the numbers, with the functions that a run calls; stations.py and training.py say what
they mean; blocks.py and page.py show them.

Left out: several rows a step, dropout, other methods than LoRA.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from minift.atomic import atomic_file
from minift.data.formats import Row
from minift.data.tokenizer import Tokenizer
from minift.model.decoder import CausalLM
from minift.study.trace.blocks import Station, as_text
from minift.study.trace.numbers import Followed, follow
from minift.study.trace.page import as_html, as_page
from minift.study.trace.stations import stations_to_loss
from minift.study.trace.steps import Report
from minift.study.trace.training import stations_of_training
from minift.train.config import TrainConfig

DEFAULT = TrainConfig(lr=1e-3, schedule="constant")


@dataclass(frozen=True, repr=False)
class Trace:
    """What `trace` found: `print` it, leave it at the end of a notebook's cell, or save it as a page.

    Attributes:
        title: of the page.
        stations: twelve, from the row to the changed answer.
        numbers: everything that they show, as numbers and tensors.
    """

    title: str
    stations: list[Station] = field(repr=False)
    numbers: Followed

    def __str__(self) -> str:
        return as_text(self.title, self.stations)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self.title, self.stations)

    def save(self, path: str | Path) -> Path:
        """Write a page that any browser shows, in place of what was there, whole or not at all."""
        page = as_page(self.title, self.stations)
        with atomic_file(Path(path)) as place:
            place.write_text(page, encoding="utf-8")
        return Path(path)


def trace(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    row: int = 0,
    config: TrainConfig | None = None,
    steps: int = 5,
    layer: str = "",
    report: Report = lambda what: None,
) -> Trace:
    """Follow one row through a forward pass, some training steps on it alone, and what it says afterwards.

    Args:
        model: with a LoRA that is trained (`add_lora`). Its weights are the same afterwards.
        tokenizer: the model's.
        rows: a data set; up to seven rows around the traced one are packed with it.
        row: which one, counted from 0.
        config: `loss_on`, `max_length`, `lr`, `schedule`, `warmup_steps`, `weight_decay`, `decay_order`,
            `max_grad_norm`, `gradient_checkpointing` and `seed` count; None is a constant rate of 1e-3.
        steps: how many to take.
        layer: path of the adapted layer whose A and B are looked at; by default the last that is large enough for
            8-bit state.
        report: told what begins: steps + 3 times.

    Raises:
        ValueError: no such row, one that cannot be trained on, no trained LoRA, or none in that layer.
        FloatingPointError: a loss or gradient is not finite.
    """
    numbers = follow(model, tokenizer, rows, row, config or DEFAULT, steps, layer, report)
    title = f"Row {row + 1}, from text to weights"
    return Trace(title, [*stations_to_loss(numbers, tokenizer), *stations_of_training(numbers, tokenizer)], numbers)


@contextmanager
def progress(steps: int) -> Iterator[Report]:
    """A bar on standard error for `report`, which is gone at the end."""
    layout = "Tracing {percentage:3.0f}%|{bar}| {desc}"
    with tqdm(total=steps + 3, leave=False, mininterval=0, dynamic_ncols=True, bar_format=layout) as bar:

        def report(what: str) -> None:
            bar.set_description_str(what, refresh=False)
            bar.update()

        yield report
