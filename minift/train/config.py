"""Every setting of a training run, each in one place: its default, its check and its help text on the command line."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from minift.data.encode import LOSS_ON, LossOn
from minift.data.packing import STRATEGIES, Strategy
from minift.data.report import Problems
from minift.optim.schedule import SCHEDULES

OPTIMIZERS = ("adamw8bit", "adamw")
DECAY_ORDERS = ("torch", "bnb")
CHECKPOINTING = ("off", "on", "selective")
Packing = Literal["none"] | Strategy
PACKING = ("none", *STRATEGIES)
LEAST = {
    "epochs": 1, "max_steps": 0, "batch_size": 1, "gradient_accumulation": 1, "warmup_steps": 0, "weight_decay": 0,
    "max_grad_norm": 0, "max_length": 2, "seed": 0, "save_every": 0, "log_every": 1,
    "eval_every": 0, "patience": 0, "keep_last": 1, "page_budget": 1,
}  # fmt: skip


def _setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`. The help texts below are the documentation; `minift train --help` prints them."""

    epochs: int = _setting(1, "Passes over the data.")
    max_steps: int = _setting(0, "Stop after this many optimizer steps, whatever `epochs` says; 0 means no limit.")
    batch_size: int = _setting(8, "Rows a micro-batch (with packing: packed rows).")
    gradient_accumulation: int = _setting(1, "Micro-batches an optimizer step.")
    lr: float = _setting(3e-4, "Highest learning rate.")
    schedule: str = _setting("linear", "How the learning rate falls after warm-up.", SCHEDULES)
    warmup_steps: int = _setting(0, "Steps over which the learning rate rises from 0.")
    weight_decay: float = _setting(0.0, "Decoupled weight decay.")
    max_grad_norm: float = _setting(1.0, "Scale gradients down to this norm if theirs is larger; 0 turns it off.")
    optimizer: str = _setting("adamw8bit", "adamw8bit keeps its state in 2 bytes a parameter, adamw in 8.", OPTIMIZERS)
    paged: bool = _setting(False, "Keep the state of adamw8bit in host memory, and fetch it page by page (exact).")
    page_budget: int = _setting(64, "With paged: MB of device memory for pages.")
    stochastic_rounding: bool = _setting(
        False, "Round 16-bit trained parameters by chance, so that small updates are not lost (adamw8bit)."
    )
    decay_order: str = _setting(
        "torch", "Decay weights before the update, as torch, or after it, as bnb's kernels (adamw8bit).", DECAY_ORDERS
    )
    loss_on: LossOn = _setting(
        "completion", "Train on all tokens, the completion (last assistant turn), or every assistant turn.", LOSS_ON
    )
    max_length: int = _setting(1024, "Cut rows after this many tokens; with packing, the length of a packed row.")
    problems: Problems = _setting(
        "stop",
        "What rows that cannot be trained on, or lose an answer when cut, do: stop the run, or are left out (drop).",
        ("stop", "drop"),
    )
    packing: Packing = _setting(
        "none", "Put several documents in one row: whole (bfd), long ones in pieces (bfd_split), or wrapped.", PACKING
    )
    group_by_length: bool = _setting(False, "Batch rows of similar length together, so that less is padding.")
    share_prefix: bool = _setting(
        True, "Compute the beginning that all rows of a micro-batch share only once (exact; not with dropout)."
    )
    shuffle: bool = _setting(True, "Draw the rows of each epoch in an order fixed by the seed.")
    gradient_checkpointing: str = _setting(
        "off",
        "Compute activations again in the backward pass: all (on: a third to a half slower, far less memory), or all "
        "but the products (selective).",
        CHECKPOINTING,
    )
    seed: int = _setting(0, "Seed of data order and dropout.")
    cache: str = _setting("", "Folder that keeps encoded rows, so that a second run on the same data starts at once.")
    output_dir: str = _setting("minift-run", "Folder for checkpoints, log and the trained adapter.")
    save_every: int = _setting(0, "Steps between checkpoints; 0 saves one at the end or when stopped.")
    keep_last: int = _setting(2, "Newest checkpoints that stay; older ones are deleted.")
    eval_every: int = _setting(0, "Steps between looks at the evaluation rows; 0 looks only after the last step.")
    patience: int = _setting(0, "Stop early after this many looks without a lower evaluation loss; 0 never does.")
    best: bool = _setting(
        False, "Keep the checkpoint of the lowest evaluation loss, too, and end with its weights instead of the last."
    )
    resume: bool = _setting(
        False, "Go on from the newest checkpoint in output_dir, if there is one; else those there are deleted."
    )
    log_every: int = _setting(1, "Steps between entries of log.json; log.jsonl has every step.")
    tensorboard: bool = _setting(True, "Write events for TensorBoard, too, where that is installed.")

    @property
    def row_limit(self) -> int | None:
        """Tokens after which a row is cut before it is packed; None for packing that goes on with the rest of it."""
        return None if self.packing in ("wrapped", "bfd_split") else self.max_length

    @property
    def checkpointing(self) -> bool | Literal["selective"]:
        """gradient_checkpointing as the model takes it."""
        return "selective" if self.gradient_checkpointing == "selective" else self.gradient_checkpointing == "on"

    def __post_init__(self) -> None:
        for name in ("output_dir", "cache"):
            object.__setattr__(self, name, os.fspath(getattr(self, name)))
        if isinstance(self.gradient_checkpointing, bool):
            object.__setattr__(self, "gradient_checkpointing", "on" if self.gradient_checkpointing else "off")
        for setting in fields(self):
            self._check(setting.name, getattr(self, setting.name), setting.default, setting.metadata)
        self._check_optimizer()
        if self.group_by_length and not self.shuffle:
            raise ValueError("group_by_length draws batches in random order: leave shuffle on, or group_by_length off")
        if not self.eval_every and (self.patience or self.best):
            name = "patience" if self.patience else "best"
            raise ValueError(f"{name} compares evaluations during the run: set eval_every to a number of steps")

    def _check_optimizer(self) -> None:
        """What only adamw8bit has is not silently left out by another optimizer."""
        for name in ("paged", "stochastic_rounding", "decay_order"):
            value = getattr(self, name)
            if self.optimizer != "adamw8bit" and value not in (False, "torch"):
                raise ValueError(f"{name} {value} needs optimizer adamw8bit, got {self.optimizer}")

    def _check(self, name: str, value: Any, default: Any, metadata: Mapping[str, Any]) -> None:
        """Among the choices, of the default's type (a whole number is a fine float), finite and in range."""
        if metadata["choices"] and value not in metadata["choices"]:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(metadata['choices'])}")
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        is_bool = isinstance(value, bool)
        if not isinstance(value, kinds) or is_bool != isinstance(default, bool):
            raise ValueError(f"{name} must be of type {type(default).__name__}, got {value!r}")
        if name == "lr" and not 0 < value < float("inf"):
            raise ValueError(f"lr must be positive, got {value}")
        if name in LEAST and not LEAST[name] <= value < float("inf"):
            raise ValueError(f"{name} must be at least {LEAST[name]}, got {value}")
