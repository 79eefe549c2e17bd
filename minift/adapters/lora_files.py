"""LoRA in adapter files (folder.py), as PEFT writes it.

    base_model.model.<path of the layer>.lora_A.weight      [r, in]
    base_model.model.<path of the layer>.lora_B.weight      [out, r]
    base_model.model.<path of the layer>.lora_magnitude_vector      [out], if it is a DoRA

The adapter's name is not part of the keys. An adapter saved here loads in PEFT, and one saved by PEFT loads here. PEFT
only warns when keys match nothing; here every key must find its layer, and every layer of the adapter its two keys.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minift.adapters.config import ALL_LINEAR, LoraConfig
from minift.adapters.folder import CONFIG, PREFIX, WEIGHTS, read_content
from minift.adapters.inject import check_adapter_name, check_start, freeze_base, linear_layers, lora_layers, wrap
from minift.adapters.lora import LoraLinear
from minift.quant.linear import QuantizedLinear

LORA = "LORA"
# Settings of PEFT's LoRA that change the computation and are not computed here, with the value that turns each off.
OFF: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
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
    layers = {path: layer for path, layer in lora_layers(model).items() if adapter in layer.configs}
    if not layers:
        raise ValueError(f"the model has no adapter {adapter!r} to save")
    config = next(iter(layers.values())).given[adapter]
    if config.init not in INITS:
        raise ValueError(
            f"an adapter that began as {config.init!r} belongs to base weights which depend on random numbers; "
            "merge it and save the model, or begin with 'pissa'"
        )
    tensors = {
        f"{path}.{name}": tensor for path, layer in layers.items() for name, tensor in layer.tensors(adapter).items()
    }
    return tensors, file_content(model, config, list(layers))


def file_content(model: nn.Module, config: LoraConfig, paths: list[str]) -> dict[str, Any]:
    """What adapter_config.json says about an adapter of the layers at `paths`."""
    settings = getattr(model, "config", None)
    return {
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "exclude_modules": _names(config.exclude_modules) or None,
        # GPT-2's files hold linear weights transposed; A and B are the same either way.
        "fan_in_fan_out": bool(settings is not None and settings.family.transposed),
        "init_lora_weights": INITS[config.init],
        "layers_pattern": _names(config.layers_pattern) or None,
        "layers_to_transform": config.layers_to_transform and list(config.layers_to_transform),
        "lora_alpha": config.alpha,
        "lora_bias": False,
        "lora_dropout": config.dropout,
        "loftq_config": {"loftq_bits": 4, "loftq_iter": config.loftq_iterations} if config.init == "loftq" else {},
        "modules_to_save": None,
        "peft_type": LORA,
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        # "all-linear" is spelled out: for a model with another head it would mean other layers.
        "target_modules": sorted({path.rpartition(".")[2] for path in paths})
        if config.target_modules == ALL_LINEAR
        else _names(config.target_modules or ()),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def _names(value: str | Sequence[str]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def load_lora(
    model: nn.Module,
    folder: Path,
    content: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    adapter: str,
    trainable: bool,
) -> str:
    """Add a LoRA that was read from a folder; see `load_adapter`."""
    config = lora_config(folder / CONFIG, content)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + rf"(.+)\.({'|'.join(map(re.escape, _parts(config)))})", key)
        if not match:
            raise ValueError(f"{folder / WEIGHTS}: {key} is not a LoRA weight of a linear layer")
        parts.setdefault(match[1], {})[match[2]] = tensor
    layers = linear_layers(model)
    for path, found in parts.items():  # check everything before changing anything
        if path not in layers:
            raise ValueError(f"{folder}: this adapter is for another model: there is no linear layer {path}")
        _check_shapes(folder, path, found, layers[path], config)
    check_adapter_name(model, adapter)
    check_start(layers, list(parts), config)
    freeze_base(model)
    for path, found in parts.items():
        layer = wrap(model, path)
        layer.add(adapter, config, path)
        for name, parameter in layer.tensors(adapter).items():
            with torch.no_grad():
                parameter.copy_(found[name])
            parameter.requires_grad_(trainable)
    return adapter


def _parts(config: LoraConfig) -> list[str]:
    return ["lora_A.weight", "lora_B.weight"] + ["lora_magnitude_vector"] * config.use_dora


def _check_shapes(
    folder: Path,
    path: str,
    found: Mapping[str, torch.Tensor],
    layer: nn.Linear | QuantizedLinear | LoraLinear,
    config: LoraConfig,
) -> None:
    r = config.at(path).r
    sizes = [(r, layer.in_features), (layer.out_features, r), (layer.out_features,)]
    needed = dict(zip(_parts(config), sizes, strict=False))
    lacking = [name.removesuffix(".weight") for name in needed if name not in found]
    if lacking:
        raise ValueError(f"{folder / WEIGHTS}: {path} lacks {', '.join(lacking)}")
    shapes = {name: tuple(found[name].shape) for name in needed}
    if shapes != needed:
        raise ValueError(f"{folder}: this adapter is for another model: {path} has shapes {shapes}, needed {needed}")


def read_adapter_config(folder: Path) -> LoraConfig:
    """The settings in the adapter_config.json of a LoRA; errors as `load_adapter`."""
    content = read_content(folder)
    if content.get("peft_type") != LORA:
        raise ValueError(f"{folder / CONFIG}: peft_type {content.get('peft_type')!r} is not LoRA")
    return lora_config(folder / CONFIG, content)


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
            loftq_iterations=(content.get("loftq_config") or {}).get("loftq_iter", 1),
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
