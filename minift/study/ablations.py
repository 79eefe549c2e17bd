"""The book's tables of memory (5.2 to 5.4) filled again by real training steps on this machine.

What each choice costs is asked of a model with random weights, since memory depends on shapes alone:

    checkpointing x full or LoRA x optimizer and accumulation x 500 or 2000 tokens x attention    16-bit weights
    checkpointing x mixed precision x 500 or 2000 tokens x attention                              int8 weights, LoRA

On a GPU it is OPT-350M as in the book. On a CPU it is OPT-350M made `narrower`: width, rows, words and MLP 16 times
smaller, layers and heads as they are. Then every term of the formulas is 256 times smaller, so that what is measured
times 256 is what OPT-350M itself would take, within 3 %:

    weights  L 12 h^2      activations  34 L h s      scores  n L s^2      logits  s v      each / 256

What is not to scale: biases and norms (they go with h alone, 1/16), adapters (rank 1 for rank 8), and 8-bit Adam (7 %
more: tensors of less than 4096 numbers keep their state in fp32, and here many are).

A step is taken twice, the second one is measured (measure.py), since Adam's state is made at the end of the first. The
book's rows with accumulation hold none: 1552 MB are 4.7 bytes a parameter, of which weights and gradients are 4, and
the rows with paged 8-bit Adam, whose state may be elsewhere, are the same. Here both are in.

    >>> print(format_table(fill(CASES[:2], attentions=("sdpa",))))

All cases take about two minutes on two cores.
"""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from minift.adapters.inject import add_lora
from minift.data.collate import Batch
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.optim.adamw import AdamW
from minift.optim.adamw8bit import AdamW8bit
from minift.quant.model import quantize_model
from minift.study.book_tables import ABLATIONS, INT8_ABLATIONS, MB, OPT_350M, Ablation, setting_of_row
from minift.study.ledger import predict
from minift.study.measure import Measured, measure_step
from minift.study.setting import Setting

NARROWER = 16  # on a CPU
HEADER = "{:<32}{:<10}{:>10}{:>10}{:>13}{:>8}{:>16}{:>7}"
OPTIMIZERS = {"adamw": AdamW, "adamw8bit": AdamW8bit}


