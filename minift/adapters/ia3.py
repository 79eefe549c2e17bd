"""IA3: multiply what a linear layer gives, or gets, by learned factors.

    keys, values     y = l * (W x + b)        one factor for each output feature
    feed-forward     y = W (l * x) + b        one factor for each input feature: the inner state of the MLP

"Infused adapter by inhibiting and amplifying inner activations": a factor above 1 makes a feature matter more, one near
0 switches it off. All begin at 1, so training starts from the unchanged model. A block of Llama trains g e + g e + f
numbers (keys, values, MLP), in SmolLM2-135M 1 for 42 of LoRA's (rank 8, all linears); in exchange nothing new can be
computed, only weighed. Learning rates are ten times LoRA's (the paper: 3e-3).

The backward pass, with h = W x + b:

    on the output    dl = sum over tokens of dy * h         dh = l * dy
    on the input     dl = sum over tokens of (dy W) * x     dx = l * (dy W)

Precision: factors are fp32; the product is taken in fp32 and rounded to the dtype of the activation.

The factors of an output scale the rows of W (and b), those of an input its columns. So they can be merged: W' = l W,
after which the method costs nothing (`merge_ia3`).

Which layers: `target_modules` as for LoRA (targets.py), and those of them that `feedforward_modules` names are scaled
at their input. None means what PEFT does in an architecture. The paper scales keys and values; PEFT's table says
queries and values for Qwen and Gemma, queries and keys for OPT.

Difference to PEFT: over a 4-bit layer in a 16-bit model, PEFT 0.21 returns fp32 where its input was bf16, and attention
then refuses keys in fp32 beside queries in bf16, unless autocast is on. Here the result has the dtype of the input.

Left out: several IA3s in one model, convolutions, `modules_to_save`.

Sources: Liu et al., arXiv 2205.05638; PEFT `tuners/ia3`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minift.adapters.config import LoraConfig
from minift.adapters.inject import linear_layers
from minift.adapters.method import Method, check_settings
from minift.adapters.targets import Names, listed, names_or_pattern, select
from minift.model.decoder import CausalLM
from minift.quant.linear import QuantizedLinear, plain_linear

# PEFT's tables (TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING and ..._FEEDFORWARD_...) for the architectures that
# are loaded here; they know nothing of phi3 and smollm3. The last of each row is its feed-forward layer.
USUAL: dict[str, tuple[str, ...]] = {
    "llama": ("k_proj", "v_proj", "down_proj"),
    "mistral": ("k_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "qwen3": ("q_proj", "v_proj", "down_proj"),
    "gemma": ("q_proj", "v_proj", "down_proj"),
    "gemma2": ("q_proj", "v_proj", "down_proj"),
    "gemma3_text": ("q_proj", "v_proj", "down_proj"),
    "opt": ("q_proj", "k_proj", "fc2"),
    "gpt2": ("c_attn", "mlp.c_proj"),
}


@dataclass(frozen=True)
class IA3Config(Method):
    """Settings of IA3.

    Attributes:
        target_modules: a list of names (each the last part or parts of a module path), one regular expression for whole
            paths, or "all-linear"; None: those usual for the architecture.
        feedforward_modules: which of these are scaled at their input: a list of ends of paths, or one regular
            expression; None: the usual one.
        exclude_modules: layers to leave out: a list of names, or one regular expression.
        init_ia3_weights: begin at 1; False: normal random numbers, for experiments.
    """

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"

    target_modules: Names | None = None
    feedforward_modules: Names | None = None
    exclude_modules: Names = ()
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("target_modules", "feedforward_modules", "exclude_modules"):
            object.__setattr__(self, name, names_or_pattern(f"IA3 {name}", getattr(self, name)))
        if self.exclude_modules is None:
            object.__setattr__(self, "exclude_modules", ())
        targets, inner = self.target_modules, self.feedforward_modules
        if isinstance(targets, tuple) and isinstance(inner, tuple) and not set(inner) <= set(targets):
            raise ValueError(f"IA3 feedforward_modules {inner} must be among target_modules {targets}")

    def spelled_out(self, architecture: str) -> Self:
        """The settings with what is usual for the architecture in place of None.

        Raises:
            ValueError: nothing is usual for this one.
        """
        missing = [name for name in ("target_modules", "feedforward_modules") if getattr(self, name) is None]
        if not missing:
            return self
        if architecture not in USUAL:
            raise ValueError(
                f"there is no usual place for IA3 in {architecture!r}, only in {', '.join(USUAL)}; name "
                f"{' and '.join(missing)}: the projections of keys and values, and the last layer of the MLP"
            )
        usual = USUAL[architecture]
        targets = usual if self.target_modules is None else self.target_modules
        inner = usual[-1:] if self.feedforward_modules is None else self.feedforward_modules
        if isinstance(targets, tuple) and isinstance(inner, tuple):
            inner = tuple(name for name in inner if name in targets)
        return replace(self, target_modules=targets, feedforward_modules=inner)

    def add(self, model: CausalLM) -> None:
        config = self.spelled_out(model.config.model_type)
        layers = linear_layers(model)
        where = LoraConfig(target_modules=config.target_modules, exclude_modules=config.exclude_modules)
        _, chosen = select(list(layers), where)
        for path in chosen:
            base = layers[path]
            assert isinstance(base, nn.Linear | QuantizedLinear)
            wrapped = IA3Linear(base, config.is_feedforward(path), config.init_ia3_weights)
            model.set_submodule(path, wrapped.train(base.training))

    def is_feedforward(self, path: str) -> bool:
        """Whether a layer is scaled at its input; ends of paths count without a dot before them, as PEFT's do."""
        inner = self.feedforward_modules
        assert inner is not None
        return bool(re.fullmatch(inner, path)) if isinstance(inner, str) else path.endswith(inner)

    def remove(self, model: CausalLM) -> None:
        for path, layer in ia3_layers(model).items():
            model.set_submodule(path, layer.base)

    def tensors(self, model: CausalLM) -> dict[str, Tensor]:
        return {f"{path}.ia3_l": layer.ia3_l for path, layer in ia3_layers(model).items()}

    def merge(self, model: CausalLM) -> list[str]:
        return merge_ia3(model)

    def to_file(self, model: CausalLM) -> dict[str, Any]:
        config = self.spelled_out(model.config.model_type)
        return {
            "target_modules": listed(config.target_modules),
            "feedforward_modules": listed(config.feedforward_modules),
            "exclude_modules": listed(config.exclude_modules) or None,
            "fan_in_fan_out": model.config.family.transposed,
            "init_ia3_weights": config.init_ia3_weights,
            "modules_to_save": None,
        }

    @classmethod
    def of_file(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        settings = ("target_modules", "feedforward_modules", "exclude_modules", "init_ia3_weights")
        check_settings(content, (*settings, "fan_in_fan_out"))
        return cls(
            content["target_modules"], content["feedforward_modules"], content.get("exclude_modules") or (),
            content.get("init_ia3_weights", True),
        )  # fmt: skip


class IA3Linear(nn.Module):
    """A linear layer and the factors of its output, or of its input.

    Attributes:
        base: the layer it wraps, frozen.
        on_input: which of the two.
        ia3_l: the factors, fp32, [out, 1] or [1, in] (so that they multiply a weight [out, in]).
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, on_input: bool, ones: bool = True):
        super().__init__()
        self.base, self.on_input = base, on_input
        # Drawn even if not used, as PEFT does: whatever is drawn later from the same seed is the same, too.
        drawn = torch.randn((1, base.in_features) if on_input else (base.out_features, 1), device="cpu")
        self.ia3_l = nn.Parameter((torch.ones_like(drawn) if ones else drawn).to(base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        factors = self.ia3_l.flatten()
        if self.on_input:
            return self.base((x * factors).to(x.dtype))
        y = self.base(x)
        return (y * factors).to(y.dtype)


def ia3_layers(model: nn.Module) -> dict[str, IA3Linear]:
    """Every layer with factors, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, IA3Linear)}


@torch.no_grad()
def merge_ia3(model: CausalLM) -> list[str]:
    """Replace every layer with factors by a plain nn.Linear with the weight l * W (and bias l * b), in place.

    A quantized weight is decoded first and stays decoded, in the dtype of the layers around it: quantizing the product
    again would change every value. The product is taken in fp32 and rounded once.

    Returns:
        paths of the merged layers.

    Raises:
        ValueError: the model has no IA3.
    """
    layers = ia3_layers(model)
    if not layers:
        raise ValueError("nothing to merge: the model has no IA3")
    for path, layer in layers.items():
        base, factors = layer.base, layer.ia3_l
        weight_oi = base.dequantize(base.dtype) if isinstance(base, QuantizedLinear) else base.weight
        bias = base.bias
        if bias is not None and not layer.on_input:
            bias = nn.Parameter((bias * factors.flatten()).to(bias.dtype), requires_grad=False)
        model.set_submodule(path, plain_linear((weight_oi * factors).to(weight_oi.dtype), bias).train(layer.training))
    model.method = None
    return list(layers)
