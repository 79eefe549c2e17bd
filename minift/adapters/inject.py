"""Adding LoRA to a model: find the layers, wrap them, freeze the rest, say what happened.

Targets are matched as PEFT matches them (`tuners_utils.check_target_module_exists`): a list holds names or ends of
dotted paths, a single string is a regular expression for the whole path, "all-linear" means every linear layer but the
head. Matching nothing is refused: a run in which nothing is trained looks like any other until its end.
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from minift.adapters.lora import ALL_LINEAR, LoraConfig, LoraLinear
from minift.quant.linear import QuantizedLinear

HEAD = "lm_head"


def add_lora(model: nn.Module, config: LoraConfig | None = None, adapter: str = "default") -> list[str]:
    """Wrap the targeted linear layers of a model, in place, and freeze everything but the new A and B.

    Args:
        model: any module tree.
        config: rank, scaling, targets; None is the default.
        adapter: name, for models with several.

    Returns:
        paths of the wrapped layers.

    Raises:
        ValueError: nothing matched; lists the names there are.
    """
    config = config or LoraConfig()
    layers = linear_layers(model)
    targets = [path for path in layers if is_target(path, config.target_modules)]
    unmatched = [] if isinstance(config.target_modules, str) else [
        target for target in config.target_modules if not any(is_target(path, (target,)) for path in layers)
    ]  # fmt: skip
    if not targets or unmatched:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in layers})) or "none"
        raise ValueError(f"no linear layer matches target {unmatched or config.target_modules!r}; layers here: {names}")
    check_adapter_name(model, adapter)
    freeze_base(model)
    for path in targets:
        wrap(model, path).add(adapter, config)
    return targets


def check_adapter_name(model: nn.Module, adapter: str) -> None:
    """Refuse a name that is taken, or that cannot be part of a parameter's name."""
    if not adapter or "." in adapter:
        raise ValueError(f"adapter name {adapter!r}: must not be empty or hold a dot")
    if any(adapter in layer.configs for layer in lora_layers(model).values()):
        raise ValueError(f"adapter {adapter!r} exists already; choose another name")


def freeze_base(model: nn.Module) -> None:
    """Freeze everything but the adapters there are, which stay as they are."""
    trained = [p for layer in lora_layers(model).values() for p in adapter_parameters(layer) if p.requires_grad]
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)


def adapter_parameters(layer: LoraLinear) -> list[nn.Parameter]:
    """A and B of every adapter of a layer."""
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]


def linear_layers(model: nn.Module) -> Mapping[str, nn.Linear | QuantizedLinear | LoraLinear]:
    """Every linear layer by path; a wrapped one appears under the path of its wrapper."""
    wrapped = lora_layers(model)
    inside = tuple(f"{path}." for path in wrapped)
    plain = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear) and not path.startswith(inside)
    }
    return plain | wrapped


def is_target(path: str, target_modules: str | Sequence[str]) -> bool:
    """Whether PEFT would adapt the linear layer at `path`."""
    if target_modules == ALL_LINEAR:
        return path.rpartition(".")[2] != HEAD
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in target_modules)


def wrap(model: nn.Module, path: str) -> LoraLinear:
    """The LoraLinear at `path`, made if there is none yet."""
    module = model.get_submodule(path)
    if not isinstance(module, LoraLinear):
        assert isinstance(module, nn.Linear | QuantizedLinear)
        module = LoraLinear(module).train(module.training)  # or dropout would be on in an evaluated model
        model.set_submodule(path, module)
    return module


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every adapted layer by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trained parameters, and all of them; a quantized weight counts as the values it stands for."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    return trained, trained + frozen + quantized
