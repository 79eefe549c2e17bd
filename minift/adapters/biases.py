"""Training the model's own biases along with LoRA (`bias="all"`, or "lora_only": those of the adapted layers).

PEFT trains the biases that are in the model, so the original ones are gone, and switching the adapter off does not
bring them back (it warns). Here each adapter has its own, which take the place of the originals while it is active:

    layer.bias    <->    own bias of the active adapter          the very same module, with another parameter

They are saved under the names PEFT gives them: `<path>.base_layer.bias` in a layer with LoRA, `<path>.bias` elsewhere.
Models without biases (Llama, Gemma) have nothing to train here, which is refused.
"""

from collections.abc import Callable, Mapping
from typing import Self

from torch import Tensor, nn

from minift.adapters.config import LoraConfig
from minift.adapters.switched import Exclusive

PLACE = "own_biases"  # of the module below in a model


class OwnBiases(Exclusive):
    """The biases of each adapter; a child of the model itself, which reaches into the others.

    Attributes:
        biases: per adapter name, its own.
        owners: per adapter name, the modules they belong to, by their keys in files (without ".bias").
        originals: the parameters that the active adapter's have replaced, by key.
    """

    def __init__(self) -> None:
        self.owners: dict[str, Mapping[str, nn.Module]] = {}
        self.originals: dict[str, nn.Parameter] = {}
        super().__init__()
        self.biases = nn.ModuleDict()

    def add(self, adapter: str, config: LoraConfig, owners: Mapping[str, nn.Module]) -> None:
        """Create and activate biases that begin as the model's.

        Args:
            owners: modules with a bias, by key.
        """
        self.owners[adapter] = owners
        self.biases[adapter] = nn.ParameterList(
            nn.Parameter(_bias(owner).detach().clone()) for owner in owners.values()
        )
        self.accept(adapter, config)

    def remove(self, adapter: str) -> None:
        """Forget an adapter's biases."""
        super().remove(adapter)
        del self.owners[adapter], self.biases[adapter]

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """The biases by their names in files."""
        own = self.biases.get_submodule(adapter).parameters()
        return {f"{key}.bias": bias for key, bias in zip(self.owners[adapter], own, strict=True)}

    def file_tensors(self, adapter: str, path: str) -> dict[str, nn.Parameter]:
        """As `tensors`: the keys are paths in the model already."""
        return self.tensors(adapter)

    @property
    def active(self) -> list[str]:
        return self._active

    @active.setter
    def active(self, names: list[str]) -> None:
        Exclusive.active.fset(self, names)  # pyright: ignore[reportOptionalCall]
        everyone = {key: owner for owners in self.owners.values() for key, owner in owners.items()}
        for key, original in self.originals.items():
            everyone[key].bias = original
        self.originals = {}
        for name in names:
            for (key, owner), own in zip(self.owners[name].items(), self.tensors(name).values(), strict=True):
                self.originals[key], owner.bias = _bias(owner), own

    def kind(self) -> str:
        return "biases"

    def put_back(self, model: nn.Module, path: str) -> None:
        """Leave the model with the original biases."""
        self.active = []
        delattr(model, path)

    def merge_into(self, model: nn.Module, path: str) -> None:
        """Leave the model with the active biases, frozen."""
        self.requires_grad_(False)
        delattr(model, path)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The originals are in no module while they are replaced; `.to(device)` must find them all the same."""
        super()._apply(fn, recurse)
        for bias in self.originals.values():
            bias.data = fn(bias.data)
        return self


def _bias(owner: nn.Module) -> nn.Parameter:
    bias = owner.bias
    assert isinstance(bias, nn.Parameter)
    return bias
