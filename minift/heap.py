"""Giving freed memory back to the system.

The C library keeps what a program frees, in case it asks again. Training asks for tensors of ever other sizes, so the
kept pieces stop fitting and the process grows although nothing leaks. glibc can be told to return them.
"""

import ctypes
import sys


def give_memory_back() -> None:
    """Return the pages that hold nothing (glibc only; elsewhere nothing happens)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
