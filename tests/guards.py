"""What tests of kernels share: where they run, guard bands around buffers, a page nobody may read.

One body serves two machines. `cuda`: the compiled kernel, marked `gpu`. `cpu`: Triton's interpreter, which must be
chosen before the kernel is decorated, so these run only in a process started with TRITON_INTERPRET=1; the ordinary test
run does that in kernels/test_interpreter.py.

Guard bands: inputs and outputs are slices of larger buffers. What lies around an output must keep its pattern, so a
missing store mask shows. What lies around the inputs is poison (NaN scales, bytes of the largest code) and must stay as
it was, and behind an input may follow an unreadable page, so a missing load mask ends the process.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start: test_interpreter.py runs it so"
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU, and no TRITON_INTERPRET"
            ),
        ],
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 8192  # elements on each side: more than a program handles, so that a whole program astray is seen


def bits(x: Tensor) -> Tensor:
    """The patterns as integers, so that +0.0 and -0.0 differ and NaN equals itself."""
    return x.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


def poison_of(dtype: torch.dtype) -> float:
    return torch.nan if dtype.is_floating_point else 0xFF


class Guards:
    """Buffers with guard bands, and a check of all of them at the end."""

    def __init__(self, device: str):
        self.device = device
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._outputs: list[tuple[Tensor, Tensor]] = []

    def input(self, x: Tensor | None) -> Tensor | None:
        """A copy of x between two bands of poison; no byte of it may change."""
        if x is None:
            return None
        buffer = torch.full((x.numel() + 2 * GUARD,), poison_of(x.dtype), dtype=x.dtype, device=self.device)
        inside = buffer[GUARD : GUARD + x.numel()]
        inside.copy_(x.reshape(-1))
        self._inputs.append((buffer, buffer.clone()))
        return inside.view(x.shape)

    def output(self, n: int, dtype: torch.dtype) -> Tensor:
        """Room for n elements between two bands that must keep their pattern."""
        pattern = -555.0 if dtype.is_floating_point else 0xAA
        buffer = torch.full((n + 2 * GUARD,), pattern, dtype=dtype, device=self.device)
        self._outputs.append((buffer, buffer.clone()))
        return buffer[GUARD : GUARD + n]

    def check(self) -> None:
        for buffer, before in self._inputs:
            assert torch.equal(bits(buffer), bits(before)), "wrote into an input"
        for buffer, before in self._outputs:
            assert torch.equal(bits(buffer[:GUARD]), bits(before[:GUARD])), "wrote before an output"
            assert torch.equal(bits(buffer[-GUARD:]), bits(before[-GUARD:])), "wrote behind an output"


@contextmanager
def guard_bands(device: str) -> Iterator[Guards]:
    guards = Guards(device)
    yield guards
    guards.check()


def on_cuda_path(operator: str, *arguments):
    """Call what the dispatcher would call for CUDA tensors, so that the interpreter's CPU tensors get there, too."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.minift, operator).default.redispatch(cuda, *arguments)


def skip_unless_pages_can_be_protected(device: str) -> None:
    if device == "cuda" or sys.platform != "linux":
        pytest.skip("the pages are in this process's memory, and protected the Linux way")


class UnreadablePages:
    """Copies of tensors that end where a page without any access rights begins. Holds their memory."""

    def __init__(self):
        self._memory: list[mmap.mmap] = []

    def before_page(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        page = mmap.PAGESIZE
        readable = -(-x.nbytes // page) * page
        memory = mmap.mmap(-1, readable + page)
        copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=readable - x.nbytes).view(x.shape)
        copy.copy_(x)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert protect(copy.data_ptr() + x.nbytes, page, 0) == 0, os.strerror(ctypes.get_errno())
        self._memory.append(memory)
        return copy
