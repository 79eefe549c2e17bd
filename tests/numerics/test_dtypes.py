"""The table of types, and the choice of the one this machine multiplies fast, with the timing replaced."""

import pytest
import torch

from minift.numerics import dtypes
from minift.numerics.dtypes import DTYPES, fast_dtype


def test_names_are_torchs():
    for name, dtype in DTYPES.items():
        assert dtype is getattr(torch, name) and str(dtype) == f"torch.{name}"
    assert {"float32", "bfloat16", "float16"} == set(DTYPES)


@pytest.mark.parametrize(
    ("bfloat16_seconds", "wanted"),
    [(0.5, torch.bfloat16), (0.7, torch.bfloat16), (0.9, torch.float32), (1.0, torch.float32), (4.0, torch.float32)],
)
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_cpu_takes_the_clearly_faster_one(
    monkeypatch: pytest.MonkeyPatch, device: str | torch.device, bfloat16_seconds: float, wanted: torch.dtype
):
    """Native bfloat16 takes about half the time; a narrow win is noise."""
    monkeypatch.setattr(dtypes, "_seconds", {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}.__getitem__)
    assert fast_dtype(device) == wanted


@pytest.mark.parametrize(
    ("capability", "wanted"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_gpu_goes_by_its_generation(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], wanted: torch.dtype):
    """From Ampere (8.0) on; nothing is timed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delattr(dtypes, "_seconds")
    assert fast_dtype("cuda") == wanted


def test_this_machine_answers():
    assert fast_dtype("cpu") in (torch.float32, torch.bfloat16)
    assert dtypes._seconds(torch.float32) > 0
