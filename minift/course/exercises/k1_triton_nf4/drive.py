"""k1: launches the student's kernel and watches, in Triton's interpreter, what it loads and stores."""

from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

ROOM = 4096  # elements before and after the output


class Watch:
    """Elements that kernels stored, and those loaded from the memory around a tensor instead of from it."""

    def __init__(self, tensors):
        self.stored = self.strayed = 0
        self.places = []
        for tensor in tensors:
            storage, start = tensor.untyped_storage(), tensor.data_ptr()
            around = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
            self.places.append((around, (start, start + tensor.numel() * tensor.element_size())))

    def loads(self, addresses, mask):
        at = addresses[np.broadcast_to(mask, addresses.shape)]
        for (low, high), (start, end) in self.places:
            self.strayed += int(((at >= low) & (at < high) & ((at < start) | (at >= end))).sum())


@contextmanager
def watching(*tensors):
    builder: Any = interpreter.InterpreterBuilder
    watch = Watch(tensors)
    load, store = builder.create_masked_load, builder.create_masked_store

    def watched_load(self, ptrs, mask, *rest):
        watch.loads(ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest)

    def watched_store(self, ptrs, value, mask, *rest):
        watch.stored += int(np.broadcast_to(mask.data, ptrs.data.shape).sum())
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield watch
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def launch(student, packed, absmax, code, n, dtype, blocksize):
    """What a kernel makes of it, in an output with room on both sides; and whether it was a kernel."""
    out = torch.full((n + 2 * ROOM,), torch.nan, dtype=dtype)[ROOM : ROOM + n]
    with watching() as watch:
        student.dequantize(packed, absmax, code, out, blocksize)
    return out, watch.stored >= n


def strayed_loads(student, packed, absmax, code, n, dtype, blocksize):
    """How many elements were loaded from outside the tensors, and whether there was a kernel."""
    out = torch.full((n + 2 * ROOM,), torch.nan, dtype=dtype)[ROOM : ROOM + n]
    with watching(packed, absmax, code) as watch:
        student.dequantize(packed, absmax, code, out, blocksize)
    return watch.strayed, watch.stored >= n
