"""What the tests of training share: one thread, and models that are ready to train."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import minift
from minift.adapters.inject import lora_layers
from minift.model.decoder import CausalLM

MakeModel = Callable[..., CausalLM]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One thread: on matrices this small, two spend their time waiting for each other (30 s instead of 0.6 s a run)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """make_model(folder, quantize=None, r=8, seed=0, dropout=0.0, attention="sdpa", dtype=..., warm=False).

    r=0 leaves LoRA out, so that every weight is trained. `warm` draws B, too: with B = 0, as LoRA begins, A has no
    gradient and the adapter no effect.
    """

    def make(
        folder: Path,
        quantize: str | None = None,
        r: int = 8,
        seed: int = 0,
        dropout: float = 0.0,
        attention: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        warm: bool = False,
    ) -> CausalLM:
        model = minift.load_model(folder, quantize=quantize, dtype=dtype, attention=attention)
        torch.manual_seed(seed)
        if r:
            minift.add_lora(model, minift.LoraConfig(r=r, alpha=16, dropout=dropout))
        if warm:
            for layer in lora_layers(model).values():
                torch.nn.init.normal_(layer.matrices("default")[1], std=0.05)
        return model

    return make
