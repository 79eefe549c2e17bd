"""Modules that are trained as a whole beside a LoRA (`modules_to_save`).

    norm(x)   ->   active adapter's copy of norm (x)        the original is kept, frozen

For what has no low rank or is too small to care: norms, or the embedding and the head when tokens are new. Each adapter
has a full copy in the model's dtype, which is trained, and saved under the module's own name. In bf16 that means bf16
weights, so that small updates may be rounded away: the optimizer must round at random, or the model be fp32.

Names are ends of module paths and, as in PEFT, not only after a dot: "layer_norm" means `self_attn_layer_norm` and
`final_layer_norm`. What lies in such a module is no target of LoRA.

Peer: PEFT `ModulesToSaveWrapper`.
"""

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minift.adapters.config import LoraConfig
from minift.adapters.switched import Exclusive
from minift.adapters.targets import HEAD
from minift.adapters.tied import unfollow


class WholeCopy(Exclusive):
    """A module, and a trained copy of it for each adapter.

    Attributes:
        base: the module, frozen.
        copies: per adapter name, its copy.
        shared: names of the adapters whose copy is also the head's matrix (tied.py).
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()
        self.shared: set[str] = set()

    def add(self, adapter: str, config: LoraConfig, shared: bool = False) -> None:
        """Create and activate a copy of the original."""
        self.copies[adapter] = copy.deepcopy(self.base).requires_grad_(True)
        if shared:
            self.shared.add(adapter)
        self.accept(adapter, config)

    def remove(self, adapter: str) -> None:
        """Forget a copy."""
        super().remove(adapter)
        del self.copies[adapter]
        self.shared.discard(adapter)

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """All parameters of the copy, by their names in the module."""
        return dict(self.copies[adapter].named_parameters())

    def file_tensors(self, adapter: str, path: str) -> dict[str, nn.Parameter]:
        """As `tensors`; a tied head's, too: PEFT writes and needs both."""
        own = super().file_tensors(adapter, path)
        return own | ({f"{HEAD}.weight": own[f"{path}.weight"]} if adapter in self.shared else {})

    @property
    def current(self) -> nn.Module:
        """The active copy, or the original."""
        return self.copies[self.active[0]] if self.active else self.base

    @property
    def weight(self) -> nn.Parameter:
        """Of a module that has one."""
        return self.current.get_parameter("weight")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)

    def scores(self, head: nn.Linear, x: Tensor) -> Tensor:
        """x [..., d] -> [..., v] with the embedding's copy, if it is meant for both."""
        return F.linear(x, self.weight, head.bias) if self.shared.intersection(self.active) else head(x)

    def put_back(self, model: nn.Module, path: str) -> None:
        """Take this place out of the model again."""
        unfollow(model, self)
        super().put_back(model, path)

    def merge_into(self, model: nn.Module, path: str) -> None:
        """Leave the active copy, frozen, in the model, and in the head if it is meant for both."""
        self.put_back(model, path)
        model.set_submodule(path, self.current.requires_grad_(False))
        if self.shared.intersection(self.active):
            model.get_submodule(HEAD).weight = self.weight
