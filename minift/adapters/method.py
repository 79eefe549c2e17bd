"""What every way of training few parameters has in common: it is added to a model, saved, loaded, and removed.

    method        what it trains                                                             file
    LoRA          a low-rank change of a weight                                              lora.py
    IA3           factors of keys, values and the MLP's inner state                          ia3.py
    bottleneck    small two-layer networks behind (or beside) the sublayers                  bottleneck.py
    prompts       tokens that are no words, in front of every text                           prompt.py, prefix.py
    BitFit, norms, full    parameters that the model has anyway                              own.py

LoRA has verbs of its own, because a model may hold many (many.py). A model holds at most one of the others, and not
beside LoRA. `add_adapter`, `save_adapter` and `load_adapter` (verbs.py) take any of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from minift.adapters.folder import PREFIX
from minift.model.decoder import CausalLM

# What the adapter_config.json of every method of PEFT holds.
COMMON = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
)  # fmt: skip


class Method(ABC):
    """The settings of a method, and what it does to a model. A frozen dataclass.

    Attributes:
        name: on the command line.
        peft_type: in adapter_config.json; PEFT's name where it has the method.
        key_prefix: what PEFT puts before the names of `tensors` in the file.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str]
    key_prefix: ClassVar[str] = PREFIX

    @abstractmethod
    def add(self, model: CausalLM) -> None:
        """Put the new parameters into the model, requiring gradients; the model's own are frozen already.

        Raises:
            ValueError: nothing in the model fits. The model is as it was, then.
        """

    @abstractmethod
    def remove(self, model: CausalLM) -> None:
        """Take them out again: the model is what it was before, bit for bit, and frozen."""

    @abstractmethod
    def tensors(self, model: CausalLM) -> dict[str, Tensor]:
        """What is saved, by its name in the file (without `key_prefix`); usually the trained parameters."""

    def load(self, model: CausalLM, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors into a model that has the method; names and shapes have been compared."""
        for name, own in self.tensors(model).items():
            own.data.copy_(tensors[name])

    def merge(self, model: CausalLM) -> list[str]:
        """Fold it into the weights, for good.

        Returns:
            names of what was changed.

        Raises:
            ValueError: it computes what no weight of the model could.
        """
        raise ValueError(f"{self.name} cannot be merged: no weight of the model computes what it adds")

    @abstractmethod
    def to_file(self, model: CausalLM) -> dict[str, Any]:
        """The settings as adapter_config.json has them."""

    @classmethod
    @abstractmethod
    def of_file(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The settings in an adapter_config.json.

        Args:
            content: of adapter_config.json.
            tensors: the saved ones, whose names and shapes may say what the settings leave open.

        Raises:
            KeyError: a setting is missing.
            ValueError: one is not computed here.
        """


def method_of(model: nn.Module) -> Method | None:
    """The method that the model holds, if it is none of LoRA."""
    return getattr(model, "method", None)


def check_no_method(model: nn.Module, name: str) -> None:
    """Refuse a second method: which of them would be trained, saved and merged is anybody's guess."""
    held = method_of(model)
    if held is not None:
        raise ValueError(
            f"the model holds {held.name} already, and {name} cannot be added to it; delete_method(model) removes it"
        )


def check_settings(content: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse a setting of an adapter_config.json that a method does not have, unless it is off (null, false, empty).

    Args:
        content: of adapter_config.json.
        known: what the method has, besides what all have.

    Raises:
        ValueError: names the setting.
    """
    for key, value in content.items():
        if key not in known and key not in COMMON and value not in (None, False, "", [], {}):
            raise ValueError(f"{key}={value!r} is not supported")
