"""LoRA in adapter files (folder.py), as PEFT writes it.

    base_model.model.<path of the layer>.lora_A.weight      [r, in]
    base_model.model.<path of the layer>.lora_B.weight      [out, r]
    base_model.model.<path of the layer>.lora_magnitude_vector      [out], if it is a DoRA
    base_model.model.<embedding>.lora_embedding_A       [r, v], and lora_embedding_B [d, r]
    base_model.model.<embedding>.token_adapter.trainable_tokens_delta      [n, d], the new rows themselves
    base_model.model.<module to save>.<parameter>       whole
    base_model.model.<path of a layer>.bias             .base_layer.bias in a layer with LoRA

The adapter's name is not part of the keys. An adapter saved here loads in PEFT, and one saved by PEFT loads here. PEFT
only warns when keys match nothing; here every key must find its place, and every place of the adapter its keys.

PEFT also saves the table of an embedding that has a LoRA, or more rows than its checkpoint. Those are the model's and
not the adapter's, so they must be what the model has already.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minift.adapters.beside import find_beside, find_whole, places, shapes
from minift.adapters.config import ALL_LINEAR, LoraConfig
from minift.adapters.embedding import LoraEmbedding
from minift.adapters.folder import CONFIG, PREFIX, WEIGHTS
from minift.adapters.inject import adaptable_layers, check_adapter_name, check_start, put
from minift.adapters.lora import LoraLinear, LowRank
from minift.adapters.method import check_no_method
from minift.adapters.switched import switched
from minift.adapters.targets import HEAD, listed
from minift.adapters.tied import embedding_path, plain
from minift.quant.linear import QuantizedLinear

LORA = "LORA"
# Settings of PEFT's LoRA that change the computation and are not computed here, with the value that turns each off.
OFF: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "use_bdlora": (False, None),
    "use_qalora": (False, None),
    # The others (pissa_niter_16, OLoRA, CorDA, ...) change the base weights in a way that cannot be computed again.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "pissa", "loftq"),
}
# Initial values that matter for an adapter with trained ones, because they also change the base weights.
INITS = {"default": True, "random": False, "gaussian": "gaussian", "pissa": "pissa", "loftq": "loftq"}


def lora_to_file(model: nn.Module, adapter: str) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a LoRA by their names in the file (without "base_model.model."), and its settings.

    Raises:
        ValueError: the model has no adapter of that name, or one whose base weights cannot be computed again.
    """
    found = {path: place for path, place in switched(model).items() if adapter in place.configs}
    layers = [path for path, place in found.items() if isinstance(place, LowRank)]
    if not found:
        raise ValueError(f"the model has no adapter {adapter!r} to save")
    config = next(iter(found.values())).given[adapter]
    if config.init not in INITS:
        raise ValueError(
            f"an adapter that began as {config.init!r} belongs to base weights which depend on random numbers; "
            "merge it and save the model, or begin with 'pissa'"
        )
    tensors: dict[str, torch.Tensor] = {}
    for path, place in found.items():
        tensors |= place.file_tensors(adapter, path)
    return tensors, file_content(model, config, layers)


