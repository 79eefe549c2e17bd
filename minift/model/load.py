"""Loading a checkpoint without ever holding it twice.

    1. build the model on the meta device: shapes, no memory
    2. swap the linears that are, or will be, quantized
    3. stream: read one tensor, cast it, put it in its place or quantize it, drop it, next

So the peak is what the finished model takes plus one tensor, not the bf16 model plus the 4-bit one. A checkpoint that
bitsandbytes quantized is taken as it is, byte for byte (quant/checkpoint.py). Nothing is guessed: a tensor that is
missing, left over, of another shape or cut off is named and refused. Only safetensors files are read; a pickle can run
any program when it is opened.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.numerics.dtypes import DTYPES
from minift.quant.checkpoint import STATE, is_quantized, owners, read_fourbit, read_int8, read_record
from minift.quant.config import QuantConfig
from minift.quant.linear import Linear4bit, Linear8bit, QuantizedLinear
from minift.quant.model import swap_linears
from minift.sources.resolve import resolve


def load_model(
    name: str | Path,
    quantize: str | QuantConfig | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> CausalLM:
    """Load a causal language model.

    Args:
        name: a known name (`minift models`), a Hugging Face Hub id, a folder, or a .gguf file.
        quantize: "nf4", "fp4" (with double quantization), "int8" or a QuantConfig: the format of the decoder's linears;
            embeddings, norms and head keep `dtype`. None: as the checkpoint has them. A checkpoint that is quantized
            already must have the format asked for.
        dtype: of weights, activations and arithmetic; None keeps the checkpoint's.
        device: where the model goes. Quantization happens there, too.
        attention: "sdpa" (PyTorch's fused kernel), "eager" (step by step) or "flash" (ours, in tiles); None: "sdpa", or
            "eager" for models that cap their scores.

    Raises:
        FileNotFoundError, ValueError: unknown name, or a checkpoint that does not fit; says which file or tensor.
    """
    folder = resolve(name)
    model = build_model(folder, quantize, dtype, attention)
    files = checkpoint_files(folder)
    check_device(device, model.dtype)
    _fill(model, files, torch.device(device))
    model.name, model.folder = str(name), folder
    return model.eval()


def build_model(
    folder: Path, quantize: str | QuantConfig | None, dtype: torch.dtype | None, attention: str | None = None
) -> CausalLM:
    """The model of a folder on the meta device: every shape and dtype, no memory."""
    config = ModelConfig.from_folder(folder)
    if dtype is None and config.dtype not in DTYPES:
        raise ValueError(f"{folder / 'config.json'}: dtype {config.dtype!r}; choose one of {', '.join(DTYPES)}")
    with torch.device("meta"):
        model = CausalLM(config, attention).to(dtype or DTYPES[config.dtype])
    wanted, stored = QuantConfig.named(quantize), config.quantization
    if wanted and stored and wanted.quant_type != stored.quant_type:
        raise ValueError(
            f"{folder} is quantized already, in {stored.quant_type}, not {wanted.quant_type}; load it as it is "
            "(quantize=None, --quantize none), or start from the unquantized checkpoint"
        )
    if stored:
        compute_dtype = stored.compute_dtype if dtype is None else dtype
        swap_linears(model, replace(stored, blocksize=_stored_blocksize(folder), compute_dtype=compute_dtype))
    elif wanted:
        swap_linears(model, wanted)
    return model


def check_device(device: str | torch.device, dtype: torch.dtype) -> None:
    """Multiply two numbers there, before anything is loaded.

    Raises:
        ValueError: there is no such device, or it cannot compute in this dtype.
    """
    try:
        one = torch.ones(1, 1, dtype=dtype, device=device)
        torch.mm(one, one)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises any of them
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot compute in {dtype}: {reason}") from None


def _stored_blocksize(folder: Path) -> int:
    """The block size of a quantized checkpoint's 4-bit weights: that of the first one; the default without any."""
    for path in checkpoint_files(folder):
        with open_safetensors(path) as handle:
            for name in list(handle.keys()):
                layer, mark, _ = name.partition(f".{STATE}")
                if mark:
                    return read_record(handle.get_tensor(name), f"{layer}.{name}")["blocksize"]
    return QuantConfig().blocksize


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the shards that its index names, or model.safetensors.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: only a pickle checkpoint, or a broken index.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("its weight_map names no files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a checkpoint index: {error!r}") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{index} names {missing[0]}, which is not in the folder ({len(missing)} missing)")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]} is a pickle, which can run any program when opened; "
            "convert the checkpoint to safetensors"
        )
    raise FileNotFoundError(f"{folder} holds no model.safetensors and no model.safetensors.index.json")


