"""Where a model's bytes are: a table of its modules, and the most memory this process ever held.

The table counts what is stored, quantization state included. Of SmolLM2-135M's linears in NF4 with double quantization:

    packed codes   0.5 bytes a weight        absmax   1 byte / 64 weights        nested absmax   4 bytes / (64 * 256)
"""

import re
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minift.adapters.files import WEIGHTS, read_adapter_config, read_adapter_weights
from minift.model.load import build_model
from minift.quant.linear import Linear4bit, QuantConfig


@dataclass(frozen=True)
class ModuleRow:
    """One module, or `count` alike ones of several layers (their number in the path is then `*`).

    Attributes:
        shape: of the weight, as it is used.
        stored, compute: dtype in memory (or format), and dtype of the arithmetic.
        bytes: of all `count` modules, with quantization state.
        trainable: number of trained parameters in them.
    """

    path: str
    count: int
    shape: tuple[int, ...]
    stored: str
    compute: str
    bytes: int
    trainable: int


def module_table(model: nn.Module) -> list[ModuleRow]:
    """A row for every module that owns a weight; works on the meta device. A tied weight is listed once."""
    rows, seen = [], set()
    for path, module in model.named_modules():
        tensors = [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if id(t) not in seen]
        seen.update(map(id, tensors))
        if not tensors:
            continue
        if isinstance(module, Linear4bit):
            shape: tuple[int, ...] = (module.out_features, module.in_features)
            stored = module.config.quant_type + (" + double quant" if module.config.double_quant else "")
            compute = name_of(module.compute_dtype)
        else:
            shape, stored = tuple(tensors[0].shape), name_of(tensors[0].dtype)
            compute = stored
        trainable = sum(t.numel() for t in tensors if t.requires_grad)
        rows.append(ModuleRow(path, 1, shape, stored, compute, sum(map(nbytes, tensors)), trainable))
    return rows


def adapter_table(folder: Path) -> list[ModuleRow]:
    """A row for every matrix of a saved LoRA adapter. They are cast to the dtype of the layer's input when used."""
    read_adapter_config(folder)
    return [
        ModuleRow(key, 1, tuple(t.shape), name_of(t.dtype), "of the input", nbytes(t), t.numel())
        for key, t in read_adapter_weights(folder).items()
    ]


def folder_table(folder: Path, quantize: str | QuantConfig | None, dtype: torch.dtype | None) -> list[ModuleRow]:
    """The table of an adapter folder, or of a model folder as `load_model` would build it; loads no weights."""
    if (folder / WEIGHTS).is_file():
        return adapter_table(folder)
    return module_table(build_model(folder, quantize, dtype))


def group_layers(rows: Iterable[ModuleRow]) -> list[ModuleRow]:
    """Put modules that differ only in the number of their layer into one row."""
    groups: dict[tuple, list[ModuleRow]] = {}
    for row in rows:
        pattern = re.sub(r"\.\d+\.", ".*.", row.path)
        groups.setdefault((pattern, row.shape, row.stored, row.compute, row.trainable > 0), []).append(row)
    return [
        replace(
            members[0],
            path=pattern if len(members) > 1 else members[0].path,
            count=len(members),
            bytes=sum(row.bytes for row in members),
            trainable=sum(row.trainable for row in members),
        )
        for (pattern, *_), members in groups.items()
    ]


def format_table(rows: list[ModuleRow]) -> str:
    """The rows and their total as aligned text."""
    header = ("module", "count", "shape", "stored as", "computed in", "bytes", "trainable")
    cells = [
        (row.path, str(row.count), " x ".join(map(str, row.shape)), row.stored, row.compute, f"{row.bytes:,}",
         f"{row.trainable:,}" if row.trainable else "no")
        for row in rows
    ]  # fmt: skip
    trainable = sum(row.trainable for row in rows)
    total = ("total", str(sum(row.count for row in rows)), "", "", "", f"{sum(row.bytes for row in rows):,}",
             f"{trainable:,}" if trainable else "no")  # fmt: skip
    widths = [max(len(line[i]) for line in (header, *cells, total)) for i in range(len(header))]
    right = {1, 5, 6}  # the columns of numbers

    def line(values: tuple[str, ...]) -> str:
        aligned = (
            v.rjust(w) if i in right else v.ljust(w) for i, (v, w) in enumerate(zip(values, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, cells), rule, line(total)])


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes: resident memory, plus the GPU's where one is used."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