@dataclass(frozen=True)
class Case:
    """A row of the tables.

    Attributes:
        book: the book's row.
        accumulation: micro-batches of a step; the book has one row for 8-bit Adam and for accumulation, here are two.
    """

    book: Ablation
    accumulation: int = 1

    @property
    def label(self) -> str:
        """As in book_tables, with int8 and accumulation."""
        text = self.book.label.replace("8-bit Adam", "accumulation") if self.accumulation > 1 else self.book.label
        return text.replace("fp32", "int8 fp32").replace("mixed", "int8 bf16")

    def setting(self, attention: str, narrower: int, device: str) -> Setting:
        """The same step of a model that is so many times narrower."""
        there = setting_of_row(self.book, attention)
        optimizer = "adamw" if self.accumulation > 1 else there.optimizer
        lora = there.lora and replace(there.lora, r=max(1, there.lora.r // narrower))
        return replace(there, config=narrow_opt(narrower), length=self.book.tokens // narrower, lora=lora,
                       optimizer=optimizer, accumulation=self.accumulation, device=device)  # fmt: skip


CASES = tuple(
    case for row in ABLATIONS for case in ((Case(row), Case(row, 2)) if row.small_state else (Case(row),))
)  # fmt: skip
INT8_CASES = tuple(map(Case, INT8_ABLATIONS))


def narrow_opt(narrower: int) -> ModelConfig:
    """OPT-350M with everything but its layers and heads divided.

    Raises:
        ValueError: the heads would be narrower than one number, or of no whole width.
    """
    width = OPT_350M.hidden_size // OPT_350M.num_attention_heads
    if narrower < 1 or width % narrower:
        raise ValueError(f"OPT-350M's heads of {width} numbers cannot be {narrower} times narrower: choose a divisor")
    return ModelConfig.from_dict({
        "model_type": "opt", "vocab_size": OPT_350M.vocab_size // narrower, "hidden_size": 1024 // narrower,
        "ffn_dim": 4096 // narrower, "num_hidden_layers": 24, "num_attention_heads": 16,
        "max_position_embeddings": 2048 // narrower, "word_embed_proj_dim": 512 // narrower,
        "do_layer_norm_before": False,
    })  # fmt: skip


@dataclass(frozen=True)
class Filled:
    """A case as it was found.

    Attributes:
        book: MB, of OPT-350M on the author's GPU.
        predicted: bytes, by the ledger.
        measured: bytes, the most at a time of a real step; None: there is not so much.
        narrower: how many times the model was.
    """

    case: Case
    attention: str
    book: int
    predicted: int
    measured: int | None
    narrower: int

    @property
    def enlarged(self) -> float | None:
        """MB that the step of OPT-350M itself would take, from what was measured."""
        return None if self.measured is None else self.measured * self.narrower**2 / MB


def fill(
    cases: Iterable[Case] = (*CASES, *INT8_CASES),
    attentions: Sequence[str] | None = None,
    device: str | None = None,
    narrower: int | None = None,
    progress: bool = True,
) -> list[Filled]:
    """Take a training step for every case and attention, and measure it.

    Args:
        attentions: of "eager", "sdpa" and "flash"; by default the first two on a CPU, where the third is no other in
            memory, and all on a GPU.
        device: "cpu" or "cuda"; by default a GPU where there is one.
        narrower: 1 is OPT-350M; by default 1 on a GPU and 16 on a CPU.
        progress: show a bar.

    Raises:
        ValueError: an unknown attention or device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    attentions = attentions or (("eager", "sdpa", "flash") if device == "cuda" else ("eager", "sdpa"))
    narrower = narrower or (1 if device == "cuda" else NARROWER)
    settings = [(case, name, case.setting(name, narrower, device)) for case in cases for name in attentions]
    found = []
    with tqdm(settings, desc="Training steps", unit=" steps", disable=not progress, leave=False) as bar:
        for case, attention, setting in bar:
            bar.set_postfix_str(f"{case.label}, {attention}")
            ledger = predict(setting)
            said = ledger.peak if device == "cuda" else ledger.peak_of_tensors
            taken = take_steps(setting)
            measured = taken and taken.peak
            found.append(Filled(case, attention, getattr(case.book, attention), said, measured, narrower))
    return found


def take_steps(setting: Setting, steps: int = 2) -> Measured | None:
    """Measure the last one of some steps of a model with random weights; None: out of memory.

    Args:
        steps: Adam's state is made at the end of the first one, so the second one holds more.
    """
    try:
        return _take_steps(setting, steps)
    except torch.OutOfMemoryError:
        return None
    finally:
        if setting.device == "cuda":
            gc.collect()  # what the failed step held through cycles
            torch.cuda.empty_cache()


def _take_steps(setting: Setting, steps: int) -> Measured:
    gpus = [torch.cuda.current_device()] if setting.device == "cuda" else []
    with torch.random.fork_rng(gpus), torch.device(setting.device):
        torch.manual_seed(0)
        model = CausalLM(setting.config, setting.attention).to(setting.dtype)
        ids = torch.randint(3, setting.config.vocab_size, (setting.batch, setting.length))
        positions = torch.arange(setting.length).repeat(setting.batch, 1)
    if setting.quantize:
        quantize_model(model, setting.quantize)
    if setting.lora:
        with torch.random.fork_rng(gpus):
            add_lora(model, setting.lora)
    batches = [Batch(ids.clone(), ids.clone(), positions.clone(), torch.zeros_like(ids))
               for _ in range(setting.accumulation)]  # fmt: skip
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[setting.optimizer](trained, lr=0.0)
    return measure_step(model, batches, optimizer, setting.checkpointing, steps)


def ratios(results: Sequence[Filled]) -> list[tuple[float, float | None]]:
    """Of each: the book's number and ours, to the first one that has the same attention."""
    first: dict[str, Filled] = {}
    for filled in results:
        first.setdefault(filled.attention, filled)
    return [
        (
            filled.book / first[filled.attention].book,
            filled.measured / base if filled.measured and (base := first[filled.attention].measured) else None,
        )
        for filled in results
    ]


def format_table(results: Sequence[Filled]) -> str:
    """All numbers in MB: what was predicted and measured here, the same for OPT-350M's size, and the book's."""
    lines = [HEADER.format("", "attention", "predicted", "measured", "as OPT-350M", "book", "to first: here", "book")]
    for filled, (there, here) in zip(results, ratios(results), strict=True):
        measured = f"{filled.measured / MB:>10,.2f}" if filled.measured else f"{'none':>10}"
        enlarged = f"{filled.enlarged:>13,.0f}" if filled.enlarged else f"{'':>13}"
        lines.append(
            f"{filled.case.label:<32}{filled.attention:<10}{filled.predicted / MB:>10,.2f}{measured}{enlarged}"
            f"{filled.book:>8,}{f'{here:.2f}' if here else '':>16}{there:>7.2f}"
        )
    return "\n".join(lines)
