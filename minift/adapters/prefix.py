"""Prefix tuning: learn the keys and values that n virtual tokens have in every layer.

    keys of a layer      K_1 ... K_n | k(the) k(text) ...        K, V: trained, n * 2 * g * e numbers a layer
    values of a layer    V_1 ... V_n | v(the) v(text) ...

All that other tokens ever get from a token is its keys and values, so these are as much as a prompt could do, layer by
layer, and more than prompt tuning can: what no embedding leads to can be learned, too. The price is n * L * 2 * g * e
parameters (20 tokens of SmolLM2-135M with 30 layers, 3 heads of 64: 230,400).

K is what attention sees: it is put in after q and k norms and after the rotation, so nothing turns it by its position.
In between, slots are computed like other tokens, from an embedding that means nothing, and each layer throws their keys
and values away. That costs n / s more time than skipping them would, and keeps packing, windows and shared prefixes
what they are (virtual.py).

`projection`: learned as n embeddings of g * e numbers, and a net of two layers that computes K and V of all layers
from them; the paper found this to train more stably. A file holds what it computed, and the net is gone.

    K, V of all layers = W2 tanh(W1 x + b1) + b2                 x [n, g e], hidden size f

It starts from a normal distribution of deviation 1, or from zero. Zero is not "no change", either: a key of zeros has
the score 0, which takes its share of the softmax, and its value adds nothing.

Sources: arXiv 2101.00190; PEFT `tuners/prefix_tuning/model.py`, `peft_model.py` (`get_prompt`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minift.adapters.virtual import Layout, Table, VirtualMethod
from minift.model.cache import LayerCache
from minift.model.decoder import CausalLM, Slots


@dataclass(frozen=True)
class PrefixTuningConfig(VirtualMethod):
    """Settings of prefix tuning.

    Attributes:
        projection: compute keys and values by a net while training.
        encoder_hidden_size: f of the net; None is g * e.
        init: "zero", or "random" (PEFT's default: normal with deviation 1; on SmolLM2-135M it did not begin to learn).
    """

    projection: bool = False
    encoder_hidden_size: int | None = None
    init: str = "zero"

    name: ClassVar[str] = "prefix-tuning"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    settings: ClassVar[tuple[str, ...]] = ("prefix_projection", "encoder_hidden_size", "init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("random", "zero"):
            raise ValueError(f"prefix tuning init {self.init!r}: choose 'random' or 'zero'")
        hidden = self.encoder_hidden_size
        if hidden is not None and (not isinstance(hidden, int) or hidden < 1):
            raise ValueError(f"prefix tuning encoder_hidden_size must be at least 1, got {hidden!r}")

    def token_shape(self, model: CausalLM) -> tuple[int, int]:
        groups = model.config.num_key_value_heads
        return groups, groups * model.config.head_dim

    def hidden_size(self, model: CausalLM) -> int:
        """f."""
        return self.encoder_hidden_size or self.token_shape(model)[1]

    def encoder(self, model: CausalLM) -> nn.Module:
        n, width = self.num_virtual_tokens, self.token_shape(model)[1]
        whole = 2 * model.config.num_hidden_layers * width
        if self.projection:
            return Projection(n, width, self.hidden_size(model), whole, self.init == "zero")
        values = torch.randn(n, whole, device="cpu")
        return Table(values.zero_() if self.init == "zero" else values)

    def slots(self, model: CausalLM) -> Callable[[Layout, Tensor], Slots]:
        layers, groups = model.config.num_hidden_layers, model.config.num_key_value_heads

        def key_value_slots(layout: Layout, values_nd: Tensor) -> Slots:
            parts = values_nd.unflatten(-1, (2 * layers, groups, -1)).unbind(1)
            return KeyValueSlots(layout, tuple(zip(parts[::2], parts[1::2], strict=True)))

        return key_value_slots

    def to_file(self, model: CausalLM) -> dict[str, Any]:
        return super().to_file(model) | {
            "encoder_hidden_size": self.hidden_size(model),
            "init_weights": "zero" if self.init == "zero" else None,
            "prefix_projection": self.projection,
        }

    @classmethod
    def of_file(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        cls.check_file(content)
        return cls(
            num_virtual_tokens=content["num_virtual_tokens"],
            projection=bool(content.get("prefix_projection")),
            encoder_hidden_size=content.get("encoder_hidden_size"),
            init=content.get("init_weights") or "random",
        )


class Projection(nn.Module):
    """The net; its parts are called, and drawn in the order, as in PEFT."""

    def __init__(self, n: int, width: int, hidden: int, whole: int, zero: bool):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(n, width, device="cpu"))
        first, last = nn.Linear(width, hidden), nn.Linear(hidden, whole)
        self.transform = nn.Sequential(first, nn.Tanh(), last)
        if zero:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self) -> Tensor:
        """Keys and values, fp32 [n, L * 2 * g * e]."""
        return self.transform(self.embedding)


@dataclass(frozen=True)
class KeyValueSlots:
    """Slots with keys and values of their own in every layer.

    Attributes:
        layout: where they are.
        layers: keys and values of each layer, [n, g, e], fp32.
    """

    layout: Layout
    layers: tuple[tuple[Tensor, Tensor], ...]

    def embed(self, x_bsd: Tensor) -> Tensor:
        return x_bsd

    def through(self, layer: int, cache: LayerCache | None) -> "Overwriting":
        return Overwriting(self.layout, *self.layers[layer], cache)


@dataclass(frozen=True)
class Overwriting:
    """Takes a layer's keys and values in place of its cache, puts in those of the slots, and hands them on.

    Attributes:
        layout: where the slots are.
        k_nge, v_nge: their keys and values.
        cache: of the layer, if there is one.
    """

    layout: Layout
    k_nge: Tensor
    v_nge: Tensor
    cache: LayerCache | None

    def append(self, k_bgse: Tensor, v_bgse: Tensor) -> tuple[Tensor, Tensor]:
        """As LayerCache's."""
        k_bgse, v_bgse = (
            self.layout.fill(x.transpose(1, 2), values).transpose(1, 2)
            for x, values in ((k_bgse, self.k_nge), (v_bgse, self.v_nge))
        )
        return self.cache.append(k_bgse, v_bgse) if self.cache is not None else (k_bgse, v_bgse)
