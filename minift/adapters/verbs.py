"""Add, save, load: three verbs for every method (method.py lists them).

    add_adapter(model, IA3Config())        LoraConfig, too: then it is add_lora
    save_adapter(model, folder)
    load_adapter(model, folder)            the folder's `peft_type` decides

Whatever does not fit is refused before anything is changed: a target that no layer has, a key or a shape of a file that
the model has no place for, and also a place for which the file has no key. (PEFT only warns, and the run goes on
without the adapter.)
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minift.adapters.config import LoraConfig
from minift.adapters.folder import CONFIG, PREFIX, WEIGHTS, read_adapter_weights, read_content, write_folder
from minift.adapters.inject import add_lora, lora_layers
from minift.adapters.lora_files import LORA, load_lora, lora_to_file
from minift.adapters.method import Method, method_of
from minift.model.decoder import CausalLM

METHODS: tuple[type[Method], ...] = ()


def add_adapter(model: CausalLM, config: LoraConfig | Method, adapter: str = "default") -> None:
    """Put an adapter into the model, in place, and freeze everything else.

    Args:
        config: settings of a method.
        adapter: name, for LoRA, of which a model may hold several.

    Raises:
        ValueError: nothing in the model fits, or it holds another method already.
    """
    check_alone(model, config)
    if isinstance(config, LoraConfig):
        add_lora(model, config, adapter)
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        config.add(model)
    except ValueError:
        for p in trained:
            p.requires_grad_(True)
        raise
    model.method = config


def check_alone(model: CausalLM, config: LoraConfig | Method) -> None:
    """Refuse a second method: which of them would be trained, saved and merged is anybody's guess."""
    held = method_of(model)
    if held is not None:
        raise ValueError(f"the model holds {held.name} already; delete_adapter(model) removes it")
    if not isinstance(config, LoraConfig) and lora_layers(model):
        raise ValueError(f"the model holds LoRA already, and {config.name} cannot be added to it; merge it first")


def save_adapter(model: CausalLM, folder: str | Path, adapter: str = "default") -> Path:
    """Write one adapter of the model, in PEFT's format; an existing folder is replaced as a whole.

    Raises:
        ValueError: the model has no adapter of that name, or one whose base weights cannot be computed again.
    """
    method = method_of(model)
    if method is None:
        tensors, content = lora_to_file(model, adapter)
    else:
        tensors, content = method.tensors(model), {"peft_type": method.peft_type, **method.to_file(model)}
    write_folder(folder, model, {PREFIX + name: tensor for name, tensor in tensors.items()}, content)
    return Path(folder)


def load_adapter(model: CausalLM, folder: str | Path, adapter: str = "default", trainable: bool = False) -> str:
    """Add a saved adapter to a model, active and (unless `trainable`) frozen. The base model's weights are frozen.

    Returns:
        the adapter's name.

    Raises:
        FileNotFoundError: not an adapter folder.
        ValueError: an unknown method or setting, or keys or shapes that do not fit the model.
    """
    folder = Path(folder)
    content = read_content(folder)
    kind, known = content.get("peft_type"), {method.peft_type: method for method in METHODS}
    if kind not in (LORA, *known):
        raise ValueError(
            f"{folder / CONFIG}: peft_type {kind!r} is not supported; supported: {', '.join((LORA, *known))}"
        )
    tensors = read_adapter_weights(folder)
    if kind == LORA:
        return load_lora(model, folder, content, tensors, adapter, trainable)
    stray = [key for key in tensors if not key.startswith(PREFIX)]
    if stray:
        raise ValueError(f"{folder / WEIGHTS}: {stray[0]} does not begin with {PREFIX}")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    try:
        method = known[kind].of_file(content, tensors)
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    with torch.random.fork_rng():  # initial values are drawn, and not needed
        add_adapter(model, method)
    try:
        check_fit(folder, tensors, method.tensors(model))
    except ValueError:
        delete_method(model)
        raise
    method.load(model, tensors)
    if not trainable:
        model.requires_grad_(False)
    return adapter


def check_fit(folder: Path, found: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Refuse a file whose names and shapes are not those that the model needs."""
    strange, missing = [k for k in found if k not in needed], [k for k in needed if k not in found]
    if strange:
        raise ValueError(f"{folder}: this adapter is for another model: it has no place for {strange[0]}")
    if missing:
        raise ValueError(f"{folder / WEIGHTS} lacks {missing[0]}")
    for name, tensor in needed.items():
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, needed {tuple(tensor.shape)}"
            raise ValueError(f"{folder}: this adapter is for another model: {name} has shape {shapes}")


def delete_method(model: CausalLM) -> None:
    """Remove the model's method, if it is none of LoRA; for LoRA see many.py."""
    method = method_of(model)
    if method is None:
        raise ValueError("the model holds no method to remove")
    method.remove(model)
    model.method = None
