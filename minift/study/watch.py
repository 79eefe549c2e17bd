"""Memory of a run: predicted from its first step, measured in its second, and explained when there is not enough.

                               predicted      measured   ratio
    adapters                    ...                               by category
    held before the step        ...
    kept by the forward pass    ...
    peak                        ...

The first step is not measured, because the optimizer makes its state at its end. The measured one gives the same
numbers as any other, and takes about half as long again on a CPU; on a GPU measuring costs nothing.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from minift.atomic import atomic_file
from minift.data.collate import Batch
from minift.model.decoder import CausalLM
from minift.study.ledger import Ledger, advice, predict_for
from minift.study.measure import Measured, measured
from minift.study.setting import setting_of_batch
from minift.train.config import TrainConfig
from minift.train.step import StepStats
from minift.train.watch import Watch

FILE = "memory.json"  # in the folder of a run
MEASURED = 2  # which step of this process


class MemoryWatch(Watch):
    """Say what a run takes, for `train(..., watch=...)`.

    Args:
        config: that of the run.
        say: told the prediction for the first step, then the table.
        measure: whether to measure a step.

    Attributes:
        ledger, measured: of the step that was measured; None before, and `ledger` also if nothing could be predicted.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], object], measure: bool = True):
        self.config, self.say, self.measure = config, say, measure
        self.ledger: Ledger | None = None
        self.measured: Measured | None = None
        self._steps = 0

    def step(
        self,
        model: CausalLM,
        micro_batches: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        take: Callable[[], StepStats],
    ) -> StepStats:
        """Take the step, and look on if it is time."""
        self._steps += 1
        if self._steps == 1:
            self.say(self._expected(model, micro_batches))
        if self._steps != MEASURED or not self.measure:
            return take()
        stats, self.measured = measured(model, micro_batches, optimizer, take)
        self.ledger, _ = predicted(model, micro_batches, self.config)
        self.say(f"Memory of a step:\n{self.measured.beside(self.ledger)}")
        self._save()
        return stats

    def _expected(self, model: CausalLM, micro_batches: Sequence[Batch]) -> str:
        ledger, why = predicted(model, micro_batches, self.config)
        if ledger is None:
            return why
        return f"Memory: {ledger.peak / 1e6:,.0f} MB predicted for a step like the first, at its {ledger.at_peak.name}"

    def _save(self) -> None:
        """Both as JSON, beside the log."""
        content: dict[str, object] = {"measured": asdict(self.measured) if self.measured else None}
        if self.ledger:
            ledger = self.ledger
            content["predicted"] = {"before": ledger.before, "kept": ledger.kept, "peak": ledger.peak,
                                    "peak_of_tensors": ledger.peak_of_tensors, "parts": ledger.parts}  # fmt: skip
        with atomic_file(Path(self.config.output_dir) / FILE) as place:
            place.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def shortage(self, model: CausalLM, micro_batches: Sequence[Batch]) -> str:
        """The largest categories of the step that did not fit, and three things to change with what each saves."""
        ledger, _ = predicted(model, micro_batches, self.config)
        if ledger is None:
            return ""
        sizes = sorted(((size, name) for name, size in ledger.categories.items()), reverse=True)[:3]
        where = ", ".join(f"{name} {size / 1e6:,.0f} MB" for size, name in sizes if size)
        found = [*map(str, advice(ledger.setting, model)), "choose a smaller model", "use a larger machine"][:3]
        changes = "; ".join(f"({n}) {change}" for n, change in enumerate(found, 1))
        return f"It takes {ledger.peak / 1e6:,.0f} MB as predicted, most of it {where}. Change one of: {changes}."


def predicted(model: CausalLM, micro_batches: Sequence[Batch], config: TrainConfig) -> tuple[Ledger | None, str]:
    """The ledger of a step: that of the micro-batch with the highest peak, with what the first one keeps; or None, and
    why. Of all but the first, which find gradients there already, the largest counts."""
    first, *rest = micro_batches
    try:
        ledgers = [predict_for(setting_of_batch(model, first, config), model)]
        if rest:
            largest = max(rest, key=lambda batch: batch.input_ids_bs.numel())
            ledgers.append(predict_for(setting_of_batch(model, largest, config, len(micro_batches)), model))
        return replace(max(ledgers, key=lambda ledger: ledger.peak), kept=ledgers[0].kept), ""
    except ValueError as error:
        return None, f"Memory of a step is not predicted: {error}"
