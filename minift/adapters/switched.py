"""What each adapter of a model has a version of its own of, and how it is switched on and off.

    LoraLinear, LoraEmbedding    low-rank changes, which may be added up             lora.py, embedding.py
    WholeCopy                    a trained copy of a module                          whole.py
    TokenRows                    trained rows of an embedding                        tokens.py
    OwnBiases                    trained biases                                      biases.py

Each stands in the module tree in place of what it changes and keeps that as it was. `active` names the adapters that
take part: with none of them the model is the original one. Two copies of a module cannot be added up, so the last
three are `Exclusive`: at most one is active (PEFT has the same limit).
"""

from collections.abc import Callable

from torch import Tensor, nn

from minift.adapters.config import LoraConfig


class Switched(nn.Module):
    """A place in a model that holds something of each of several adapters.

    Attributes:
        base: what was there before, frozen.
        given: per adapter name, the settings as they were given for the whole model.
        configs: per adapter name, the settings of this place.
        active: names of the adapters that take part.
        route: what takes their place in a low-rank layer, if rows of a batch differ (serving.py): a function of the
            layer, its input and the base layer's output.
    """

    base: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, LoraConfig] = {}
        self.configs: dict[str, LoraConfig] = {}
        self.active: list[str] = []
        self.route: Callable[..., Tensor] | None = None

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """What an adapter trains here, by its name in PEFT's files, within this place."""
        raise NotImplementedError

    def file_tensors(self, adapter: str, path: str) -> dict[str, nn.Parameter]:
        """The same by the names in the model, if this place is at `path`."""
        return {f"{path}.{name}": tensor for name, tensor in self.tensors(adapter).items()}

    def accept(self, adapter: str, config: LoraConfig, own: LoraConfig | None = None) -> None:
        """Note the settings of an adapter and make it take part."""
        self.given[adapter], self.configs[adapter] = config, own or config
        self.active = [*self.active, adapter]

    def remove(self, adapter: str) -> None:
        """Forget an adapter."""
        self.active = [name for name in self.active if name != adapter]
        del self.given[adapter], self.configs[adapter]

    def put_back(self, model: nn.Module, path: str) -> None:
        """Take this place out of the model again, which it is in at `path`."""
        model.set_submodule(path, self.base)

    def scores(self, head: nn.Linear, x: Tensor) -> Tensor:
        """What the head computes that shares the matrix of this place (tied.py)."""
        raise NotImplementedError

    def merge_into(self, model: nn.Module, path: str) -> None:
        """Take this place out of the model, and leave what the active adapters make of it."""
        raise NotImplementedError


class Exclusive(Switched):
    """A place in which only one adapter can take part."""

    @property
    def active(self) -> list[str]:
        return self._active

    @active.setter
    def active(self, names: list[str]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if len(names) > 1:
            raise ValueError(f"adapters {', '.join(names)} each replace the same {self.kind()}; choose one of them")
        self._active = list(names)

    def kind(self) -> str:
        """What is replaced, for messages."""
        return type(self.base).__name__


def switched(model: nn.Module) -> dict[str, Switched]:
    """Every place of the model that adapters change, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Switched)}


def check_exclusive(model: nn.Module, adapters: list[str]) -> None:
    """Refuse adapters that cannot take part together, before anything is switched.

    Raises:
        ValueError: two of them replace the same module.
    """
    for path, place in switched(model).items():
        both = [name for name in adapters if name in place.configs]
        if isinstance(place, Exclusive) and len(both) > 1:
            raise ValueError(f"adapters {', '.join(both)} each have their own {path}; choose one of them")
