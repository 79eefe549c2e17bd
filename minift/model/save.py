"""Saving a model as a Hugging Face folder that transformers (with bitsandbytes, if it is quantized) can load.

    folder/config.json         the settings it was loaded with, its dtype, and how it is quantized
           model.safetensors   every tensor once: quantized weights under bitsandbytes' names, a tied head left out
           tokenizer files     copied, so that the folder is complete

Nothing is converted: what is in memory is what is written. A model with adapters in it is refused, because their
tensors have no place in such a folder: merge them first, or save the adapter by itself.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minift.atomic import atomic_folder
from minift.model.decoder import CausalLM
from minift.model.load import is_block_linear
from minift.quant.checkpoint import fourbit_tensors, int8_tensors, owners
from minift.quant.linear import Linear4bit, Linear8bit, QuantizedLinear

# What else belongs to a model: copied as it is, where there is one.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "LICENSE",
)  # fmt: skip


def save_model(model: CausalLM, folder: str | Path) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files; all of it or nothing.

    Args:
        model: as loaded, quantized or not, or merged.
        folder: where; replaced if it exists.

    Returns:
        the folder.

    Raises:
        ValueError: the model holds tensors that its architecture does not have (adapters), or layers quantized in ways
            that one config.json cannot describe.
    """
    folder = Path(folder)
    tensors, config = checkpoint_tensors(model), config_json(model)
    with atomic_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        for name in COMPANIONS:
            if model.folder is not None and (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, temporary / name)
    return folder


def checkpoint_tensors(model: CausalLM) -> dict[str, Tensor]:
    """Every tensor of the model under its name in a checkpoint.

    Raises:
        ValueError: a tensor that the architecture does not have.
    """
    with torch.device("meta"):
        plain = {name for name, _ in CausalLM(model.config).named_parameters()}
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            parts = fourbit_tensors(module.weight, module.quant_state)
        elif isinstance(module, Linear8bit):
            parts = int8_tensors(module.weight, module.absmax)
        else:
            parts: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
            if model.config.family.transposed and is_block_linear(path, module):
                parts["weight"] = parts["weight"].t()
        if isinstance(module, QuantizedLinear) and module.bias is not None:
            parts["bias"] = module.bias
        tensors |= {f"{path}.{name}": tensor for name, tensor in parts.items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    quantized = {path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    own_state = {name for name in tensors if quantized & set(owners(name)) and not name.endswith(".bias")}
    foreign = [name for name in tensors if name not in plain and name not in own_state]
    if foreign:
        raise ValueError(
            f"{foreign[0]} is not part of a {model.config.model_type} checkpoint; merge the adapters first "
            "(merge_lora), or save them by themselves (save_adapter)"
        )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def config_json(model: CausalLM) -> dict[str, Any]:
    """The config.json of the model as it is now.

    Raises:
        ValueError: quantized layers of different formats, or a model that was built without a config.json.
    """
    if not model.config.raw:
        raise ValueError("the model was not made from a config.json, so there is none to write (ModelConfig.from_dict)")
    replaced = ("quantization_config", "torch_dtype")
    content = {key: value for key, value in model.config.raw.items() if key not in replaced}
    content["dtype"] = str(model.dtype).removeprefix("torch.")
    linears = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear | QuantizedLinear)}
    configs = {m.config.quant_type: m for m in linears.values() if isinstance(m, QuantizedLinear)}
    if len(configs) > 1:
        raise ValueError(f"one checkpoint has one format, but this model holds {' and '.join(sorted(configs))}")
    for layer in configs.values():
        kept = tuple(path for path, m in linears.items() if isinstance(m, torch.nn.Linear))
        stored = replace(layer.config, compute_dtype=layer.compute_dtype, skip=kept)
        content["quantization_config"] = stored.to_json()
    return content
