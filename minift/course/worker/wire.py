"""How inputs and answers travel between parent and child: JSON for the structure, raw bytes for the numbers.

No pickle: unpickling runs code, and what comes back was written by a submission. A tensor travels as dtype, shape,
stride, offset and the bytes of its whole storage, so that views, transposes and guard bands arrive as they were sent.

    frame = | 8 bytes: length of the head | head: JSON {"body": ..., "sizes": [...]} | blob 0 | blob 1 | ...
"""

import json
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch

LARGEST = 1 << 25  # bytes in one tensor


def _bytes_of(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())  # pyright: ignore[reportArgumentType]
    return flat.numpy().tobytes()


def _pack(value: Any, blobs: list[bytes], whole: bool) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_pack(item, blobs, whole) for item in value]
    if kind is tuple or kind is torch.Size:
        return {"tuple": [_pack(item, blobs, whole) for item in value]}
    if kind is dict:
        return {"dict": [[_pack(key, blobs, whole), _pack(item, blobs, whole)] for key, item in value.items()]}
    if kind is torch.dtype:
        return {"dtype": str(value).removeprefix("torch.")}
    if kind is torch.Generator:
        blobs.append(_bytes_of(value.get_state()))
        return {"generator": len(blobs) - 1}
    if kind in (torch.Tensor, torch.nn.Parameter):
        if value.layout is not torch.strided or value.is_meta:
            raise TypeError(f"a {value.layout} tensor on {value.device} is not a plain tensor")
        tensor = value.detach().cpu()
        if not whole:
            tensor = tensor.contiguous().clone()
        if tensor.untyped_storage().nbytes() > LARGEST:
            raise TypeError(f"a tensor of shape {tuple(tensor.shape)} is too large to be an answer")
        blobs.append(_bytes_of(tensor))
        return {
            "tensor": len(blobs) - 1,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset(),
            "grad": bool(value.requires_grad) and whole,
        }
    raise TypeError(f"{kind.__module__}.{kind.__qualname__} is neither a torch.Tensor nor a plain number, text or list")


def pack(value: Any, whole: bool = False) -> bytes:
    """A value as one frame; `whole` keeps strides and the bytes around a view. TypeError for other objects."""
    blobs: list[bytes] = []
    body = _pack(value, blobs, whole)
    head = json.dumps({"body": body, "sizes": [len(blob) for blob in blobs]}).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *blobs])


def _tensor(node: dict, blobs: list[bytes]) -> torch.Tensor:
    dtype, blob = getattr(torch, node["dtype"]), blobs[node["tensor"]]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{node['dtype']} is not a dtype")
    if math.prod(node["shape"]) * dtype.itemsize > LARGEST:
        raise ValueError(f"a tensor of shape {node['shape']} is larger than what can have been sent")
    flat = torch.frombuffer(bytearray(blob), dtype=dtype) if blob else torch.empty(0, dtype=dtype)
    tensor = flat.as_strided(node["shape"], node["stride"], node["offset"])
    return tensor.requires_grad_() if node["grad"] else tensor


def _unpack(node: Any, blobs: list[bytes]) -> Any:
    if isinstance(node, list):
        return [_unpack(item, blobs) for item in node]
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return _tensor(node, blobs)
    if "tuple" in node:
        return tuple(_unpack(item, blobs) for item in node["tuple"])
    if "dict" in node:
        return {_unpack(key, blobs): _unpack(item, blobs) for key, item in node["dict"]}
    if "dtype" in node:
        return getattr(torch, node["dtype"])
    state = torch.frombuffer(bytearray(blobs[node["generator"]]), dtype=torch.uint8)
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def frames(file: BinaryIO) -> Iterator[Any]:
    """The values of the complete frames in a file; one that was cut off by the end of its process is left out."""
    while len(start := file.read(8)) == 8:
        length = int.from_bytes(start, "little")
        head = file.read(length) if length <= LARGEST else b""
        if len(head) < length or not head:
            return
        described = json.loads(head)
        if not all(0 <= size <= LARGEST for size in described["sizes"]):
            return
        blobs = [file.read(size) for size in described["sizes"]]
        if [len(blob) for blob in blobs] != described["sizes"]:
            return
        yield _unpack(described["body"], blobs)
