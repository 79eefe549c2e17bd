"""k2: launches the student's kernel and counts, in Triton's interpreter, what kernels store."""

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

ROOM = 4096  # elements before and after the output


def launch(student, packed, absmax, code, x, rows, blocksize):
    """What a kernel makes of it, in an output with room on both sides; and whether it was a kernel."""
    out = torch.full((rows + 2 * ROOM,), torch.nan)[ROOM : ROOM + rows]
    builder: Any = interpreter.InterpreterBuilder
    stored = []
    store = builder.create_masked_store

    def counted_store(self, ptrs, value, mask, *rest):
        stored.append(int(np.broadcast_to(mask.data, ptrs.data.shape).sum()))
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_store = counted_store
    try:
        student.matvec(packed, absmax, code, x, out, blocksize)
    finally:
        builder.create_masked_store = store
    return out, sum(stored) >= rows
