"""Adding LoRA to a model: find the layers (targets.py) and what else is trained (beside.py), wrap them, freeze the
rest. report.py says what happened."""

from collections.abc import Mapping, Sequence

from torch import nn

from minift.adapters.beside import Beside, add_beside, find_beside, find_whole, places
from minift.adapters.config import ALL_LINEAR, LoraConfig
from minift.adapters.embedding import LoraEmbedding
from minift.adapters.lora import LoraLinear, LowRank
from minift.adapters.method import check_no_method
from minift.adapters.switched import Switched, switched
from minift.adapters.targets import select
from minift.quant.linear import QuantizedLinear

Adaptable = nn.Linear | QuantizedLinear | nn.Embedding | LowRank


def add_lora(model: nn.Module, config: LoraConfig | None = None, adapter: str = "default") -> list[str]:
    """Wrap the targeted layers of a model, in place, and freeze everything but what the adapter trains.

    Args:
        model: any module tree.
        config: rank, scaling, targets; None is the default.
        adapter: name, for models with several.

    Returns:
        paths of the wrapped layers.

    Raises:
        ValueError: nothing matched, or something does not fit; lists the names there are. Or the model holds another
            method.
    """
    check_no_method(model, "LoRA")
    layers, config = adaptable_layers(model), config or LoraConfig()
    whole = find_whole(model, config)
    paths = linear_layers(model) if config.target_modules == ALL_LINEAR else layers
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    config, targets = select(list(paths), config, architecture, whole)
    beside = find_beside(model, config, targets, whole)
    check_adapter_name(model, adapter)
    check_start(layers, targets, config)
    put(model, targets, beside, adapter, config)
    return targets


def put(model: nn.Module, targets: Sequence[str], beside: Beside, adapter: str, config: LoraConfig) -> None:
    """Freeze the model and give it a new adapter; everything has been checked."""
    freeze_base(model)
    for path in targets:
        wrap(model, path).add(adapter, config, path)
    add_beside(model, beside, adapter, config)


def check_start(layers: Mapping[str, nn.Module], targets: list[str], config: LoraConfig) -> None:
    """Refuse an initialization from weights that are not there any more, before anything is changed."""
    if config.init in ("default", "gaussian", "random"):
        return
    for path in targets:
        layer = layers[path]
        if isinstance(layer, nn.Embedding | LoraEmbedding):
            if config.init == "loftq":
                raise ValueError(f"init 'loftq' repairs quantized linear layers, and {path} is an embedding")
            continue
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
    if any(adapter in place.configs for place in switched(model).values()):
        raise ValueError(f"adapter {adapter!r} exists already; choose another name")


def freeze_base(model: nn.Module) -> None:
    """Freeze everything but the adapters there are, which stay as they are."""
    trained = [p for place in switched(model).values() for p in adapter_parameters(place) if p.requires_grad]
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)


def adapter_parameters(place: Switched) -> list[nn.Parameter]:
    """What every adapter of a place trains."""
    return [p for name in place.configs for p in place.tensors(name).values()]


def adaptable_layers(model: nn.Module) -> Mapping[str, Adaptable]:
    """Every linear layer and embedding by path, in order; a wrapped one appears under the path of its wrapper."""
    return {path: module for path, module in places(model) if isinstance(module, Adaptable)}


def linear_layers(model: nn.Module) -> Mapping[str, nn.Linear | QuantizedLinear | LoraLinear]:
    """Every linear layer by path, in order; a wrapped one appears under the path of its wrapper."""
    return {
        path: module for path, module in places(model) if isinstance(module, nn.Linear | QuantizedLinear | LoraLinear)
    }


def wrap(model: nn.Module, path: str) -> LowRank:
    """The LoraLinear or LoraEmbedding at `path`, made if there is none yet."""
    module = model.get_submodule(path)
    if not isinstance(module, LowRank):
        assert isinstance(module, nn.Linear | QuantizedLinear | nn.Embedding)
        training = module.training  # or dropout would be on in an evaluated model
        module = LoraEmbedding(module) if isinstance(module, nn.Embedding) else LoraLinear(module)
        model.set_submodule(path, module.train(training))
    return module


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every adapted linear layer by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """Every adapted linear layer and embedding by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRank)}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trained parameters, and all of them; a quantized weight counts as the values it stands for.

    As in PEFT, a tied matrix counts once, and the copies of `modules_to_save` beside their originals.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    return trained, trained + frozen + quantized
