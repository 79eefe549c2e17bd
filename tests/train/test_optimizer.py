"""The optimizer's options through a whole run: paged state, rounding by chance, the order of decay.

The optimizer alone is tested in tests/optim; here, that a setting reaches it, survives a checkpoint, and helps.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import peers
import pytest
import torch

import minift
from minift.optim.adamw8bit import AdamW8bit
from minift.train.checkpoint import load_checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint
from minift.train.config import TrainConfig
from minift.train.loop import TrainResult, make_optimizer, train
from minift.train.records import StepRecord

loop = import_module("minift.train.loop")
ROWS = peers.demo_rows(11)


def run(model: Any, folder: Path, config: TrainConfig, said: list[str] | None = None) -> TrainResult:
    say = (lambda text: None) if said is None else said.append
    return train(model, minift.load_tokenizer(folder), ROWS, config, say)


def config(output: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(**{"max_steps": 6, "batch_size": 2, "lr": 2e-3} | settings, output_dir=str(output))


def numbers(result: TrainResult) -> Sequence[tuple[float, ...]]:
    return [(record.loss, record.grad_norm, record.lr) for record in result.steps]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- paged


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True)], ids=str)
def test_a_paged_run_equals_an_unpaged_one_also_when_it_goes_on(
    tiny: Path, tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch, parts: tuple[bool, bool]
):
    """Bit for bit, and each goes on from the checkpoint of the other.

    All weights are trained: some 350 blocks of state, in pages of 25 blocks, of which 2 are held.
    """
    monkeypatch.setattr(loop, "LARGEST_PAGE", 25 * 520)
    monkeypatch.setattr(loop, "MB", 27_000)
    whole = make_model(tiny, r=0)
    steps = run(whole, tiny, config(tmp_path / "whole"))

    first, second = parts
    settings = config(tmp_path / "parts", page_budget=1, save_every=3)
    run(make_model(tiny, r=0), tiny, replace(settings, paged=first))
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000006")
    assert newest_checkpoint(tmp_path / "parts") == tmp_path / "parts" / "checkpoints" / "step-000003"

    said: list[str] = []
    model = make_model(tiny, r=0)
    result = run(model, tiny, replace(settings, paged=second, resume=True), said)
    assert numbers(result) == numbers(steps)
    assert_equal(weights(model), weights(whole))
    states = [read_checkpoint(tmp_path / part / "checkpoints" / "step-000006").tensors for part in ("parts", "whole")]
    assert_equal(*states)
    reports = [text for text in said if text.startswith("Pages of optimizer state")]
    assert len(reports) == second and all(int(text.split("evictions")[1].split()[0]) > 0 for text in reports)


def test_a_checkpoint_is_loaded_into_pages(tiny: Path, tmp_path: Path, make_model: Any):
    """The state goes to the host, not first to the device: the budget is there because the device has no room."""
    settings = config(tmp_path, paged=True, page_budget=2)
    model = make_model(tiny, r=0)
    run(model, tiny, settings)
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(parameters, settings)
    assert isinstance(optimizer, AdamW8bit) and optimizer.pool is not None
    asked: list[tuple[int, ...]] = []
    empty = optimizer.pool.empty
    optimizer.pool.empty = lambda shape, dtype: (asked.append(tuple(shape)), empty(shape, dtype))[1]
    folder = tmp_path / "checkpoints" / "step-000006"
    load_checkpoint(folder, parameters, optimizer, read_checkpoint(folder).identity)
    assert len(asked) == 4  # codes and scales of both means
    assert optimizer.pool.slots * optimizer.pool.page_bytes <= 2e6 and optimizer.pool.resident_bytes() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_neither_loading_nor_stepping_takes_more_of_a_gpu_than_the_budget(tmp_path: Path):
    """136 MB of state in 4 MB of the device, where an unpaged optimizer goes on alike."""
    parameters = {"p": torch.nn.Parameter(torch.zeros(1 << 26, device="cuda", dtype=torch.bfloat16))}
    p, record = parameters["p"], StepRecord(1, 0.0, 0.0, 0.0, 1, 1, 1.0)
    p.grad = torch.ones_like(p)
    settings = config(tmp_path, page_budget=4)
    first = make_optimizer(parameters, settings)
    first.step()
    folder = save_checkpoint(tmp_path, parameters, first, {}, [record])
    first.step()
    wanted = p.detach().clone()
    del first
    second = make_optimizer(parameters, replace(settings, paged=True))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    load_checkpoint(folder, parameters, second, {})
    second.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 4e6 + 1e6  # and the tables of the kernel
    assert torch.equal(p, wanted)


# --- 16-bit weights


def test_a_bf16_run_stalls_with_nearest_rounding_and_learns_by_chance(tiny: Path, tmp_path: Path, make_model: Any):
    """Every weight is trained, in bf16, at a rate of 2e-5. A weight of 0.08 has neighbours 4.9e-4 away, so a step of
    2e-5 is lost in rounding to nearest; only weights below 0.005 move, 1 in 20. By chance 1 in 25 moves, the whole way.

    The measure is the fall of the loss of the same run with fp32 weights. After 100 steps it was 5.92 -> 4.384 for
    these, 5.92 -> 5.781 to nearest, and 5.92 -> 4.385 by chance.
    """
    falls = {}
    for name, dtype, stochastic in (
        ("fp32", torch.float32, False), ("nearest", torch.bfloat16, False), ("by chance", torch.bfloat16, True),
    ):  # fmt: skip
        settings = config(
            tmp_path / name, max_steps=60, lr=2e-5, batch_size=11, schedule="constant", stochastic_rounding=stochastic
        )
        steps = run(make_model(tiny, r=0, dtype=dtype), tiny, settings).steps
        falls[name] = steps[0].loss - steps[-1].loss
    assert falls["fp32"] > 0.5
    assert falls["nearest"] < 0.25 * falls["fp32"]
    assert falls["by chance"] > 0.8 * falls["fp32"]


def test_the_seed_decides_the_rounding(tiny: Path, tmp_path: Path, make_model: Any):
    """Rows and shuffling are the same: only the rounding can differ."""
    runs = []
    for seed in (3, 3, 4):
        model = make_model(tiny, r=0, dtype=torch.bfloat16)
        run(model, tiny, config(tmp_path, stochastic_rounding=True, shuffle=False, seed=seed))
        runs.append(weights(model))
    assert_equal(runs[0], runs[1])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("r", [0, 8], ids=["fp32-weights", "lora-on-bf16"])
def test_nothing_to_round_by_chance_is_refused(tiny: Path, tmp_path: Path, make_model: Any, r: int):
    """LoRA's matrices are fp32 on a 16-bit base, too."""
    model = make_model(tiny, r=r, dtype=torch.bfloat16 if r else torch.float32)
    with pytest.raises(ValueError, match=r"^stochastic_rounding has nothing to round: all \d+ trained .* float32"):
        run(model, tiny, config(tmp_path / "run", stochastic_rounding=True))
    assert not (tmp_path / "run").exists()


# --- decay


@pytest.mark.parametrize("order", ["torch", "bnb"])
def test_the_order_of_decay_reaches_the_run(tiny: Path, tmp_path: Path, make_model: Any, order: str):
    """Against the formula, in float64, with the update of a run without decay. Step 1 from equal weights:

        torch   p (1 - lr wd) - u          bnb   (p - u) (1 - lr wd)

    At lr wd = 0.01 they differ by 0.01 u, u = 0.02 a weight: 2e-4, where fp32 rounds by 1e-8.
    """
    ends = {}
    for decay in (0.0, 0.5):
        model = make_model(tiny, r=0)
        before = weights(model)
        settings = config(tmp_path, max_steps=1, lr=0.02, weight_decay=decay, decay_order=order)
        run(model, tiny, settings)
        ends[decay] = weights(model)
    keep = 1 - 0.02 * 0.5
    for name, p in before.items():
        start, update = p.double(), p.double() - ends[0.0][name].double()
        wanted = start * keep - update if order == "torch" else (start - update) * keep
        assert (ends[0.5][name].double() - wanted).abs().max() < 1e-6, name
