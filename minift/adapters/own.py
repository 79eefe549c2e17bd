"""Training parameters that the model has anyway: its biases, its norms, or all of them.

    BitFit       every bias, of linears and LayerNorms     opt-350m: 11 d a block, 0.08 % of the model
    norms        the weights (and biases) of norms          Llama: 2 d a block + d
    full         everything

Nothing is added to the forward pass, and nothing has to be merged: the model that comes out has the shape of the one
that went in. It is the smallest change for BitFit and norms, and full fine-tuning is what all other methods are
compared with. Its price is memory: for each parameter its gradient and the optimizer's state.

**Models without biases.** Llama, Mistral, Qwen 3, Phi-3, Gemma and SmolLM have no bias at all. BitFit then gives each
linear of the blocks one that starts at zero (which changes nothing until it is trained): that is a network with more
parameters than the model's own, so its checkpoint has no place for them, and the paper does not speak of it. A model
that has some biases (Qwen 2: those of q, k and v) trains just these. The bias of a quantized layer is not quantized.

**Dtypes.** A parameter is trained in the dtype that it has. In bf16, an update smaller than about 1/512 of a parameter
is rounded away; `AdamW8bit(stochastic_rounding=True)` (optim/adamw8bit.py) keeps it on average, loading the model in
fp32 keeps it exactly. PEFT trains norms in the model's dtype, too.

Removing BitFit or norms puts back the values from before, of which a copy is kept in host memory. Full fine-tuning
keeps none, since that would be one more copy of the model: removing it freezes what has been learned, and what was
there before is in the model's folder.

Files: norms as PEFT's LN_TUNING, both ways. PEFT has no BitFit and no full fine-tuning of its own; "BITFIT" and "FULL"
are this library's, with the parameters under their names in the model (GPT-2's linears are [out, in] here, and so they
are in this file). For a folder that others read, save the whole model (model/save.py).

Sources: Ben Zaken et al., BitFit, arXiv 2106.10199; Zhao et al., LayerNorm tuning, arXiv 2312.11420; PEFT
`tuners/ln_tuning`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minift.adapters.config import ALL_LINEAR
from minift.adapters.method import Method, check_settings
from minift.adapters.targets import Names, is_target, listed, names_or_pattern, short_names
from minift.model.decoder import CausalLM
from minift.model.layers import RMSNorm
from minift.quant.linear import QuantizedLinear

# PEFT's table (TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING) for the architectures that are loaded here. It
# knows nothing of opt, phi3 and smollm3.
_AROUND = ("input_layernorm", "post_attention_layernorm", "norm")
_AROUND_EACH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm", "norm")  # fmt: skip
USUAL: dict[str, tuple[str, ...]] = {
    "llama": _AROUND,
    "mistral": _AROUND,
    "gemma": _AROUND,
    "gemma2": _AROUND_EACH,
    "gemma3_text": _AROUND_EACH,
    "qwen2": ("post_attention_layernorm",),
    "qwen3": ("post_attention_layernorm",),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
}


class OwnParameters(Method):
    """What the three have in common: they choose parameters, train them in place, and can put back what was there."""

    @abstractmethod
    def choose(self, model: CausalLM) -> list[str]:
        """Names of the parameters to train; a bias may be one that does not exist yet.

        Raises:
            ValueError: there are none.
        """

    def file_name(self, name: str) -> str:
        """What the file calls a parameter."""
        return name

    def add(self, model: CausalLM) -> None:
        originals: dict[str, Tensor | None] = {}
        for name in self.choose(model):
            module, _, last = name.rpartition(".")
            p = getattr(model.get_submodule(module), last)
            if p is None:
                p = add_bias(model.get_submodule(module))
                originals[name] = None
            else:
                originals[name] = p.detach().to("cpu", copy=True)
            p.requires_grad_(True)
        model.originals = originals

    @torch.no_grad()
    def remove(self, model: CausalLM) -> None:
        for name, original in model.originals.items():
            if original is None:
                model.get_submodule(name.rpartition(".")[0]).register_parameter("bias", None)
            else:
                model.get_parameter(name).copy_(original).requires_grad_(False)
        del model.originals

    def merge(self, model: CausalLM) -> list[str]:
        names, added = list(model.originals), self.added(model)
        if added:
            raise ValueError(f"{self.name} cannot be merged: checkpoints of this model have no place for {added[0]}")
        model.requires_grad_(False)
        del model.originals
        model.method = None
        return names

    def added(self, model: CausalLM) -> list[str]:
        """Names of the parameters that the model did not have."""
        return [name for name, original in model.originals.items() if original is None]

    def tensors(self, model: CausalLM) -> dict[str, Tensor]:
        return {self.file_name(name): model.get_parameter(name) for name in model.originals}

    def to_file(self, model: CausalLM) -> dict[str, Any]:
        return {}

    @classmethod
    def of_file(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        check_settings(content, ())
        return cls()


@dataclass(frozen=True)
class BitFitConfig(OwnParameters):
    """Train every bias; a model that has none gets one for each linear of its blocks, starting at zero."""

    name: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BITFIT"

    def choose(self, model: CausalLM) -> list[str]:
        biases = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
        if biases:
            return biases
        family = model.config.family
        blocks = f"{family.name('decoder')}.{family.name('layers')}."
        linears = (path for path, module in model.named_modules() if isinstance(module, nn.Linear | QuantizedLinear))
        return [f"{path}.bias" for path in linears if path.startswith(blocks)]


@dataclass(frozen=True)
class NormConfig(OwnParameters):
    """Train norms (PEFT: LN_TUNING).

    Attributes:
        target_modules: a list of names (each the last part or parts of a module path), or one regular expression for
            whole paths; None: those that PEFT trains in the architecture.
        exclude_modules: norms to leave out, in the same form.
    """

    name: ClassVar[str] = "norms"
    peft_type: ClassVar[str] = "LN_TUNING"

    target_modules: Names | None = None
    exclude_modules: Names = ()

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, names_or_pattern(f"norms {name}", getattr(self, name)))
        if self.exclude_modules is None:
            object.__setattr__(self, "exclude_modules", ())
        if self.target_modules == ALL_LINEAR:
            raise ValueError("norms target_modules 'all-linear': name norms, or leave it None")

    def targets(self, model: CausalLM) -> Names:
        """`target_modules`, or what is usual."""
        if self.target_modules is not None:
            return self.target_modules
        architecture = model.config.model_type
        if architecture not in USUAL:
            raise ValueError(
                f"there are no usual norms to train in {architecture!r}, only in {', '.join(USUAL)}; name "
                f"target_modules, of {short_names(norms(model))}"
            )
        return USUAL[architecture]

    def choose(self, model: CausalLM) -> list[str]:
        found, targets = norms(model), self.targets(model)
        each = {targets: targets} if isinstance(targets, str) else {name: (name,) for name in targets}
        strange = [name for name, target in each.items() if not any(is_target(path, target) for path in found)]
        if strange or not each:
            raise ValueError(f"no norm matches target {strange or targets!r}; norms here: {short_names(found)}")
        chosen = [
            path for path in found if is_target(path, targets) and not is_target(path, self.exclude_modules or ())
        ]
        if not chosen:
            raise ValueError(f"exclude_modules={self.exclude_modules!r} leaves no norm of target {targets!r}")
        return [f"{path}.{name}" for path in chosen for name, _ in found[path].named_parameters()]

    def file_name(self, name: str) -> str:
        path, _, last = name.rpartition(".")
        return f"{path}.ln_tuning_layers.{last}"

    def to_file(self, model: CausalLM) -> dict[str, Any]:
        return {
            "target_modules": listed(self.targets(model)),
            "exclude_modules": listed(self.exclude_modules) or None,
            "modules_to_save": None,
        }

    @classmethod
    def of_file(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        check_settings(content, ("target_modules", "exclude_modules"))
        return cls(content["target_modules"], content.get("exclude_modules") or ())


@dataclass(frozen=True)
class FullConfig(OwnParameters):
    """Train every parameter; refused for a quantized model."""

    name: ClassVar[str] = "full"
    peft_type: ClassVar[str] = "FULL"

    def add(self, model: CausalLM) -> None:
        model.originals = dict.fromkeys(self.choose(model))
        model.requires_grad_(True)

    def remove(self, model: CausalLM) -> None:
        model.requires_grad_(False)
        del model.originals

    def added(self, model: CausalLM) -> list[str]:
        return []

    def choose(self, model: CausalLM) -> list[str]:
        for path, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                raise ValueError(
                    f"full fine-tuning changes the weights, and {path} is quantized ({module.config.label}), so it has "
                    "no gradient; load the model without quantization, or train an adapter"
                )
        return [name for name, _ in model.named_parameters()]


def add_bias(linear: nn.Module) -> nn.Parameter:
    """Give a linear layer without a bias one of zeros, in the dtype of the layers around it."""
    assert isinstance(linear, nn.Linear | QuantizedLinear)
    dtype = linear.dtype if isinstance(linear, QuantizedLinear) else linear.weight.dtype
    linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=linear.weight.device))
    return linear.bias


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Every norm that has parameters, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, RMSNorm | nn.LayerNorm) and next(module.parameters(), None) is not None
    }
