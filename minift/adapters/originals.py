"""The weights that a model had before it was quantized, one at a time: from its unquantized folder, or another model.

    for path, weight_oi in original_weights(model, places, "folder"): ...

For comparing only. An adapter that was trained on a quantized model belongs to the quantized weights: its training made
up for some of their errors.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from minift.adapters.lora import LoraLinear, LowRank
from minift.adapters.targets import HEAD
from minift.adapters.tied import embedding_path, is_tied, plain
from minift.model.decoder import CausalLM
from minift.model.load import checkpoint_files, read_tensors
from minift.sources.resolve import resolve


def original_weights(
    model: nn.Module, layers: Mapping[str, LowRank], original: str | Path | nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """Yield (path, weight fp32 [out, in]) for each of the adapted layers, in the order of the files.

    Args:
        layers: of `model`, by path.
        original: a model, or what `load_model` takes; files are read tensor by tensor.

    Raises:
        FileNotFoundError, ValueError: no such model, or one that lacks a weight, has it in another shape, or quantized.
    """
    if isinstance(original, nn.Module):
        found = ((path, _weight(original, path)) for path in layers)
    else:
        found = _read(model, layers, resolve(original))
    missing = set(layers)
    for path, weight_oi in found:
        layer = layers[path]
        if not weight_oi.is_floating_point():
            raise ValueError(f"the original's {path} is quantized itself ({weight_oi.dtype}); give the unquantized one")
        if weight_oi.shape != (layer.out_features, layer.in_features):
            needed = (layer.out_features, layer.in_features)
            raise ValueError(f"the original's {path} has shape {tuple(weight_oi.shape)}, this model's {needed}")
        missing.remove(path)
        yield path, weight_oi.detach().float()
    if missing:
        raise ValueError(f"the original lacks the weight of {min(missing)}")


def _weight(original: nn.Module, path: str) -> Tensor:
    try:
        module = plain(original.get_submodule(path))
        weight = module.get_parameter("weight")
    except AttributeError:
        raise ValueError(f"the original has no unquantized layer {path}") from None
    return weight.T if isinstance(module, nn.Embedding) else weight


def _read(model: nn.Module, layers: Mapping[str, LowRank], folder: Path) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(model, CausalLM), "a folder holds a language model"
    embedding, family = embedding_path(model), model.config.family
    base = family.name("decoder").partition(".")[0]
    owners: dict[str, list[str]] = {}
    for path in layers:
        # A tied head is not in the files, or a copy.
        owner = embedding if path == HEAD and is_tied(model) else path
        owners.setdefault(f"{owner}.weight", []).append(path)
    for name, tensor in read_tensors(checkpoint_files(folder)):
        for path in owners.get(name) or owners.get(f"{base}.{name}", []):
            embeds = not isinstance(layers[path], LoraLinear)
            yield path, tensor.T if embeds or (family.transposed and path != HEAD) else tensor
