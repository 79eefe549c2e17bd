"""Floating-point types of weights and activations, and which of them this machine is fast in.

    float32    1 sign  8 exponent  23 fraction bits     exact enough for everything, 4 bytes
    bfloat16   1       8            7                   the same range, 2 to 3 decimal digits, 2 bytes
    float16    1       5           10                   3 to 4 digits, but nothing above 65504

bfloat16 halves memory everywhere, but only some processors multiply it faster than float32 (AVX512-BF16, AMX, ARMv8.6,
GPUs from Ampere on); on the others it is converted piece by piece and several times slower. No portable flag tells, so
a small product is timed in both types.
"""

import time

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where `device` multiplies it natively, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    # Native bfloat16 runs twice as fast as float32, emulated several times slower: a narrow miss means noise, not
    # hardware.
    return torch.bfloat16 if _seconds(torch.bfloat16) < 0.8 * _seconds(torch.float32) else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    return min(times)
