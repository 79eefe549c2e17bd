"""A training step as the ledger sees it: the shapes that decide how much memory it takes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minift.adapters.inject import add_lora, lora_layers
from minift.adapters.lora import LoraConfig
from minift.adapters.method import method_of
from minift.adapters.own import FullConfig
from minift.adapters.switched import switched
from minift.data.collate import Batch
from minift.model.attention import ATTENTION
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM, Checkpointing
from minift.numerics.dtypes import DTYPES
from minift.quant.config import QuantConfig
from minift.quant.linear import QuantizedLinear
from minift.quant.model import swap_linears
from minift.train.config import OPTIMIZERS, TrainConfig
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
        accumulation: micro-batches of a step; from the second on, all gradients are there from the beginning.
        shared: lengths of a prefix and of the rest of each row, in one sequence (Batch.shared_prefix).
        pages: bytes of device memory for optimizer state in host memory; 0: it is not paged.
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
    accumulation: int = 1
    shared: tuple[int, tuple[int, ...]] | None = None
    pages: int = 0

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
        if self.accumulation < 1:
            raise ValueError(f"accumulation must be at least 1 micro-batch, got {self.accumulation}")
        if self.shared and (self.batch, self.length) != (1, self.shared[0] + sum(self.shared[1])):
            raise ValueError(
                f"a shared prefix {self.shared} is 1 row of that many tokens, got {self.batch} x {self.length}"
            )

    @property
    def rows(self) -> int:
        """Rows of the data in a micro-batch."""
        return len(self.shared[1]) if self.shared else self.batch

    def halved(self, what: str) -> "Setting":
        """The same with half the `what`: "rows" of a micro-batch, of which one stays, or "length" of each row."""
        if what == "rows" and self.rows == 1:
            return self
        share = None if self.trained is None else max(1, self.trained // 2)
        if self.shared is None:
            if what == "rows":
                return replace(self, batch=self.batch // 2, trained=share)
            return replace(self, length=max(2, self.length // 2), trained=share)
        prefix, rows = self.shared
        if what == "rows":
            rows = rows[: len(rows) // 2]
        else:
            limit = max(2, (prefix + max(rows)) // 2)
            prefix = min(prefix, limit - 1)
            rows = tuple(min(row, limit - prefix) for row in rows)
        return replace(self, shared=(prefix, rows), length=prefix + sum(rows), trained=share)


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


def setting_of_batch(model: CausalLM, batch: Batch, config: TrainConfig, micro_batches: int = 1) -> Setting:
    """The setting of a step of a run: a model that is ready to train, one of its micro-batches, its settings.

    Raises:
        ValueError: the model holds an adapter of a kind that is not predicted.
    """
    method, layers = method_of(model), lora_layers(model)
    others = [path for path in switched(model) if path not in layers]
    if (method is not None and not isinstance(method, FullConfig)) or others:
        what = f"what is trained at {others[0]}" if others else getattr(method, "name", "")
        raise ValueError(f"{what} is not predicted, only LoRA of linear layers and the training of all parameters")
    rows, length = batch.input_ids_bs.shape
    quantized = next((m.config for m in model.modules() if isinstance(m, QuantizedLinear)), None)
    lora = next((given for layer in layers.values() for given in layer.given.values()), None)
    paged = config.optimizer == "adamw8bit" and config.paged
    return Setting(
        config=model.config, batch=rows, length=length, dtype=model.dtype, quantize=quantized, lora=lora,
        checkpointing=config.checkpointing,
        attention=next(name for name, kind in ATTENTION.items() if kind is model.attention),
        optimizer=config.optimizer, packed=batch.needs_mask, trained=max(1, batch.trained_tokens),
        device=model.device.type, accumulation=micro_batches, shared=batch.shared_prefix,
        pages=config.page_budget * 10**6 if paged else 0,
    )  # fmt: skip


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
    reads in a micro-batch; c, those at a time. Of a shared prefix: p, its tokens; q, the rows; t, the longest rest."""
    config = setting.config
    rows = setting.trained or setting.batch * (setting.length - 1)
    prefix, rest = setting.shared or (0, (0,))
    return {
        "n": setting.batch * setting.length, "b": setting.batch, "s": setting.length, "d": config.hidden_size,
        "f": config.intermediate_size, "h": config.num_attention_heads, "g": config.num_key_value_heads,
        "e": config.head_dim, "v": config.vocab_size,
        "a": setting.dtype.itemsize, "w": config.embedding_size, "m": rows,
        "c": min(rows, max(1, LOGITS_AT_ONCE[setting.device] // config.vocab_size)),
        **({"p": prefix, "q": len(rest), "t": max(rest)} if setting.shared else {}),
    }  # fmt: skip
