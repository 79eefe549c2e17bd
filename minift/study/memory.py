"""Where a model's bytes are: a table of its modules, and the most memory this process ever held.

The table counts what is stored, quantization state included. Of SmolLM2-135M's linears in NF4 with double quantization:

    packed codes   0.5 bytes a weight        absmax   1 byte / 64 weights        nested absmax   4 bytes / (64 * 256)

transformers' `get_memory_footprint` counts parameters and buffers only. bitsandbytes keeps the state (absmax and what
belongs to it) as attributes beside them, so that figure is too small by 3 % in NF4 and by 4 bytes a row in int8. Both
are given here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minift.adapters.folder import WEIGHTS, read_adapter_weights, read_content
from minift.model.load import build_model
from minift.quant.config import QuantConfig
from minift.quant.linear import Linear8bit, QuantizedLinear
from minift.train.watch import process_peak


@dataclass(frozen=True)
class ModuleRow:
    """One module, or `count` alike ones of several layers (their number in the path is then `*`).

    Attributes:
        shape: of the weight, as it is used.
        stored, compute: dtype in memory (or format), and dtype of the arithmetic.
        bytes: of all `count` modules, with quantization state.
        trainable: number of trained parameters in them.
        state_bytes: how many of the bytes are quantization state: scales and what belongs to them.
    """

    path: str
    count: int
    shape: tuple[int, ...]
    stored: str
    compute: str
    bytes: int
    trainable: int
    state_bytes: int = 0


def footprint(rows: Iterable[ModuleRow], quant_state: bool = True) -> int:
    """Bytes of all rows; without the quantization state it is what `get_memory_footprint` would say."""
    return sum(row.bytes - (0 if quant_state else row.state_bytes) for row in rows)


def module_table(model: nn.Module) -> list[ModuleRow]:
    """A row for every module that owns a weight; works on the meta device. A tied weight is listed once."""
    rows, seen = [], set()
    for path, module in model.named_modules():
        tensors = [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if id(t) not in seen]
        seen.update(map(id, tensors))
        if not tensors:
            continue
        if isinstance(module, QuantizedLinear):
            shape: tuple[int, ...] = (module.out_features, module.in_features)
            stored = module.config.label
            compute = "int8" if isinstance(module, Linear8bit) else name_of(module.compute_dtype)
        else:
            shape, stored = tuple(tensors[0].shape), name_of(tensors[0].dtype)
            compute = stored
        trainable = sum(t.numel() for t in tensors if t.requires_grad)
        state = [b for name, b in module.named_buffers(recurse=False) if name != "weight"]
        state_bytes = sum(map(nbytes, state)) if isinstance(module, QuantizedLinear) else 0
        rows.append(ModuleRow(path, 1, shape, stored, compute, sum(map(nbytes, tensors)), trainable, state_bytes))
    return rows


def adapter_table(folder: Path) -> list[ModuleRow]:
    """A row for every tensor of a saved adapter. They are cast to the dtype of the layer's input when used."""
    read_content(folder)  # refuses what is no adapter
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
            state_bytes=sum(row.state_bytes for row in members),
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
    total = ("total", str(sum(row.count for row in rows)), "", "", "", f"{footprint(rows):,}",
             f"{trainable:,}" if trainable else "no")  # fmt: skip
    widths = [max(len(line[i]) for line in (header, *cells, total)) for i in range(len(header))]
    right = {1, 5, 6}  # the columns of numbers

    def line(values: tuple[str, ...]) -> str:
        aligned = (
            v.rjust(w) if i in right else v.ljust(w) for i, (v, w) in enumerate(zip(values, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    lines = [line(header), rule, *map(line, cells), rule, line(total)]
    if footprint(rows) != footprint(rows, quant_state=False):
        without = f"{footprint(rows, quant_state=False):,}"
        lines.append(f"without quantization state, as transformers' get_memory_footprint counts: {without} bytes")
    return "\n".join(lines)


def peak_memory(in_steps: int = 0) -> int:
    """The most memory this process has held so far, in bytes: resident memory, plus the GPU's where one is used.

    Args:
        in_steps: the largest `peak_memory` of the records of a run: every step starts the GPU's count again.
    """
    gpu = max(in_steps, torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
    return process_peak() + gpu


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
