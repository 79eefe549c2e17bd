"""Bottleneck adapters: small two-layer networks behind (or beside) the sublayers of every block.

    h = act(D x + c)                D: [m, d], down to a width m much smaller than d
    y = y0 + s * (U h + b)          U: [d, m], and up again

    Houlsby     x = y0 = what attention gives, and another one for what the MLP gives      2 adapters a block
    Pfeiffer    x = y0 = what the MLP gives                                                 1
    parallel    x = what the MLP gets, y0 = what it gives; s = 4                            1

                 +--------------------------------------+
    block:   x --+- norm - attention - [Houlsby] - (+) -+- norm -+- MLP - [Houlsby, Pfeiffer] - (+) -
                                                                 +------- [parallel] ---------+

An adapter has 2 m d + d + m parameters. They stand where the last linear of a sublayer was (`o_proj`, `down_proj`,
whatever the family calls it), so before a norm that follows it (Gemma 2) and before the sum with what went around.

Training starts at or near the unchanged model: D and U are drawn with deviation 0.02, so that U h is small beside y0;
the parallel form starts with U = 0, exactly unchanged.

LoRA is what is left of it without the activation, and that is why LoRA can be merged into a weight and this cannot: the
two products are paid in every forward pass, one after the other with the rest of the block. The parallel form reads the
input of the MLP, so its products could run at the same time as the MLP's (here they follow them).

Precision: D, U, c and b are fp32; the products run in the dtype of the activations.

Placement, activations, widths and initial values are those of adapter-hub's `adapters` (DoubleSeqBnConfig, SeqBnConfig,
ParBnConfig) but for one: its Pfeiffer adapter looks at the sum of the MLP's output and what went around it, as in BERT,
where a norm stands behind that sum; most decoders have none there, so here it looks at the output alone, as Houlsby's.
Its parallel adapter likewise gets the MLP's input before the norm, here after it, as the MLP does.

Files: this library's own, `peft_type` "HOULSBY", "PFEIFFER" or "PARALLEL". PEFT has none of these methods and refuses
such a folder.

Left out: dropout, norms within the adapter, gates, learned scalings, widths that differ between blocks.

Sources: Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247; He et al., arXiv 2110.04366. Files of
adapter-hub: `configuration/adapter_config.py`, `methods/modeling.py`. Here m is the width of the bottleneck.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from minift.adapters.method import Method, check_settings
from minift.model.decoder import CausalLM
from minift.quant.linear import QuantizedLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "swish": F.silu, "gelu": F.gelu, "tanh": F.tanh,
}  # fmt: skip
INITIAL_DEVIATION = 0.02  # BERT's


@dataclass(frozen=True)
class BottleneckConfig(Method):
    """Settings of a bottleneck adapter; choose one of the three below.

    Attributes:
        reduction_factor: width of the model divided by that of the bottleneck, which is rounded down, and at least 1.
        non_linearity: "relu", "swish", "gelu" or "tanh".
        scaling: what the adapter's output is multiplied by.
    """

    reduction_factor: float = 16
    non_linearity: str = "relu"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("reduction_factor", "scaling"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{self.name} {name} must be a positive number, got {value!r}")
        if self.non_linearity not in ACTIVATIONS:
            raise ValueError(
                f"{self.name} non_linearity {self.non_linearity!r}: choose one of {', '.join(ACTIVATIONS)}"
            )

    def add(self, model: CausalLM) -> None:
        for block in model.decoder.layers:
            mlp = mlp_of(model, block)
            mlp.down_proj = BottleneckLinear(mlp.down_proj, self)

    def remove(self, model: CausalLM) -> None:
        for path, module in list(model.named_modules()):
            if isinstance(module, BottleneckLinear | Tap):
                model.set_submodule(path, module.base)

    def tensors(self, model: CausalLM) -> dict[str, Tensor]:
        found = {path: module for path, module in model.named_modules() if isinstance(module, BottleneckLinear)}
        return {f"{path}.{name}": p for path, module in found.items() for name, p in module.own().items()}

    def to_file(self, model: CausalLM) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("reduction_factor", "non_linearity", "scaling")}

    @classmethod
    def of_file(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        settings = ("reduction_factor", "non_linearity", "scaling")
        check_settings(content, settings)
        return cls(*(content[name] for name in settings))


@dataclass(frozen=True)
class HoulsbyConfig(BottleneckConfig):
    """An adapter after attention and one after the MLP (adapter-hub: DoubleSeqBnConfig)."""

    name: ClassVar[str] = "houlsby"
    peft_type: ClassVar[str] = "HOULSBY"

    non_linearity: str = "swish"

    def add(self, model: CausalLM) -> None:
        for block in model.decoder.layers:
            attention: Any = block.attention
            attention.o_proj = BottleneckLinear(attention.o_proj, self)
        super().add(model)


@dataclass(frozen=True)
class PfeifferConfig(BottleneckConfig):
    """An adapter after the MLP (adapter-hub: SeqBnConfig)."""

    name: ClassVar[str] = "pfeiffer"
    peft_type: ClassVar[str] = "PFEIFFER"


@dataclass(frozen=True)
class ParallelConfig(BottleneckConfig):
    """An adapter beside the MLP (adapter-hub: ParBnConfig)."""

    name: ClassVar[str] = "parallel"
    peft_type: ClassVar[str] = "PARALLEL"

    reduction_factor: float = 2
    scaling: float = 4.0

    def add(self, model: CausalLM) -> None:
        first = "gate_up_proj" if model.config.family.gated and model.config.family.fused else "up_proj"
        for block in model.decoder.layers:
            mlp, passage = mlp_of(model, block), Passage()
            setattr(mlp, first, Tap(getattr(mlp, first), passage))
            mlp.down_proj = BottleneckLinear(mlp.down_proj, self, passage)


class Passage:
    """Takes the input of a block's MLP from its first linear to its last.

    Where it stands between them is the family's business (OPT has no module for its MLP). The tensor is given away when
    it is taken, so nothing outlives the forward pass.
    """

    def __init__(self) -> None:
        self._x: Tensor | None = None

    def put(self, x: Tensor) -> None:
        self._x = x

    def take(self) -> Tensor:
        x, self._x = self._x, None
        assert x is not None, "the last linear of an MLP ran before its first"
        return x


class Tap(nn.Module):
    """The first linear of an MLP, whose input the parallel adapter reads, too."""

    def __init__(self, base: nn.Linear | QuantizedLinear, passage: Passage):
        super().__init__()
        self.base, self.passage = base, passage
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        self.passage.put(x)
        return self.base(x)


class BottleneckLinear(nn.Module):
    """The last linear of a sublayer, and the adapter whose result is added to its output.

    Args:
        base: the layer it wraps, [.., i] -> [.., d], frozen.
        config: form and width.
        passage: where the adapter's input comes from; None: it is the output of `base`.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, config: BottleneckConfig, passage: Passage | None = None):
        super().__init__()
        width = base.out_features
        narrow = max(1, int(width // config.reduction_factor))
        self.base, self.passage, self.scaling = base, passage, config.scaling
        self.activation = ACTIVATIONS[config.non_linearity]
        self.adapter_down, self.adapter_up = nn.Linear(width, narrow), nn.Linear(narrow, width)
        if passage is None:
            nn.init.normal_(self.adapter_down.weight, std=INITIAL_DEVIATION)
            nn.init.normal_(self.adapter_up.weight, std=INITIAL_DEVIATION)
        else:
            nn.init.kaiming_uniform_(self.adapter_down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.adapter_up.weight)
        for linear in (self.adapter_down, self.adapter_up):
            nn.init.zeros_(linear.bias)
            linear.to(base.weight.device)
        self.train(base.training)

    def own(self) -> dict[str, nn.Parameter]:
        """D, c, U and b by their names in the file."""
        return {name: p for name, p in self.named_parameters() if name.startswith("adapter_")}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        seen = y if self.passage is None else self.passage.take()
        hidden = self.activation(_apply(self.adapter_down, seen))
        return y.add(_apply(self.adapter_up, hidden), alpha=self.scaling)


def mlp_of(model: CausalLM, block: nn.Module) -> Any:
    """The module that holds the linears of a block's MLP: the block itself, in OPT."""
    return block.mlp if model.config.family.name("mlp") else block


def _apply(linear: nn.Linear, x: Tensor) -> Tensor:
    """In the dtype of x."""
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
