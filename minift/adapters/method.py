"""What every way of training few parameters has in common: it is added to a model, saved, loaded, and removed.

    method        what it trains                                                             file
    LoRA          a low-rank change of a weight                                              lora.py
    IA3           factors of keys, values and the MLP's inner state                          ia3.py
    bottleneck    small two-layer networks behind (or beside) the sublayers                  bottleneck.py
    prompts       tokens that are no words, in front of every text                           prompt.py, prefix.py
    BitFit, norms, full    parameters that the model has anyway                              own.py

LoRA has verbs of its own, because a model may hold many (many.py). A model holds at most one of the others, and not
beside LoRA. `add_adapter`, `save_adapter` and `load_adapter` (files.py) take any of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from minift.model.decoder import CausalLM


class Method(ABC):
    """The settings of a method, and what it does to a model. A frozen dataclass.

    Attributes:
        name: on the command line.
        peft_type: in adapter_config.json; PEFT's name where it has the method.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str]

    @abstractmethod
    def add(self, model: CausalLM) -> None:
        """Put the new parameters into the model, requiring gradients; the model's own are frozen already.

        Raises:
            ValueError: nothing in the model fits. The model is as it was, then.
        """

    @abstractmethod
    def remove(self, model: CausalLM) -> None:
        """Take them out again."""

    @abstractmethod
    def tensors(self, model: CausalLM) -> dict[str, Tensor]:
        """What is saved, by its name in the file (without "base_model.model."); usually the trained parameters."""

    def load(self, model: CausalLM, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors into a model that has the method; names and shapes have been compared."""
        for name, own in self.tensors(model).items():
            own.data.copy_(tensors[name])

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
