"""What fills memory in each stage of a training step, and which technique shrinks it by how much.

The four stages of a step (chapter 5 of Godoy's book, equations 5.1 and 5.6), and what is said to help:

    0  the model is loaded         weights               quantization (and so adapters: quantized weights stay frozen)
    1  batch, forward pass         batch                 gradient accumulation: fewer rows at a time
                                   activations           the same; checkpointing; fused attention
                                   logits                nothing more: here they exist a few rows at a time (step.py)
    2  backward pass               gradients             LoRA
    3  update                      optimizer state       LoRA; 8-bit state

Each number is a ledger's (ledger.py), of the same step with one setting changed.

Different from the book: it names gradient accumulation for the optimizer, too. The state of Adam is two numbers for
each trained parameter, however many micro-batches there are, so that entry shows no change here. And it has no
logits, which for a large vocabulary can be more than the activations.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from minift.adapters.lora import LoraConfig
from minift.quant.config import QuantConfig
from minift.study.ledger import Ledger, predict
from minift.study.setting import Setting


@dataclass(frozen=True)
class Shrinking:
    """A part of memory, and how many bytes of it are left with each technique.

    Attributes:
        stage: 0 to 3.
        part: what fills memory.
        bytes: as it is.
        left: bytes by technique.
    """

    stage: int
    part: str
    bytes: int
    left: dict[str, int]


STAGES = ("load the model", "batch, forward pass", "backward pass", "update")


def _with_lora(setting: Setting) -> Setting:
    return replace(setting, lora=LoraConfig())


TECHNIQUES: dict[str, Callable[[Setting], Setting]] = {
    "NF4 and LoRA": lambda setting: replace(_with_lora(setting), quantize=QuantConfig()),
    "LoRA": _with_lora,
    "accumulation": lambda s: replace(s, batch=1, accumulation=s.batch),
    "checkpointing": lambda setting: replace(setting, checkpointing=True),
    "fused attention": lambda setting: replace(setting, attention="sdpa"),
    "8-bit state": lambda setting: replace(setting, optimizer="adamw8bit"),
}
PARTS = (
    (0, "weights", ("weights", "adapters"), ("NF4 and LoRA",)),
    (1, "batch", ("batch",), ("accumulation",)),
    (1, "activations", ("kept activations",), ("accumulation", "checkpointing", "fused attention")),
    (1, "logits", ("logits",), ()),
    (2, "gradients", ("gradients",), ("LoRA", "accumulation")),
    (3, "optimizer", ("optimizer",), ("LoRA", "8-bit state", "accumulation")),
)


def shrinking(setting: Setting) -> list[Shrinking]:
    """The parts of a step and what each technique leaves of them.

    Args:
        setting: of a step without any of the techniques.

    Raises:
        ValueError: the setting uses one of them already, or has one row, of which there are no fewer.
    """
    if setting.lora or setting.quantize or setting.checkpointing or setting.accumulation > 1 or setting.batch < 2:
        raise ValueError("start from a plain step: all weights trained, nothing quantized, several rows at a time")
    if setting.attention != "eager" or setting.optimizer != "adamw":
        raise ValueError("start from a plain step: attention='eager' and optimizer='adamw'")
    plain = predict(setting)
    ledgers = {name: predict(change(setting)) for name, change in TECHNIQUES.items()}
    return [
        Shrinking(stage, part, _sum(plain, keys), {name: _sum(ledgers[name], keys) for name in names})
        for stage, part, keys, names in PARTS
    ]


def _sum(ledger: Ledger, keys: tuple[str, ...]) -> int:
    return sum(ledger.parts[key] for key in keys)