def file_content(model: nn.Module, config: LoraConfig, paths: list[str]) -> dict[str, Any]:
    """What adapter_config.json says about an adapter of the layers at `paths`."""
    settings = getattr(model, "config", None)
    return {
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": config.bias,
        "ensure_weight_tying": config.ensure_weight_tying,
        "exclude_modules": listed(config.exclude_modules) or None,
        # GPT-2's files hold linear weights transposed; A and B are the same either way.
        "fan_in_fan_out": bool(settings is not None and settings.family.transposed),
        "init_lora_weights": INITS[config.init],
        "layers_pattern": listed(config.layers_pattern) or None,
        "layers_to_transform": config.layers_to_transform and list(config.layers_to_transform),
        "lora_alpha": config.alpha,
        "lora_bias": False,
        "lora_dropout": config.dropout,
        "loftq_config": {"loftq_bits": 4, "loftq_iter": config.loftq_iterations} if config.init == "loftq" else {},
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": LORA,
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        # "all-linear" is spelled out: for a model with another head it would mean other layers.
        "target_modules": sorted({path.rpartition(".")[2] for path in paths})
        if config.target_modules == ALL_LINEAR
        else listed(config.target_modules or ()),
        "trainable_token_indices": _tokens(config),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def _tokens(config: LoraConfig) -> list[int] | dict[str, list[int]] | None:
    tokens = config.trainable_token_indices
    if isinstance(tokens, Mapping):
        return {name: list(ids) for name, ids in tokens.items()}
    return list(tokens) if tokens is not None else None


def load_lora(
    model: nn.Module,
    folder: Path,
    content: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    adapter: str,
    trainable: bool,
) -> str:
    """Add a LoRA that was read from a folder; see `load_adapter`."""
    check_no_method(model, "LoRA")
    config = lora_config(folder / CONFIG, content)
    stray = [key for key in tensors if not key.startswith(PREFIX)]
    if stray:
        raise ValueError(f"{folder / WEIGHTS}: {stray[0]} does not begin with {PREFIX}")
    parts, rest = _low_rank_parts(config, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})
    layers = adaptable_layers(model)
    strange = [path for path in parts if path not in layers]  # check everything before changing anything
    if strange:
        raise ValueError(f"{folder}: this adapter is for another model: there is no layer {strange[0]} to adapt")
    try:
        whole = find_whole(model, config, loading=True)
        beside = find_beside(model, config, list(parts), whole, loading=True)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    others = _take_beside(folder, model, shapes(model, beside, list(parts)), rest)
    twin = f"{embedding_path(model)}.weight"
    if f"{HEAD}.weight" in others and beside.shared and not torch.equal(others[twin], others[f"{HEAD}.weight"]):
        raise ValueError(
            f"{folder / WEIGHTS}: {twin} and {HEAD}.weight differ, though ensure_weight_tying says they do not"
        )
    _check_base(folder, model, rest)
    for path, found in parts.items():
        _check_shapes(folder, path, found, layers[path], config)
    check_adapter_name(model, adapter)
    check_start(layers, list(parts), config)
    with torch.random.fork_rng():  # initial values are drawn, and not needed
        put(model, list(parts), beside, adapter, config)
    saved = others | {f"{path}.{name}": t for path, found in parts.items() for name, t in found.items()}
    for path, place in switched(model).items():
        if adapter in place.configs:
            for name, parameter in place.file_tensors(adapter, path).items():
                with torch.no_grad():
                    parameter.copy_(saved[name])
                parameter.requires_grad_(trainable)
    return adapter


Named = dict[str, torch.Tensor]


def _low_rank_parts(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Named], Named]:
    """The tensors of low-rank changes by the layer's path and their name in it, and the others by name."""
    names = {name for kind in (LoraLinear, LoraEmbedding) for name in _parts(kind, config)}
    pattern = rf"(.+)\.({'|'.join(map(re.escape, names))})"
    parts: dict[str, Named] = {}
    rest: Named = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(pattern, name)
        if match:
            parts.setdefault(match[1], {})[match[2]] = tensor
        else:
            rest[name] = tensor
    return parts, rest


def _take_beside(folder: Path, model: nn.Module, needed: Mapping[str, tuple[int, ...]], rest: Named) -> Named:
    """Take out of `rest` what an adapter has besides low-rank changes."""
    taken: Named = {}
    for name, shape in needed.items():
        # A layer with another adapter, too, or with none: PEFT's name for its bias differs, but it is the same bias.
        other = name.replace(".base_layer.bias", ".bias") if ".base_layer." in name else ""
        tensor = rest.pop(name, None) if name in rest else rest.pop(other, None)
        if tensor is None:
            raise ValueError(f"{folder / WEIGHTS} lacks {PREFIX}{name}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{folder}: this adapter is for another model: {name} has shape {tuple(tensor.shape)}, needed {shape}"
            )
        taken[name] = tensor
    return taken


