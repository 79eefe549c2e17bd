"""Training with somebody looking on: the same run, the prediction beside what was measured, and what is said when
memory runs out."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import pytest
import torch

import minift
from minift.adapters.inject import lora_layers
from minift.study.fit import fit_batch, free_memory
from minift.study.watch import MemoryWatch, predicted
from minift.train.loop import train
from minift.train.watch import Watch, peak_since, process_peak

ROWS = peers.demo_rows(12)


def make(folder: Path, quantize: str | None = None, lora: bool = True, **settings: Any) -> minift.CausalLM:
    model = minift.load_model(folder, quantize=quantize, dtype=torch.float32, attention="eager")
    torch.manual_seed(0)
    if lora:
        minift.add_lora(model, minift.LoraConfig(r=4, **settings))
    return model


def config_of(output: Path, **settings: Any) -> minift.TrainConfig:
    given: dict[str, Any] = {"batch_size": 4, "max_steps": 3, "tensorboard": False, "output_dir": str(output)}
    return minift.TrainConfig(**(given | settings))


def run(folder: Path, model: minift.CausalLM, config: minift.TrainConfig, watch: Watch | None = None) -> Any:
    return train(model, minift.load_tokenizer(folder), ROWS, config, watch=watch)


SETTINGS: dict[str, tuple[str | None, bool, dict[str, Any]]] = {
    "lora": (None, True, {}),
    "nf4, rows apart": ("nf4", True, {"share_prefix": False}),
    "full, accumulated": (None, False, {"batch_size": 2, "gradient_accumulation": 2, "optimizer": "adamw"}),
    "packed, computed again": (None, True, {"packing": "bfd", "max_length": 128, "batch_size": 2,
                                            "gradient_checkpointing": "on"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_measured_and_stays_as_it_was(tiny: Path, tmp_path: Path, name: str):
    """Bit for bit. 3 % of the peak: these models are so small that sums of gradient norms and masks count."""
    quantize, lora, settings = SETTINGS[name]
    said: list[str] = []
    config = config_of(tmp_path / "run", **settings)
    watch = MemoryWatch(config, said.append)
    model = make(tiny, quantize, lora)
    steps = run(tiny, model, config, watch).steps
    alone = run(tiny, make(tiny, quantize, lora), config_of(tmp_path / "alone", **settings)).steps
    assert [(r.loss, r.grad_norm) for r in steps] == [(r.loss, r.grad_norm) for r in alone] and len(steps) == 3

    first, table = said
    assert re.fullmatch(r"Memory: [\d,]+ MB predicted for a step like the first, at its .+", first)
    ledger, measured = watch.ledger, watch.measured
    assert ledger is not None and measured is not None and measured.beside(ledger) in table
    assert ledger.before == pytest.approx(measured.before, rel=0.005)  # the rows of other micro-batches
    assert ledger.kept == pytest.approx(measured.kept, rel=0.01)
    assert ledger.peak_of_tensors == pytest.approx(measured.peak, rel=0.03)
    weights = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    assert measured.parts["weights"] + measured.parts["adapters"] == weights
    assert measured.parts["gradients"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    saved = json.loads((tmp_path / "run/memory.json").read_text())
    assert saved["measured"]["peak"] == measured.peak and saved["predicted"]["peak"] == ledger.peak
    assert saved["predicted"]["parts"].keys() >= {"weights", "optimizer", "gradients", "logits"}
    assert not (tmp_path / "alone/memory.json").exists()


def test_measuring_can_be_left_out(tiny: Path, tmp_path: Path):
    said: list[str] = []
    config = config_of(tmp_path)
    watch = MemoryWatch(config, said.append, measure=False)
    run(tiny, make(tiny), config, watch)
    assert len(said) == 1 and "predicted" in said[0] and watch.measured is None
    assert not (tmp_path / "memory.json").exists()


def test_what_is_not_predicted_is_measured_all_the_same(tiny: Path, tmp_path: Path):
    said: list[str] = []
    config = config_of(tmp_path)
    watch = MemoryWatch(config, said.append)
    model = make(tiny, use_dora=True)
    run(tiny, model, config, watch)
    assert "not predicted: DoRA" in said[0] and len(said) == 2
    assert watch.ledger is None and watch.measured is not None and watch.measured.peak > watch.measured.before
    peak = json.loads((tmp_path / "memory.json").read_text())["measured"]["peak"]
    assert peak == watch.measured.peak and f"{peak / 1e6:,.2f} MB" in said[1]


def test_every_record_has_the_peak(tiny: Path, tmp_path: Path):
    """Of this process, which never falls, as the system counts it."""
    before = process_peak()
    peaks = [record.peak_memory for record in run(tiny, make(tiny), config_of(tmp_path)).steps]
    assert [before, *peaks] == sorted([before, *peaks]) and peaks[-1] <= peak_since(torch.device("cpu"))
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        assert process_peak() == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)  # counted lazily, by thread
    logged = [json.loads(line)["peak_memory"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == peaks


class Greedy(MemoryWatch):
    """A machine that runs out of memory in its second step."""

    def step(self, *given: Any) -> Any:
        if self._steps == 1:
            return torch.empty(1 << 60, dtype=torch.uint8)
        return super().step(*given)


def test_out_of_memory_says_where_it_goes_and_what_each_change_saves(tiny: Path, tmp_path: Path):
    config = config_of(tmp_path, share_prefix=False)
    model = make(tiny)
    watch = Greedy(config, lambda text: None)
    with pytest.raises(MemoryError) as caught:
        run(tiny, model, config, watch)
    text = str(caught.value)
    match = re.match(
        r"out of memory in step 2\. It takes ([\d,]+) MB as predicted, most of it (.+?)\. Change one", text
    )
    assert match and len(match[2].split(", ")) == 3
    changes = re.findall(r"\((\d)\) (.+?), saves ([\d.,]+) MB", text)
    assert [number for number, *_ in changes] == ["1", "2", "3"]
    saves = [float(size.replace(",", "")) for *_, size in changes]
    assert saves == sorted(saves, reverse=True) and saves[-1] > 0
    assert "allocator said" in text and "`minift memory`" in text


def test_three_largest_categories_are_the_largest(tiny: Path, tmp_path: Path):
    model, tokenizer = make(tiny), minift.load_tokenizer(tiny)
    batch = minift.collate([minift.encode(tokenizer, row) for row in ROWS[:4]], 0)
    config = config_of(tmp_path)
    ledger, why = predicted(model, [batch, batch], config)
    assert ledger is not None and why == "" and ledger.setting.accumulation == 2
    text = MemoryWatch(config, print).shortage(model, [batch, batch])
    largest = sorted(ledger.categories, key=lambda name: -ledger.categories[name])[:3]
    named = text.split("most of it ")[1].split(". Change")[0].split(", ")
    assert [re.sub(r" [\d,]+ MB$", "", name) for name in named] == largest


def test_without_a_watch_a_step_is_taken_and_nothing_said():
    assert Watch().step(None, [], None, lambda: "taken") == "taken"  # pyright: ignore[reportArgumentType]
    assert Watch().shortage(None, []) == ""  # pyright: ignore[reportArgumentType]


# --- the largest batch that fits --------------------------------------------------------------------------------------


def test_what_fits_is_not_changed(tiny: Path, tmp_path: Path):
    said: list[str] = []
    config = config_of(tmp_path, batch_size=6, gradient_accumulation=2)
    model = make(tiny)
    assert fit_batch(model, config, 32, said.append) == config
    assert "Batches of 6 rows, 2 a step" in said[0]
    assert all(p.grad is None for p in model.parameters()) and lora_layers(model)


@pytest.mark.parametrize(("limit", "expected"), [(5, 4), (1, 1)])
def test_a_smaller_batch_makes_the_same_step(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
):
    """12 rows a step: of the batches that fit, the largest that divides it; 12 and 6 run out, 3 x 4 is left."""
    from importlib import import_module

    fit = import_module("minift.study.fit")
    tried: list[int] = []

    def backward(model: Any, batch: Any, *_: Any) -> None:
        tried.append(len(batch.input_ids_bs))
        if tried[-1] > limit:
            torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(fit, "backward", backward)
    config = config_of(tmp_path, batch_size=12)
    found = fit_batch(make(tiny), config, 32)
    assert tried == {5: [12, 6, 3], 1: [12, 6, 3, 1]}[limit]
    size = {5: 3, 1: 1}[limit]
    assert found == replace(config, batch_size=size, gradient_accumulation=12 // size) and size <= expected


def test_the_prediction_is_where_trying_begins(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from importlib import import_module

    fit = import_module("minift.study.fit")
    model, config, tried = make(tiny), config_of(tmp_path, batch_size=8), []
    monkeypatch.setattr(fit, "backward", lambda model, batch, *_: tried.append(len(batch.input_ids_bs)))
    needed = [fit._more_bytes(model, config, size, 64) for size in (1, 2, 4, 8)]
    assert needed == sorted(needed)
    monkeypatch.setattr(fit, "free_memory", lambda device: needed[2])
    assert fit_batch(model, config, 64).batch_size == 4 and tried == [4]
    monkeypatch.setattr(fit, "free_memory", lambda device: 0)
    assert fit_batch(model, config, 64).batch_size == 1


def test_free_memory_is_what_the_system_says():
    free = free_memory(torch.device("cpu"))
    table = Path("/proc/meminfo").read_text()
    total = int(re.findall(r"MemTotal:\s+(\d+)", table)[0]) * 1024  # pyright: ignore[reportArgumentType]
    assert 0 < free <= total
