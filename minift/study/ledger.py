"""How much memory a training step will take, before it is taken: a ledger by category, with the formula of each entry.

Four things fill memory, at different times:

                       forward  head  backward            update
    weights, state     ########################################      always there
    kept activations    ..::####  ####::..                           grow layer by layer, and shrink again
    gradients                        ..::##################          the other way round
    temporaries              #    ###   #  #  #           ####       logits; one block's own; copies of the optimizer

so no single sum is the peak. `predict` adds up each of these moments and takes the largest: after the head's softmax,
in the backward pass of every block (at its MLP and at its attention), at the embedding's gradient, and in the update.
What layers keep for their backward pass is in kept.py, with the symbols of the formulas.

With gradient checkpointing only each block's input is kept, and one block at a time is computed again: the activations
of one block instead of L. "selective" also keeps the results of products.

    ledger = predict(Setting(config, batch=4, length=512, lora=LoraConfig(r=16), quantize=QuantConfig()))
    print(ledger.format())
    largest(setting, 24 * 10**9, "batch")

Checked against what a step really held (measure.py): within 10 % on a CPU. Left out: what libraries keep for themselves
(0.5 to 0.8 GB of a GPU for CUDA and its products), the allocator's gaps, and scratch of fused attention.

`minift.study.book_memory` has the formulas that are usually given instead, and what is wrong with them.
"""

import gc
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from minift.adapters.lora import LoraConfig
from minift.model.decoder import CausalLM
from minift.quant.config import QuantConfig
from minift.study.account import CATEGORIES, Account, Moment
from minift.study.setting import Setting, build


@dataclass(frozen=True)
class Ledger:
    """What a step will take.

    Attributes:
        setting: what was asked.
        symbols: values of the letters in the formulas.
        moments: those that can be the peak, in order of time; of blocks, the largest.
        before: held before the step.
        kept: at the end of the forward pass, `before` included: what the head finds.
    """

    setting: Setting
    symbols: dict[str, int]
    moments: tuple[Moment, ...]
    before: int
    kept: int

    @property
    def at_peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """Most bytes held at a time."""
        return self.at_peak.total

    @property
    def categories(self) -> dict[str, int]:
        """Bytes of each category at the peak."""
        return self.at_peak.categories()

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by category of what a step makes, each when there is most of it. Their sum is more than the peak, where
        not all of them are there."""
        most = {name: max(moment.categories()[name] for moment in self.moments) for name in CATEGORIES}
        lasting = {name: most[name] for name in ("weights", "adapters", "optimizer")}
        batch = self.before - sum(lasting.values())  # without what the forward pass makes of it
        return {**lasting, "batch": batch, "gradients": most["gradients"],
                "kept activations": self.kept - self.before, "logits": most["logits"]}  # fmt: skip

    @property
    def peak_of_tensors(self) -> int:
        """The peak without scratch inside operators: what can be seen on a CPU, where scratch is kept for good."""
        return max(moment.total - moment.categories()["scratch"] for moment in self.moments)

    def format(self) -> str:
        """The entries at the peak with their formulas, and the sums of all moments."""
        peak = self.at_peak
        lines = sorted((x for x in peak.lines if x.bytes), key=lambda line: CATEGORIES.index(line.category))
        rows = [
            (line.category, line.what, f"{line.count} x ({line.formula})" if line.count > 1 else line.formula,
             _megabytes(line.bytes)) for line in lines
        ]  # fmt: skip
        text = [f"At the peak, {peak.name}:", *_aligned([("category", "what", "bytes", "size"), *rows])]
        text += [f"total {_megabytes(peak.total)}", "", "Moments:"]
        text += _aligned([(f"  {moment.name}", _megabytes(moment.total)) for moment in self.moments])
        values = ", ".join(f"{name} = {value}" for name, value in self.symbols.items())
        return "\n".join([*text, "", f"{values}; P parameters of a kind"])


def predict(setting: Setting) -> Ledger:
    """The memory of a training step, from shapes alone: nothing is loaded or computed.

    Raises:
        ValueError: a LoRA target that no layer has, nothing to quantize, or sdpa for a model that caps its scores.
    """
    return predict_for(setting, build(setting))


def predict_for(setting: Setting, model: CausalLM) -> Ledger:
    """The same for a model that is there already, on any device."""
    account = Account(setting, model)
    return Ledger(setting, account.symbols, tuple(account.moments()), account.before, account.after_forward)


def largest(setting: Setting, budget: int, what: str = "batch") -> int:
    """The largest `batch` (rows) or `length` (tokens, up to the model's positions) whose predicted peak fits.

    Args:
        setting: everything else; all tokens count as trained.
        budget: bytes.
        what: "batch" or "length".

    Raises:
        MemoryError: one row, or two tokens, do not fit; says what could be changed.
    """
    if what not in ("batch", "length"):
        raise ValueError(f"what must be 'batch' or 'length', got {what!r}")
    model = build(setting)  # the same for all sizes

    def peak(size: int) -> int:
        return predict_for(sized(size), model).peak

    def sized(size: int) -> Setting:
        return replace(setting, trained=None, **{what: size})

    low, limit = (1, 1 << 16) if what == "batch" else (2, setting.config.max_position_embeddings)
    size = low + bisect_left(range(low, limit + 1), True, key=lambda size: peak(size) > budget) - 1
    if size < low:
        raise MemoryError(
            f"a {what} of {low} takes {_megabytes(peak(low))}, more than {_megabytes(budget)}: "
            f"{'; '.join(map(str, advice(sized(low)))) or 'choose a smaller model'}"
        )
    return size


def format_fit(setting: Setting, budget: int) -> str:
    """The largest batch and the longest rows in words, or what to change if there are none."""
    lines = [f"With {_megabytes(budget)}:"]
    for what, rest in (("batch", f"rows of {setting.length} tokens"), ("length", f"{setting.batch} rows at a time")):
        try:
            lines.append(f"  largest {what} {largest(setting, budget, what)}, with {rest}")
        except MemoryError as error:
            lines.append(f"  no {what} fits: {error}")
    return "\n".join(lines)


def parse_bytes(text: str) -> int:
    """ "24GB", "500 MB", "1.5GiB" or a plain number -> bytes; GB is 10^9, GiB 2^30.

    Raises:
        ValueError: something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is no amount of memory; write it like 24GB, 500MB or 16GiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index((prefix or " ").upper()))


