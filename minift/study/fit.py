"""The largest micro-batch that this machine takes: first as predicted, then as tried.

A step of `batch_size x gradient_accumulation` rows can be taken in smaller pieces with the same result, because the
loss is a sum over all of them (train/step.py). So a batch that does not fit is no reason to train differently:

    batch_size 32, accumulation 1  ->  8 x 4        if 8 rows fit, and 16 do not

The prediction gives the size to begin with; each one that runs out of memory all the same is halved.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from minift.data.collate import Batch
from minift.model.decoder import CausalLM
from minift.study.ledger import find_batch_size, predict_for
from minift.study.setting import setting_of_batch
from minift.train.config import TrainConfig
from minift.train.step import backward


def fit_batch(
    model: CausalLM, config: TrainConfig, length: int, say: Callable[[str], object] = lambda text: None
) -> TrainConfig:
    """The same settings in micro-batches that fit, of at most `batch_size` rows, and as many rows a step.

    Args:
        model: ready to train. Tried sizes leave no gradient behind; random numbers are drawn if there is dropout.
        length: tokens of the longest row.
        say: told what was predicted and what was found.

    Raises:
        MemoryError: not even one row fits.
    """
    rows = config.batch_size * config.gradient_accumulation
    sizes = [size for size in range(1, config.batch_size + 1) if rows % size == 0]
    free = free_memory(model.device)
    try:
        fitting = [size for size in sizes if _more_bytes(model, config, size, length) <= free]
    except ValueError:  # of a method that is not predicted
        fitting = sizes
    start = fitting[-1] if fitting else 1

    def try_step(size: int) -> None:
        try:
            backward(model, _batch(model, size, length), size * (length - 1), config.checkpointing)
        finally:
            model.zero_grad(set_to_none=True)

    found = find_batch_size(try_step, start)
    size = max(n for n in sizes if n <= found)
    say(f"Batches of {size} rows, {rows // size} a step: {start} expected in {free / 1e6:,.0f} MB, {found} tried")
    return replace(config, batch_size=size, gradient_accumulation=rows // size)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device: a GPU's, or what the system would give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return available[0] if available else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _batch(model: CausalLM, rows: int, length: int) -> Batch:
    """Rows of one token, all but the first trained."""
    ids = torch.zeros(rows, length, dtype=torch.long, device=model.device)
    return Batch(ids, ids.clone(), torch.arange(length, device=model.device).repeat(rows, 1), ids.clone())


def _more_bytes(model: CausalLM, config: TrainConfig, rows: int, length: int) -> int:
    """What a step takes beside the model itself."""
    ledger = predict_for(setting_of_batch(model, _batch(model, rows, length), config), model)
    return ledger.peak - ledger.parts["weights"] - ledger.parts["adapters"]
