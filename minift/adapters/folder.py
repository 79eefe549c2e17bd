"""A saved adapter, in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.<path of the layer>.lora_A.weight      [r, in]      the adapter's name is not part of the keys

`peft_type` in adapter_config.json says which method it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minift.atomic import atomic_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def write_folder(
    folder: str | Path, model: nn.Module, tensors: Mapping[str, Tensor], content: Mapping[str, Any]
) -> None:
    """Write an adapter; an existing folder is replaced as a whole.

    Args:
        tensors: by their names in the file.
        content: the method's settings; what all methods have in common is added.
    """
    # One at a time and copied: tied tensors share memory, which safetensors refuses.
    held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    whole = {
        "base_model_name_or_path": getattr(model, "name", ""),
        "inference_mode": True,
        "revision": None,
        "task_type": "CAUSAL_LM",
        **content,
    }
    with atomic_folder(Path(folder)) as place:
        save_file(held, place / WEIGHTS, metadata={"format": "pt"})
        (place / CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_content(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an adapter folder: it holds no {CONFIG}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: it holds a {type(content).__name__}")
    return content


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors.

    Raises:
        FileNotFoundError: there is none, or only a pickle.
        ValueError: it is damaged, empty, or holds other things than floating-point numbers.
    """
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