def read_tensors(files: list[Path], progress: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) from safetensors files, one tensor in memory at a time.

    Raises:
        ValueError: a file that is not safetensors or is cut off.
    """
    # None: a bar on a terminal only. Loading is short; in a log the bar would be noise.
    with tqdm(desc=progress, unit=" tensors", disable=None if progress else True, leave=False) as bar:
        for path in files:
            with open_safetensors(path) as handle:
                names = list(handle.keys())
            bar.total = (bar.total or 0) + len(names)
            for name in names:
                # safe_open maps the file, and pages once read count as memory until it is closed: so one at a time.
                with open_safetensors(path) as handle:
                    tensor = handle.get_tensor(name)
                yield name, tensor
                del tensor
                bar.update()


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file to read from. ValueError if it is not one, or is cut off."""
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None


def _fill(model: CausalLM, files: list[Path], device: torch.device) -> None:
    where = files[0].parent
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    expected = {name for name, _ in model.named_parameters()} | {f"{path}.weight" for path in quantized}
    parts: dict[str, dict[str, Tensor]] = {path: {} for path in quantized}
    left_over = []
    base = model.config.family.name("decoder").partition(".")[0]
    for name, tensor in read_tensors(files, progress=f"Loading {where.name}"):
        if name not in expected and f"{base}.{name}" in expected:  # saved without the head around it, as GPT-2 was
            name = f"{base}.{name}"
        path = next((p for p in owners(name) if p in quantized), "")
        if path and name != f"{path}.bias" and model.config.quantization:
            parts[path][name.removeprefix(f"{path}.")] = tensor.to(device, copy=True)
            expected.discard(name)
        elif name in expected:
            _place(model, name, tensor, device)
            expected.remove(name)
        elif not _may_be_ignored(model, name):
            left_over.append(name)
    for path, layer in quantized.items():
        if parts[path]:
            _place_quantized(layer, parts.pop(path), path)
    if expected:
        raise ValueError(f"{where} lacks {len(expected)} tensors, among them {min(expected)}")
    if left_over:
        hint = "; its config.json does not say that it is quantized" if is_quantized({*map(_leaf, left_over)}) else ""
        raise ValueError(f"{where} holds {len(left_over)} tensors that the model has not: {left_over[0]}{hint}")
    model.tie_weights()


def _leaf(name: str) -> str:
    """The name of a tensor within its layer: model.layers.0.mlp.up_proj.weight.absmax -> weight.absmax."""
    head, _, tail = name.partition(".weight.")
    return f"weight.{tail}" if tail else head.rpartition(".")[2]


def _place(model: CausalLM, name: str, tensor: Tensor, device: torch.device) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if model.config.family.transposed and leaf == "weight" and is_block_linear(path, module):
        tensor = tensor.t()
    layer = module if isinstance(module, QuantizedLinear) and leaf == "weight" else None
    if layer is not None:
        shape, dtype = (layer.out_features, layer.in_features), layer.stored_dtype
    else:
        shape, dtype = tuple(getattr(module, leaf).shape), getattr(module, leaf).dtype
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name} holds {tensor.dtype} instead of floating-point numbers, and config.json has no quantization_config"
        )
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the checkpoint; the model needs {shape}")
    if layer is not None:
        try:
            layer.quantize_weight(tensor.to(device, dtype))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    else:
        # A copy, not a view of the mapped file: the file may be replaced while the model lives.
        setattr(module, leaf, nn.Parameter(tensor.to(device, dtype, copy=True)))


def is_block_linear(path: str, module: nn.Module) -> bool:
    """Whether a module is a linear layer of a block: those are what GPT-2 stores transposed."""
    return isinstance(module, nn.Linear | QuantizedLinear) and path != "lm_head"


def _place_quantized(layer: QuantizedLinear, tensors: dict[str, Tensor], path: str) -> None:
    shape = (layer.out_features, layer.in_features)
    if isinstance(layer, Linear4bit):
        if tensors.keys() == {"weight"}:
            raise ValueError(f"{path}.weight has no quantization state, though config.json says it is quantized")
        layer.set_packed(*read_fourbit(tensors, shape, path))
    elif isinstance(layer, Linear8bit):
        layer.set_codes(*read_int8(tensors, shape, path), layer.stored_dtype)


def _may_be_ignored(model: CausalLM, name: str) -> bool:
    """Tensors that some checkpoints carry although the model computes them: rotary tables, causal masks (GPT-2), a copy
    of a tied head."""
    if name == "lm_head.weight":
        return model.config.tie_word_embeddings
    return name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))