@dataclass(frozen=True)
class Change:
    """Something to change in a setting, in words, and the bytes that the peak then is less by, as predicted."""

    what: str
    saves: int

    def __str__(self) -> str:
        return f"{self.what}, saves {_megabytes(self.saves)}"


def advice(setting: Setting, model: CausalLM | None = None) -> list[Change]:
    """What to change so that less memory is needed, the most helpful first; three at most.

    Args:
        model: of the setting, if there is one already.
    """
    peak = (predict_for(setting, model) if model else predict(setting)).peak
    saved = [Change(what, peak - predict(changed).peak) for what, changed in _changes(setting).items()]
    return sorted((change for change in saved if change.saves > 0), key=lambda change: -change.saves)[:3]


def _changes(setting: Setting) -> dict[str, Setting]:
    """Every setting that may need less memory, by what it changes."""
    tokens = (setting.shared[0] + max(setting.shared[1])) if setting.shared else setting.length
    fewer = setting.halved("rows")
    if fewer is not setting:
        fewer = replace(fewer, accumulation=max(2, setting.accumulation))
    changes = {
        "compute activations again (gradient checkpointing)": replace(setting, checkpointing=True),
        f"{fewer.rows} rows at a time instead of {setting.rows}, and more accumulation": fewer,
        f"rows of {max(2, tokens // 2)} tokens instead of {tokens}": setting.halved("length"),
        "8-bit optimizer state (adamw8bit)": replace(setting, optimizer="adamw8bit"),
    }
    if setting.lora is None:
        changes["train adapters instead of all parameters (LoRA)"] = replace(setting, lora=LoraConfig())
    elif setting.quantize is None:
        changes["weights in 4 bits (quantize nf4)"] = replace(setting, quantize=QuantConfig())
    if setting.dtype == torch.float32:
        changes["compute in 16 bits (dtype bfloat16)"] = replace(setting, dtype=torch.bfloat16)
    if setting.attention == "eager" and not setting.config.attention_softcap:
        changes["store no scores (attention sdpa)"] = replace(setting, attention="sdpa")
    return changes


def find_batch_size(try_step: Callable[[int], object], start: int) -> int:
    """The first batch size that does not run out of memory, of start, start / 2, start / 4, ...

    Args:
        try_step: takes a step with that many rows. Any other error than a lack of memory passes through.
        start: where to begin; `largest` knows a good one.

    Raises:
        MemoryError: not even one row fits.
    """
    if start < 1:
        raise ValueError(f"cannot start from a batch size of {start}; at least 1 is needed")
    size = start
    while not _fits(try_step, size):
        if size == 1:
            raise MemoryError("out of memory with one row; shorten it, or choose a smaller model or format")
        size //= 2
        gc.collect()  # what the failed step held through cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return size


def _fits(try_step: Callable[[int], object], size: int) -> bool:
    try:
        try_step(size)
    except (MemoryError, torch.OutOfMemoryError):
        return False
    except RuntimeError as error:  # how torch says it of a CPU
        if "DefaultCPUAllocator" not in str(error):
            raise
        return False
    return True


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns side by side, the last one to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)),
                       row[-1].rjust(widths[-1])]) for row in rows]  # fmt: skip