def _check_base(folder: Path, model: nn.Module, rest: Mapping[str, torch.Tensor]) -> None:
    """Refuse what is left of a file, unless it is a table that the model has as well."""
    for name, tensor in rest.items():
        path, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        module = dict(places(model)).get(path)
        weight = getattr(plain(module), "weight", None) if module is not None and leaf == "weight" else None
        is_table = path in (embedding_path(model), HEAD) or ".base_layer." in name
        if not is_table or not isinstance(weight, nn.Parameter):
            raise ValueError(f"{folder / WEIGHTS}: {PREFIX}{name} is not a LoRA weight of a layer of this model")
        if weight.shape != tensor.shape or not torch.equal(tensor.to(weight.device, weight.dtype), weight):
            raise ValueError(
                f"{folder / WEIGHTS}: {PREFIX}{name} {tuple(tensor.shape)} is not the {path} {tuple(weight.shape)} of "
                "this model, on which the adapter was not trained; load the model that it was trained on"
            )


def _parts(kind: type[LowRank], config: LoraConfig) -> list[str]:
    return [*kind.part_names] + ["lora_magnitude_vector"] * config.use_dora


def _check_shapes(folder: Path, path: str, found: Named, layer: nn.Module, config: LoraConfig) -> None:
    r = config.at(path).r
    bare = plain(layer)
    kind = LoraEmbedding if isinstance(bare, nn.Embedding) else LoraLinear
    if isinstance(bare, nn.Embedding):
        sizes = (bare.num_embeddings, bare.embedding_dim)
    else:
        assert isinstance(bare, nn.Linear | QuantizedLinear)
        sizes = (bare.in_features, bare.out_features)
    needed = dict(zip(_parts(kind, config), [(r, sizes[0]), (sizes[1], r), (sizes[1],)], strict=False))
    lacking = [name.removesuffix(".weight") for name in needed if name not in found]
    if lacking:
        raise ValueError(f"{folder / WEIGHTS}: {path} lacks {', '.join(lacking)}")
    given = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if given != needed:
        raise ValueError(f"{folder}: this adapter is for another model: {path} has shapes {given}, needed {needed}")


def lora_config(path: Path, content: Mapping[str, Any]) -> LoraConfig:
    """The settings in an adapter_config.json, if they are ones that this library computes."""
    for key, allowed in OFF.items():
        if key in content and content[key] not in allowed:
            raise ValueError(f"{path}: {key}={content[key]!r} is not supported")
    if content.get("target_modules", "") is None:
        raise ValueError(f"{path}: target_modules is null, so it does not say which layers were adapted")
    loftq_bits = (content.get("loftq_config") or {}).get("loftq_bits", 4)
    if content.get("init_lora_weights") == "loftq" and loftq_bits != 4:
        raise ValueError(f"{path}: loftq_bits={loftq_bits} is not supported; supported: 4")
    try:
        return LoraConfig(
            r=content["r"],
            alpha=content["lora_alpha"],
            dropout=content.get("lora_dropout", 0.0),
            target_modules=content["target_modules"],
            exclude_modules=content.get("exclude_modules") or (),
            layers_to_transform=content.get("layers_to_transform") or None,
            layers_pattern=content.get("layers_pattern") or (),
            rank_pattern=content.get("rank_pattern") or {},
            alpha_pattern=content.get("alpha_pattern") or {},
            use_rslora=bool(content.get("use_rslora")),
            use_dora=bool(content.get("use_dora")),
            # Of the others only the trained values are left, and those are in the file.
            init=init if (init := content.get("init_lora_weights")) in ("pissa", "loftq") else "default",
            bias=content.get("bias") or "none",
            modules_to_save=tuple(content.get("modules_to_save") or ()),
            trainable_token_indices=content.get("trainable_token_indices"),
            ensure_weight_tying=bool(content.get("ensure_weight_tying")),
            loftq_iterations=(content.get("loftq_config") or {}).get("loftq_iter", 1),
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
