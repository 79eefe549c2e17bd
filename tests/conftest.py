"""What every test shares: no network, the tiny checkpoints, the real model, the packages that are not installed."""

import importlib
import os
import signal
import sys
from pathlib import Path

import peers
import pytest
import torch

# The peers must not look for a hub, also in the processes that tests start.
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# A shell starts what runs in the background with Ctrl-C ignored, and its children inherit that. Tests that interrupt a
# process of their own then wait for nothing; with Python's handler here the children begin with the default again.
signal.signal(signal.SIGINT, signal.default_int_handler)

# `benchmarks` and `notebooks` lie at the root, which stays off sys.path for everything else: there `kernels/` would
# look like somebody else's package. The entry `tests` of sys.path holds folders of these names, too, but a folder
# without `__init__.py` gives way to a package wherever on the path that is; once imported, its modules are found
# through it.
_before = list(sys.path)
sys.path.append(str(Path(__file__).parents[1]))
for _name in ("benchmarks", "notebooks"):
    importlib.import_module(_name)
sys.path[:] = _before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint (2 layers, width 64, 4 heads on 2, tied) with tokenizer and ChatML template."""
    return Path(peers.tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def tiny_odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with odd sizes (width 65, MLP 131, 5 heads on 1) and a head of its own."""
    folder = tmp_path_factory.mktemp("models") / "tiny-odd"
    return Path(peers.tiny_llama(folder, tied=False, heads=5, kv_heads=1, hidden=65))


@pytest.fixture(scope="session")
def real() -> Path:
    """SmolLM2-135M-Instruct, fetched as a user would; the tests that need it fail where it cannot be had."""
    from minift.sources.resolve import resolve

    offline = os.environ.pop("HF_HUB_OFFLINE", None)
    try:
        return resolve("smollm2-135m-instruct")
    finally:
        if offline is not None:
            os.environ["HF_HUB_OFFLINE"] = offline


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    torch.manual_seed(0)
