"""Adding LoRA to a model: find the layers (targets.py), wrap them, freeze the rest, say what happened (report.py)."""

from collections.abc import Mapping

from torch import nn

from minift.adapters.config import LoraConfig
from minift.adapters.lora import LoraLinear
from minift.adapters.targets import select
from minift.quant.linear import QuantizedLinear


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
    layers = linear_layers(model)
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    config, targets = select(list(layers), config or LoraConfig(), architecture)
    check_adapter_name(model, adapter)
    check_start(layers, targets, config)
    freeze_base(model)
    for path in targets:
        wrap(model, path).add(adapter, config, path)
    return targets


def check_start(layers: Mapping[str, nn.Module], targets: list[str], config: LoraConfig) -> None:
    """Refuse an initialization from weights that are not there any more, before anything is changed."""
    if config.init in ("default", "gaussian", "random"):
        return
    for path in targets:
        layer = layers[path]
        if not isinstance(layer, nn.Linear):
            reason = "is quantized" if isinstance(layer, QuantizedLinear) else "has an adapter already"
            raise ValueError(
                f"init {config.init!r} needs the original weights, and {path} {reason}; load the model without "
                "quantization and add this adapter first"
            )
        if config.at(path).r > min(layer.weight.shape):
            raise ValueError(
                f"init {config.init!r}: rank {config.at(path).r} is larger than {path} {tuple(layer.weight.shape)}"
            )


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
    """What every adapter of a layer trains."""
    return [p for name in layer.configs for p in layer.tensors(name).values()]


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
