"""The folder of a run: its log line by line, its config, events for TensorBoard, and doing it again."""

import hashlib
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from minift.train.config import TrainConfig
from minift.train.folder import RunFolder, read_config, read_log
from minift.train.records import StepRecord
from minift.train.remember import fill_in, to_remember

folder_module = import_module("minift.train.folder")


def record(step: int, **look: Any) -> StepRecord:
    return StepRecord(step, 2.0 / step, 1.0, 1e-3, 10, 20, 0.1, **look)


def test_a_line_is_on_the_disk_as_soon_as_its_step_is_done(tmp_path: Path):
    folder = RunFolder(tmp_path / "run", TrainConfig(), [record(1)], {"model": "m", "data": {"rows": 3}})
    folder.add(record(2, eval_loss=1.0, eval_perplexity=2.7, eval_accuracy=0.5))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]  # not closed yet
    assert [line["step"] for line in lines] == [1, 2] and "eval_loss" not in lines[0] and lines[1]["eval_loss"] == 1.0
    assert read_log(tmp_path / "run") == [record(1), record(2, eval_loss=1.0, eval_perplexity=2.7, eval_accuracy=0.5)]
    folder.close()
    with (tmp_path / "run/log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # the machine lost power
    assert [r.step for r in read_log(tmp_path / "run")] == [1, 2]


def test_config_holds_what_the_run_was(tmp_path: Path):
    config = TrainConfig(lr=0.5, output_dir=str(tmp_path))
    RunFolder(tmp_path, config, [], {"model": "m", "data": {"rows": 3}}).close()
    content = read_config(tmp_path)
    assert TrainConfig(**content["config"]) == config
    assert (
        content["versions"]["torch"] == torch.__version__ and content["model"] == "m" and content["data"] == {"rows": 3}
    )
    with pytest.raises(FileNotFoundError, match=r"not the folder of a run: it holds no config\.json"):
        read_config(tmp_path / "nowhere")
    for damage in ("", "[]", '{"config": {"lr": -1}}', '{"config": {"rate": 1}}'):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            read_config(tmp_path)


@pytest.mark.parametrize(("installed", "wanted"), [(True, True), (True, False), (False, True)])
def test_events_for_tensorboard_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, wanted: bool
):
    """With a stand-in for its writer."""
    events: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, place: str, purge_step: int):
            events.append((place, purge_step))

        def add_scalar(self, *given: Any) -> None:
            events.append(given)

        def close(self) -> None:
            events.append(())

    module = ModuleType("writer")
    vars(module)["SummaryWriter"] = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", module)
    monkeypatch.setattr(folder_module, "find_spec", lambda name: name if installed else None)
    folder = RunFolder(tmp_path, TrainConfig(tensorboard=wanted), [record(1)], {})
    folder.add(record(2, eval_loss=1.5))
    folder.close()
    if not (installed and wanted):
        assert events == []
        return
    assert events[0] == (str(tmp_path / "tensorboard"), 2) and events[-1] == ()
    assert {("loss", 1.0, 2), ("eval/loss", 1.5, 2), ("lr", 1e-3, 2)} <= set(events[1:-1])


def test_options_of_an_earlier_run_fill_in_what_is_not_given(tmp_path: Path):
    data = tmp_path / "rows.jsonl"
    data.write_text("rows")
    begun = {"data": str(data), "eval_data": None, "lr": 0.5, "rank": 4, "output_dir": "a", "resume": False}
    kept = to_remember(begun)
    assert kept["sha256"] == {str(data): hashlib.sha256(b"rows").hexdigest()} and "output_dir" not in kept
    RunFolder(tmp_path / "a", TrainConfig(), [], {"options": kept}).close()
    now = {"data": None, "eval_data": None, "lr": 1e-4, "rank": 8, "output_dir": str(tmp_path / "b"), "resume": False}
    filled = fill_in(now, ["rank", "output_dir"], str(tmp_path / "a"))
    assert filled == {**begun, "rank": 8, "output_dir": str(tmp_path / "b")}
    assert fill_in(now, [], None) == now
    resumed = {**now, "output_dir": str(tmp_path / "a"), "resume": True}
    assert fill_in(resumed, ["output_dir", "resume"], None)["lr"] == 0.5
    with pytest.raises(ValueError, match="give another --output-dir"):
        fill_in(resumed | {"resume": False}, ["output_dir"], str(tmp_path / "a"))
    data.write_text("other rows")
    with pytest.raises(ValueError, match=r"rows\.jsonl has changed since the run in"):
        fill_in(now, [], str(tmp_path / "a"))
    RunFolder(tmp_path / "c", TrainConfig(), [], {"options": None}).close()
    with pytest.raises(ValueError, match="does not remember any options"):
        fill_in(now, [], str(tmp_path / "c"))
