"""Adapter files, in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.<path of the layer>.lora_A.weight      [r, in]
    base_model.model.<path of the layer>.lora_B.weight      [out, r]

The adapter's name is not part of the keys. An adapter saved here loads in PEFT, and one saved by PEFT loads here. PEFT
only warns when keys match nothing; here every key must find its layer, and every layer of the adapter its two keys.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minift.adapters.inject import check_adapter_name, freeze_base, linear_layers, lora_layers, wrap
from minift.adapters.lora import ALL_LINEAR, LoraConfig
from minift.atomic import atomic_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of PEFT's LoRA that change the computation and are not computed here, with the value that turns each off.
OFF: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "use_bdlora": (False, None),
    "use_qalora": (False, None),
    # The others (PiSSA, OLoRA, LoftQ, ...) also change the base weights, which the file does not hold.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def save_adapter(model: nn.Module, folder: str | Path, adapter: str = "default") -> Path:
    """Write one adapter of the model; an existing folder is replaced as a whole.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if adapter in layer.configs}
    if not layers:
        raise ValueError(f"the model has no adapter {adapter!r} to save")
    tensors = {}
    for path, layer in layers.items():
        for part, matrix in zip("AB", layer.matrices(adapter), strict=True):
            tensors[f"{PREFIX}{path}.lora_{part}.weight"] = matrix.detach().cpu().contiguous()
    config = next(iter(layers.values())).configs[adapter]
    content = {
        "alpha_pattern": {},
        "base_model_name_or_path": getattr(model, "name", ""),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": config.alpha,
        "lora_bias": False,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": {},
        "revision": None,
        # "all-linear" is spelled out: for a model with another head it would mean other layers.
        "target_modules": sorted({path.rpartition(".")[2] for path in layers})
        if config.target_modules == ALL_LINEAR
        else config.target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    with atomic_folder(Path(folder)) as place:
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        (place / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def load_adapter(model: nn.Module, folder: str | Path, adapter: str = "default", trainable: bool = False) -> str:
    """Add a saved adapter to a model, active and (unless `trainable`) frozen. The base model's weights are frozen.

    Returns:
        the adapter's name.

    Raises:
        FileNotFoundError: not an adapter folder.
        ValueError: another kind of adapter, an unsupported setting, or keys or shapes that do not fit the model.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    tensors = read_adapter_weights(folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not match:
            raise ValueError(f"{folder / WEIGHTS}: {key} is not a LoRA weight of a linear layer")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    layers = linear_layers(model)
    for path, pair in pairs.items():  # check everything before changing anything
        if path not in layers:
            raise ValueError(f"{folder}: this adapter is for another model: there is no linear layer {path}")
        if len(pair) < 2:
            raise ValueError(f"{folder / WEIGHTS}: {path} lacks lora_{'A' if 'B' in pair else 'B'}")
        layer = layers[path]
        found = [tuple(pair["A"].shape), tuple(pair["B"].shape)]
        needed = [(config.r, layer.in_features), (layer.out_features, config.r)]
        if found != needed:
            raise ValueError(f"{folder}: this adapter is for another model: {path} has shapes {found}, needed {needed}")
    check_adapter_name(model, adapter)
    freeze_base(model)
    for path, pair in pairs.items():
        layer = wrap(model, path)
        layer.add(adapter, config)
        for part, matrix in zip("AB", layer.matrices(adapter), strict=True):
            with torch.no_grad():
                matrix.copy_(pair[part])
            matrix.requires_grad_(trainable)
    return adapter


def read_adapter_config(folder: Path) -> LoraConfig:
    """The settings in adapter_config.json, if they are ones that this library computes."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an adapter folder: it holds no {CONFIG}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type {kind!r} is not supported; supported: LORA")
    for key, allowed in OFF.items():
        if key in content and content[key] not in allowed:
            raise ValueError(f"{path}: {key}={content[key]!r} is not supported")
    try:
        return LoraConfig(
            r=content["r"],
            alpha=content["lora_alpha"],
            dropout=content.get("lora_dropout", 0.0),
            target_modules=content["target_modules"],
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        reason = "only a pickle, which can run any program when opened" if pickled else f"no {WEIGHTS}"
        raise FileNotFoundError(f"{folder} holds {reason}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} holds {tensor.dtype}, not floating-point numbers")
    return tensors
