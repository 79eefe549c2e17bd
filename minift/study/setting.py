"""A training step as the ledger sees it: the shapes that decide how much memory it takes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minift.adapters.inject import add_lora
from minift.adapters.lora import LoraConfig
from minift.model.attention import ATTENTION
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM, Checkpointing
from minift.numerics.dtypes import DTYPES
from minift.quant.config import QuantConfig
from minift.quant.model import swap_linears
from minift.train.config import OPTIMIZERS
from minift.train.step import LOGITS_AT_ONCE


@dataclass(frozen=True)
class Setting:
    """A training step.

    Attributes:
        config: the model's shape.
        batch, length: rows of a micro-batch, and tokens of a row, padding included.
        dtype: of embeddings, norms, and all activations.
        quantize: format of the linear layers; None: `dtype`.
        lora: the adapters; None: all parameters are trained.
        checkpointing: False, True or "selective".
        attention: "eager", "sdpa", "flash"; None: what the model would take.
        optimizer: "adamw8bit" or "adamw".
        packed: several documents in a row, or padding on the left: attention needs to know who sees whom.
        trained: tokens with a label in the micro-batch; None: all but each row's first.
        device: "cpu" or "cuda"; decides how many logits exist at a time.
    """

    config: ModelConfig
    batch: int = 1
    length: int = 512
    dtype: torch.dtype = torch.bfloat16
    quantize: QuantConfig | None = None
    lora: LoraConfig | None = None
    checkpointing: Checkpointing = False
    attention: str | None = None
    optimizer: str = "adamw8bit"
    packed: bool = False
    trained: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 2:
            raise ValueError(f"batch {self.batch} x length {self.length}: give at least 1 row of 2 tokens")
        if self.quantize and not self.lora:
            raise ValueError("quantized weights cannot be trained: give `lora`, or no `quantize`")
        if self.lora and self.lora.use_dora:
            raise ValueError("DoRA is not predicted: it decodes whole weights in every layer; give use_dora=False")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
        if self.checkpointing not in (False, True, "selective"):
            raise ValueError(f"checkpointing must be False, True or 'selective', got {self.checkpointing!r}")
        if self.attention is not None and self.attention not in ATTENTION:
            raise ValueError(f"unknown attention {self.attention!r}: choose one of {', '.join(ATTENTION)}")
        if self.device not in LOGITS_AT_ONCE:
            raise ValueError(f"unknown device {self.device!r}: choose one of {', '.join(LOGITS_AT_ONCE)}")
        if self.trained is not None and not 1 <= self.trained <= self.batch * (self.length - 1):
            raise ValueError(f"{self.trained} trained tokens; the batch can have 1 to {self.batch * (self.length - 1)}")


def setting_of(
    folder: Path, lora: LoraConfig | None, quantize: str | None, dtype: str, checkpointing: str, **shape: Any
) -> Setting:
    """The setting of a model's folder in the words of the command line.

    Args:
        folder: read for its config.json; a quantized checkpoint keeps its format.
        lora: the adapters; None: all parameters are trained.
        quantize: "nf4", "fp4", "int8" or "none"; None is nf4 for adapters and none without.
        dtype: "bfloat16", ...
        checkpointing: "off", "on" or "selective".
        shape: other fields of Setting.
    """
    config = ModelConfig.from_folder(folder)
    wanted = quantize or ("nf4" if lora else "none")
    format = config.quantization or (None if wanted == "none" else QuantConfig(wanted))
    again: Checkpointing = "selective" if checkpointing == "selective" else checkpointing == "on"
    return Setting(config, dtype=DTYPES[dtype], quantize=format, lora=lora, checkpointing=again, **shape)


def build(setting: Setting) -> CausalLM:
    """The model of a setting on the meta device: shapes, dtypes and what is trained, no memory."""
    with torch.device("meta"):
        model = CausalLM(setting.config, setting.attention).to(setting.dtype)
        if setting.quantize:
            swap_linears(model, setting.quantize)
        if setting.lora:
            add_lora(model, replace(setting.lora, init="default"))  # the others compute with the weights
    return model


def symbols_of(setting: Setting) -> dict[str, int]:
    """The values of the symbols of kept.py, and three of the head: w, the width that it reads; m, the rows that it
    reads in a micro-batch; c, those at a time."""
    config = setting.config
    rows = setting.trained or setting.batch * (setting.length - 1)
    return {
        "n": setting.batch * setting.length, "b": setting.batch, "s": setting.length, "d": config.hidden_size,
        "f": config.intermediate_size, "h": config.num_attention_heads, "g": config.num_key_value_heads,
        "e": config.head_dim, "v": config.vocab_size,
        "a": setting.dtype.itemsize, "w": config.embedding_size, "m": rows,
        "c": min(rows, max(1, LOGITS_AT_ONCE[setting.device] // config.vocab_size)),
    }  # fmt: skip
