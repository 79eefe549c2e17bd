"""Quantized weights in a checkpoint file, under the names bitsandbytes gives them.

One 4-bit layer is a handful of tensors; what is not a tensor is written as JSON text in a uint8 tensor:

    P.weight                                  packed codes           uint8 [n / 2, 1] (or quant_storage)
    P.weight.absmax                           scales                 fp32 [m]; with double quantization uint8 [m]
    P.weight.quant_map                        the codebook           fp32 [16]
    P.weight.nested_absmax                    scales of the scales   fp32 [m / 256]      double quantization only
    P.weight.nested_quant_map                 the dynamic map        fp32 [256]          double quantization only
    P.weight.quant_state.bitsandbytes__nf4    {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16",
                                               "shape": [576, 576], "nested_blocksize": 256, ...}

and one 8-bit layer three:

    P.weight   int8 [o, i]        P.SCB   row maxima, fp32 [o]        P.weight_format   uint8, 0 for row-major

The codebooks are in the file, but bitsandbytes decodes with its built-in tables whatever the file says. A file whose
tables differ from the built-in ones would silently mean other weights, so it is refused.

Source: bitsandbytes `nn/modules.py` (`_save_to_state_dict`), `functional.py` (`QuantState.as_dict`, `from_dict`).
"""

import json
from typing import Any

import torch
from torch import Tensor

from minift.numerics.dtypes import DTYPES
from minift.quant.codebooks import codebook, dynamic_map
from minift.quant.fourbit import NESTED_BLOCKSIZE, QuantState, check_format, check_state

STATE = "weight.quant_state.bitsandbytes__"
ROW_MAJOR = 0


def is_quantized(names: set[str] | dict[str, Any]) -> bool:
    """Whether the tensors of a layer (named within it) are those of a quantized one."""
    return "SCB" in names or any(name.startswith("weight.") for name in names)


def owners(name: str) -> list[str]:
    """a.b.c.d -> [a.b.c, a.b, a]: the modules that a tensor may belong to."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def fourbit_tensors(packed: Tensor, state: QuantState) -> dict[str, Tensor]:
    """The tensors of a 4-bit weight, by their names within the layer."""
    record: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    # Copies of the tables: safetensors refuses tensors that share memory, and every layer names the same two.
    table = codebook(state.quant_type).clone()
    tensors = {"weight": packed, "weight.absmax": state.absmax, "weight.quant_map": table}
    if state.nested_absmax is not None and state.nested_offset is not None:
        record |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": state.nested_offset.item(),  # fp32 -> double -> shortest decimal -> the same fp32
        }
        tensors |= {"weight.nested_absmax": state.nested_absmax, "weight.nested_quant_map": dynamic_map(True).clone()}
    text = json.dumps(record).encode()
    tensors[STATE + state.quant_type] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def read_fourbit(tensors: dict[str, Tensor], shape: tuple[int, int], where: str) -> tuple[Tensor, QuantState]:
    """Put a 4-bit weight together from its tensors.

    Args:
        tensors: by their names within the layer, `bias` not among them.
        shape: that the layer needs.
        where: path of the layer, for errors.

    Raises:
        ValueError: a missing, surplus or inconsistent tensor; names it.
    """
    states = [name for name in tensors if name.startswith(STATE)]
    if len(states) != 1:
        found = ", ".join(states) or "none"
        raise ValueError(f"{where} needs one tensor {STATE}nf4 or {STATE}fp4; found {found}")
    record = read_record(tensors[states[0]], f"{where}.{states[0]}")
    quant_type, blocksize = record["quant_type"], record["blocksize"]
    nested = "nested_offset" in record
    maps, needed = {"weight.quant_map": codebook(quant_type)}, {"weight", "weight.absmax", states[0]}
    if nested:
        maps["weight.nested_quant_map"] = dynamic_map(True)
        needed.add("weight.nested_absmax")
    needed |= maps.keys()
    _check_names(tensors, needed, where)
    if states[0] != STATE + quant_type:
        raise ValueError(f"{where}.{states[0]} says {quant_type!r} inside")
    for name, table in maps.items():
        if not torch.equal(tensors[name].cpu().float(), table):
            raise ValueError(f"{where}.{name} is not the table of {quant_type}; bitsandbytes would ignore it, too")
    stored = tuple(record["shape"])
    if stored != shape:
        raise ValueError(f"{where}.weight has shape {stored} in the checkpoint; the model needs {shape}")
    offset = torch.tensor(record["nested_offset"], dtype=torch.float32) if nested else None
    state = QuantState(
        shape, DTYPES[record["dtype"]], quant_type, blocksize, tensors["weight.absmax"],
        tensors.get("weight.nested_absmax"), offset,
    )  # fmt: skip
    try:
        check_state(tensors["weight"], state)
    except ValueError as error:
        raise ValueError(f"{where}.weight: {error}") from None
    return tensors["weight"], state


def int8_tensors(codes: Tensor, absmax: Tensor) -> dict[str, Tensor]:
    """The tensors of an int8 weight, by their names within the layer."""
    return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(ROW_MAJOR, dtype=torch.uint8)}


def read_int8(tensors: dict[str, Tensor], shape: tuple[int, int], where: str) -> tuple[Tensor, Tensor]:
    """Codes and row maxima of an int8 weight from its tensors. Arguments and errors as `read_fourbit`."""
    _check_names(tensors, {"weight", "SCB"} | ({"weight_format"} & tensors.keys()), where)
    layout = tensors.get("weight_format")
    if layout is not None and layout.tolist() != ROW_MAJOR:
        raise ValueError(f"{where}.weight_format is {layout.tolist()}; only {ROW_MAJOR} (row-major) is supported")
    for name, dtype, size in (("weight", torch.int8, shape), ("SCB", torch.float32, shape[:1])):
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{where}.{name} is {found} in the checkpoint; the model needs {dtype} {size}")
    return tensors["weight"], tensors["SCB"]


def _check_names(tensors: dict[str, Tensor], needed: set[str], where: str) -> None:
    missing, surplus = sorted(needed - tensors.keys()), sorted(tensors.keys() - needed)
    if missing:
        raise ValueError(f"{where}.{missing[0]} is missing in the checkpoint")
    if surplus:
        raise ValueError(f"{where}.{surplus[0]} is in the checkpoint, but this format has no such tensor")


def read_record(tensor: Tensor, name: str) -> dict[str, Any]:
    """The JSON text of a quant_state tensor, checked. ValueError says what is wrong with it; `name` is for that."""
    try:
        record = json.loads(bytes(tensor.cpu().to(torch.uint8).flatten().tolist()).decode())
        types: dict[str, Any] = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
        if "nested_offset" in record:
            types |= {"nested_blocksize": int, "nested_dtype": str, "nested_offset": float | int}
        for key, kind in types.items():
            if not isinstance(record.get(key), kind):
                raise ValueError(f"{key} is {record.get(key)!r}")
        check_format(record["quant_type"], record["blocksize"])
        if record["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {record['dtype']!r}")
        if record.get("nested_blocksize", NESTED_BLOCKSIZE) != NESTED_BLOCKSIZE:
            raise ValueError(f"nested_blocksize is {record['nested_blocksize']}, only {NESTED_BLOCKSIZE} is supported")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not the record of a 4-bit weight: {error}") from None
    return record
