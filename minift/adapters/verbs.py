"""Add, save, load: three verbs for every method (method.py lists them), and one to undo them.

    add_adapter(model, IA3Config())        LoraConfig, too: then it is add_lora
    save_adapter(model, folder)
    load_adapter(model, folder)            the folder's `peft_type` decides
    delete_method(model)                   for LoRA: merge.py, many.py

Whatever does not fit is refused before anything is changed: a target that no layer has, a key or a shape of a file that
the model has no place for, and also a place for which the file has no key. (PEFT only warns, and the run goes on
without the adapter.)
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from minift.adapters.bottleneck import HoulsbyConfig, ParallelConfig, PfeifferConfig
from minift.adapters.config import LoraConfig
from minift.adapters.folder import CONFIG, PREFIX, WEIGHTS, read_adapter_weights, read_content, write_folder
from minift.adapters.ia3 import IA3Config
from minift.adapters.inject import add_lora
from minift.adapters.lora_files import LORA, load_lora, lora_to_file
from minift.adapters.method import Method, check_no_method, method_of
from minift.adapters.own import BitFitConfig, FullConfig, NormConfig
from minift.adapters.prefix import PrefixTuningConfig
from minift.adapters.prompt import PromptTuningConfig
from minift.adapters.ptuning import PTuningConfig
from minift.adapters.switched import switched
from minift.model.decoder import CausalLM

# In the order of the table in method.py.
METHODS: tuple[type[Method], ...] = (
    IA3Config,
    HoulsbyConfig,
    PfeifferConfig,
    ParallelConfig,
    PromptTuningConfig,
    PTuningConfig,
    PrefixTuningConfig,
    BitFitConfig,
    NormConfig,
    FullConfig,
)
ONLY = "default"  # what the adapter of every method but LoRA is called


def add_adapter(model: CausalLM, config: LoraConfig | Method, adapter: str = ONLY) -> None:
    """Put an adapter into the model, in place, and freeze everything else.

    Args:
        config: settings of a method.
        adapter: name, for LoRA, of which a model may hold several.

    Raises:
        ValueError: nothing in the model fits, it holds another method already, or a name for what has none. The model
            and what is trained of it are as before, then.
    """
    if isinstance(config, LoraConfig):
        add_lora(model, config, adapter)
        return
    check_alone(model, config.name)
    check_only(config.name, adapter)
    trained = trained_parameters(model)
    model.requires_grad_(False)
    try:
        config.add(model)
    except ValueError:
        train_only(model, trained)
        raise
    model.method = config


def check_alone(model: CausalLM, name: str) -> None:
    """Refuse a method that is none of LoRA beside any other."""
    check_no_method(model, name)
    if switched(model):
        raise ValueError(f"the model holds LoRA already, and {name} cannot be added to it; merge it first")


def check_only(name: str, adapter: str) -> None:
    """Refuse a name for an adapter of which a model holds one at most."""
    if adapter != ONLY:
        raise ValueError(f"adapter {adapter!r}: a model holds only one {name}, which is called {ONLY!r}")


def save_adapter(model: CausalLM, folder: str | Path, adapter: str = ONLY) -> Path:
    """Write one adapter of the model, in PEFT's format; an existing folder is replaced as a whole.

    Raises:
        ValueError: the model has no adapter of that name, or one whose base weights cannot be computed again.
    """
    method = method_of(model)
    if method is None:
        prefix, (tensors, content) = PREFIX, lora_to_file(model, adapter)
    else:
        check_only(method.name, adapter)
        prefix, tensors = method.key_prefix, method.tensors(model)
        content = {"peft_type": method.peft_type, **method.to_file(model)}
    if model.resized and not any("embed_tokens" in name or "lm_head" in name for name in tensors):
        warnings.warn(
            f"the embedding has been resized to {model.config.vocab_size} rows, and the adapter in {folder} holds none "
            "of them: whoever loads it must call resize_embeddings first, or save the whole model (save_model)",
            stacklevel=2,
        )
    write_folder(folder, model, {prefix + name: tensor for name, tensor in tensors.items()}, content)
    return Path(folder)


def load_adapter(model: CausalLM, folder: str | Path, adapter: str = ONLY, trainable: bool = False) -> str:
    """Add a saved adapter to a model, active and (unless `trainable`) frozen. The base model's weights are frozen.

    Returns:
        the adapter's name.

    Raises:
        FileNotFoundError: not an adapter folder.
        ValueError: an unknown method or setting, keys or shapes that do not fit the model, or a model that holds
            another method. The model and what is trained of it are as before, then.
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
    prefix = known[kind].key_prefix
    stray = [key for key in tensors if not key.startswith(prefix)]
    if stray:
        raise ValueError(f"{folder / WEIGHTS}: {stray[0]} does not begin with {prefix}")
    tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    try:
        method = known[kind].of_file(content, tensors)
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    trained = trained_parameters(model)
    with torch.random.fork_rng():  # initial values are drawn, and not needed
        add_adapter(model, method, adapter)
    try:
        check_fit(folder, tensors, method.tensors(model))
    except ValueError:
        delete_method(model)
        train_only(model, trained)
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
    """Remove the model's method, if it is none of LoRA (for that see many.py). The model is frozen afterwards.

    Raises:
        ValueError: it holds none.
    """
    method = method_of(model)
    if method is None:
        raise ValueError("the model holds no method to remove")
    method.remove(model)
    model.method = None


def trained_parameters(model: CausalLM) -> list[nn.Parameter]:
    """Those that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def train_only(model: CausalLM, parameters: Iterable[nn.Parameter]) -> None:
    """Freeze all others."""
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
