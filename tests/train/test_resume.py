"""Stopping and going on: on a CPU the later losses are equal, bit for bit, to those of a run that never stopped.

There is no peer, the run is compared with itself. It is stopped by the signal that Ctrl-C sends, once inside the test's
own process after a chosen step, once in a process of its own; by a full disk; and by files damaged in several ways.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import peers
import pytest
import torch

import minift
from minift.adapters.verbs import save_adapter
from minift.train.config import TrainConfig
from minift.train.loop import StepRecord, TrainResult, train

# `minift.train` is also the name of a function, so its rooms are fetched by name.
loop, checkpoint = import_module("minift.train.loop"), import_module("minift.train.checkpoint")
adapter_files = import_module("minift.adapters.folder")

ROWS = peers.as_messages(peers.demo_rows(11))
STEPS = 7


def settings(output: Path, **chosen: Any) -> TrainConfig:
    return TrainConfig(
        **{"max_steps": STEPS, "batch_size": 2, "lr": 2e-3, "warmup_steps": 2, "save_every": 2} | chosen,
        output_dir=str(output),
    )


def run(model: Any, folder: Path, config: TrainConfig, rows: Sequence[Any] = ROWS) -> TrainResult:
    return train(model, minift.load_tokenizer(folder), rows, config)


def numbers(steps: Sequence[StepRecord]) -> list[tuple[float, ...]]:
    return [(s.step, s.loss, s.grad_norm, s.lr, s.trained_tokens, s.tokens) for s in steps]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """stop_after(n): send SIGINT to this process in the middle of the run's n-th step."""
    real = loop.train_step
    # What a terminal gives a process; a test runner in the background may have it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop_after(count: int, times: int = 1) -> None:
        taken = 0

        def interrupted(*args: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == count:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return real(*args)

        monkeypatch.setattr(loop, "train_step", interrupted)

    yield stop_after
    signal.signal(signal.SIGINT, before)


# --- the same numbers


@pytest.mark.parametrize("packing", ["none", "bfd"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("stop", [1, 4, 7], ids=["first-step", "second-epoch", "last-step"])
def test_going_on_equals_never_stopping(
    tiny: Path, tmp_path: Path, make_model: Any, stop_after: Any, packing: str, optimizer: str, stop: int
):
    """Dropout and shuffling are on, so that random numbers matter; r=64 makes matrices large enough for 8-bit state."""
    chosen: dict[str, Any] = {"packing": packing, "optimizer": optimizer, "weight_decay": 0.01, "seed": 3}
    if packing == "bfd":
        chosen |= {"max_length": 180, "batch_size": 1}
    model = make_model(tiny, r=64, dropout=0.2)
    whole = run(model, tiny, settings(tmp_path / "whole", **chosen))
    assert whole.finished and len({record.loss for record in whole.steps}) == STEPS

    stop_after(stop)
    first = run(make_model(tiny, r=64, dropout=0.2), tiny, settings(tmp_path / "parts", **chosen))
    assert len(first.steps) == stop and first.finished == (stop == STEPS)
    assert (first.adapter is None) == (stop < STEPS)

    stop_after(10**9)
    torch.rand(5)
    other = make_model(tiny, r=64, dropout=0.2, seed=99)  # the adapter's weights come from the checkpoint, too
    second = run(other, tiny, settings(tmp_path / "parts", resume=True, **chosen))
    assert second.finished
    assert numbers(second.steps) == numbers(whole.steps)
    assert equal(weights(other), weights(model))
    saved = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / saved).read_bytes() == (tmp_path / "whole" / saved).read_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_stopping_twice_and_an_nf4_base(tiny: Path, tmp_path: Path, make_model: Any, stop_after: Any, optimizer: str):
    chosen: dict[str, Any] = {"optimizer": optimizer, "gradient_accumulation": 2}
    whole = run(make_model(tiny, "nf4", dropout=0.1), tiny, settings(tmp_path / "whole", **chosen))
    for stop, done in ((2, 2), (3, 5), (9, STEPS)):
        stop_after(stop)
        model = make_model(tiny, "nf4", dropout=0.1)
        result = run(model, tiny, settings(tmp_path / "parts", resume=True, **chosen))
        assert len(result.steps) == done
    assert numbers(result.steps) == numbers(whole.steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_full_fine_tuning_goes_on_too(
    tiny: Path, tmp_path: Path, make_model: Any, stop_after: Any, optimizer: str, dtype: torch.dtype
):
    """The optimizer's means are fp32 also where the parameters are bf16, before and after."""
    model = make_model(tiny, r=0, dtype=dtype)
    whole = run(model, tiny, settings(tmp_path / "whole", optimizer=optimizer))
    stop_after(3)
    run(make_model(tiny, r=0, dtype=dtype), tiny, settings(tmp_path / "parts", optimizer=optimizer))
    stop_after(10**9)
    other = make_model(tiny, r=0, dtype=dtype)
    second = run(other, tiny, settings(tmp_path / "parts", optimizer=optimizer, resume=True))
    assert numbers(second.steps) == numbers(whole.steps)
    assert equal(weights(other), weights(model))


@pytest.mark.parametrize("r", [8, 0], ids=["lora", "all-weights"])
def test_the_same_model_may_go_on_in_the_same_process(
    tiny: Path, tmp_path: Path, make_model: Any, stop_after: Any, r: int
):
    """As in a notebook: stop, look, go on. The model in memory is not the one that the run began with."""
    whole = run(make_model(tiny, r=r), tiny, settings(tmp_path / "whole"))
    model = make_model(tiny, r=r)
    stop_after(3)
    run(model, tiny, settings(tmp_path / "parts"))
    stop_after(10**9)
    second = run(model, tiny, settings(tmp_path / "parts", resume=True))
    assert numbers(second.steps) == numbers(whole.steps)


def test_saving_does_not_disturb_a_run(tiny: Path, tmp_path: Path, make_model: Any):
    each = run(make_model(tiny, dropout=0.2), tiny, settings(tmp_path / "each", save_every=1))
    none = run(make_model(tiny, dropout=0.2), tiny, settings(tmp_path / "none", save_every=0))
    assert numbers(each.steps) == numbers(none.steps)


def test_resume_without_a_checkpoint_begins(tiny: Path, tmp_path: Path, make_model: Any):
    fresh = run(make_model(tiny), tiny, settings(tmp_path / "a"))
    ours = run(make_model(tiny), tiny, settings(tmp_path / "b", resume=True))
    assert numbers(ours.steps) == numbers(fresh.steps)


def test_resuming_a_finished_run_takes_no_step(tiny: Path, tmp_path: Path, make_model: Any, stop_after: Any):
    first = run(make_model(tiny), tiny, settings(tmp_path))
    stop_after(1, times=2)  # would raise KeyboardInterrupt
    again = run(make_model(tiny, seed=5), tiny, settings(tmp_path, resume=True))
    assert again.finished and again.adapter == tmp_path / "adapter"
    assert numbers(again.steps) == numbers(first.steps)


# --- Ctrl-C


def test_a_second_ctrl_c_stops_at_once(tiny: Path, tmp_path: Path, make_model: Any, stop_after: Any):
    stop_after(5, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(make_model(tiny), tiny, settings(tmp_path))
    assert names(tmp_path / "checkpoints") == ["step-000002", "step-000004"]  # what was saved before stays


def test_the_handler_is_put_back(tiny: Path, tmp_path: Path, make_model: Any, stop_after: Any):
    for stop in (10**9, 2):
        stop_after(stop)
        run(make_model(tiny), tiny, settings(tmp_path, resume=False))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SCRIPT = """
    import json, sys
    from importlib import import_module
    import torch
    import minift

    folder, output, rows = sys.argv[1:]
    torch.set_num_threads(1)
    loop = import_module("minift.train.loop")
    real = loop.train_step

    taken = 0

    def waiting(*args):
        global taken
        taken += 1
        if taken == 3:
            print("third step", flush=True)
            sys.stdin.readline()
        return real(*args)

    loop.train_step = waiting
    torch.manual_seed(0)
    model = minift.load_model(folder, dtype=torch.float32)
    torch.manual_seed(0)
    minift.add_lora(model, minift.LoraConfig(r=8, alpha=16, dropout=0.2))
    config = minift.TrainConfig(
        max_steps=7, batch_size=2, lr=2e-3, warmup_steps=2, save_every=0, gradient_accumulation=2, output_dir=output
    )
    result = minift.train(model, minift.load_tokenizer(folder), json.loads(rows), config)
    print("finished", result.finished, len(result.steps), result.adapter)
"""


def test_a_real_ctrl_c_leaves_a_complete_checkpoint(tiny: Path, tmp_path: Path, make_model: Any):
    script, output = tmp_path / "script.py", tmp_path / "run"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    root = str(Path(minift.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, str(script), str(tiny), str(output), json.dumps(ROWS)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], 300)
        assert ready and process.stdout.readline() == "third step\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("go on\n", timeout=300)  # it waits for this line, so the signal comes first
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert out == "finished False 3 None\n"  # the third step was under way, and was finished
    assert names(output) == ["checkpoints", "config.json", "log.json", "log.jsonl"]
    assert names(output / "checkpoints") == ["step-000003"]

    chosen: dict[str, Any] = {"gradient_accumulation": 2, "save_every": 0}
    whole = run(make_model(tiny, dropout=0.2), tiny, settings(tmp_path / "whole", **chosen))
    result = run(make_model(tiny, dropout=0.2), tiny, settings(output, resume=True, **chosen))
    assert numbers(result.steps) == numbers(whole.steps)
    assert len(result.steps) == STEPS and result.finished


# --- whose checkpoint is it?


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def stopped(tiny: Path, tmp_path: Path, make_model: Any, stop_after: Any) -> Path:
    """The folder of a run that was stopped after step 5; it holds the checkpoints of steps 4 and 5."""
    stop_after(5)
    run(make_model(tiny), tiny, settings(tmp_path / "run"))
    stop_after(10**9)
    assert names(tmp_path / "run" / "checkpoints") == ["step-000004", "step-000005"]
    return tmp_path / "run"


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1}, {"lr": 1e-3}, {"max_steps": 9}, {"batch_size": 3}, {"gradient_accumulation": 2},
        {"schedule": "cosine"}, {"warmup_steps": 0}, {"weight_decay": 0.1}, {"max_grad_norm": 0.5},
        {"optimizer": "adamw"}, {"shuffle": False}, {"loss_on": "all"}, {"packing": "bfd", "batch_size": 1},
        {"max_length": 200}, {"epochs": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_of_other_settings_is_refused(tiny: Path, make_model: Any, stopped: Path, changed: dict[str, Any]):
    with pytest.raises(ValueError, match=r"step-000005 belongs to another run"):
        run(make_model(tiny), tiny, settings(stopped, resume=True, **changed))
    assert names(stopped / "checkpoints") == ["step-000004", "step-000005"]


@pytest.mark.parametrize(
    "changed",
    [{"save_every": 1}, {"log_every": 3}, {"gradient_checkpointing": True}, {"keep_last": 1}, {"tensorboard": False}],
    ids=str,
)
def test_what_does_not_touch_a_step_may_change(tiny: Path, make_model: Any, stopped: Path, changed: dict[str, Any]):
    result = run(make_model(tiny), tiny, settings(stopped, resume=True, **changed))
    assert result.finished and len(result.steps) == STEPS


@pytest.mark.parametrize("rows", [ROWS[:-1], ROWS[::-1], [*ROWS, ROWS[0]]], ids=["fewer", "another-order", "more"])
def test_a_checkpoint_of_other_rows_is_refused(tiny: Path, make_model: Any, stopped: Path, rows: list[Any]):
    with pytest.raises(ValueError, match=r"step-000005 belongs to another run"):
        run(make_model(tiny), tiny, settings(stopped, resume=True), rows)


@pytest.mark.parametrize(
    "changed", [{"r": 4}, {"alpha": 64}, {"dropout": 0.5}, {"target_modules": ["q_proj"]}], ids=str
)
def test_a_checkpoint_of_another_adapter_is_refused(tiny: Path, stopped: Path, changed: Any):
    """Rank and targets show in the trained parameters; scaling and dropout do not, but they make another run, too."""
    model, given = minift.load_model(tiny, dtype=torch.float32), {"r": 8, "alpha": 16} | changed
    minift.add_lora(model, minift.LoraConfig(**given))
    with pytest.raises(ValueError, match=r"step-000005 belongs to another run"):
        run(model, tiny, settings(stopped, resume=True))


@pytest.mark.parametrize("other", ["weights", "nf4"])
def test_a_checkpoint_of_another_base_model_is_refused(
    tiny: Path, tmp_path: Path, make_model: Any, stopped: Path, other: str
):
    """The adapter was trained on top of these weights; on others it means nothing."""
    if other == "nf4":
        model = make_model(tiny, "nf4")
    else:
        model = make_model(Path(peers.tiny_llama(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match=r"step-000005 belongs to another run"):
        run(model, tiny, settings(stopped, resume=True))


def test_a_refused_checkpoint_changes_nothing(tiny: Path, make_model: Any, stopped: Path):
    model = make_model(tiny)
    before = weights(model)
    with pytest.raises(ValueError, match="another run"):
        run(model, tiny, settings(stopped, resume=True, seed=1))
    assert equal(weights(model), before)


@pytest.mark.parametrize("seed", [0, 1], ids=["same-settings", "other-settings"])
def test_a_fresh_run_in_the_same_folder_is_not_continued_from_the_old_one(
    tiny: Path, tmp_path: Path, make_model: Any, stop_after: Any, seed: int
):
    """The old run got further, so by number of steps its checkpoints would be the newest."""
    output = tmp_path / "run"
    run(make_model(tiny), tiny, settings(output))
    whole = run(make_model(tiny, seed=7), tiny, settings(tmp_path / "whole", seed=seed))
    stop_after(3)
    run(make_model(tiny, seed=7), tiny, settings(output, seed=seed))
    assert names(output / "checkpoints") == ["step-000002", "step-000003"]
    stop_after(10**9)
    result = run(make_model(tiny), tiny, settings(output, seed=seed, resume=True))
    assert numbers(result.steps) == numbers(whole.steps)


# --- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    """One bit of the last number: the file is still complete and readable."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_a_checkpoint(path: Path) -> None:
    path.write_bytes(b"null" if path.suffix == ".json" else b"\x80\x04N.")


def without_identity(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["identity"]
    path.write_text(json.dumps(content), encoding="utf-8")


def without_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["rng.cpu" if "rng.cpu" in tensors else next(iter(tensors))]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("trainable.safetensors", "optimizer.safetensors", "state.json")
        for damage in (cut, empty, not_a_checkpoint, Path.unlink)
    ]
    + [("state.json", without_identity)]
    + [("trainable.safetensors", flipped), ("optimizer.safetensors", flipped)]
    + [("trainable.safetensors", without_a_tensor), ("optimizer.safetensors", without_a_tensor)],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_still_works(
    tiny: Path, tmp_path: Path, make_model: Any, stopped: Path, name: str, damage: Any
):
    newest = stopped / "checkpoints" / "step-000005"
    damage(newest / name)
    model = make_model(tiny)
    before = weights(model)
    offer = rf"step-000005 is damaged .*delete it to go on from the one before: {stopped}/checkpoints/step-000004$"
    with pytest.raises(ValueError, match=offer):
        run(model, tiny, settings(stopped, resume=True))
    assert equal(weights(model), before)
    shutil.rmtree(newest)
    result = run(make_model(tiny), tiny, settings(stopped, resume=True))
    whole = run(make_model(tiny), tiny, settings(tmp_path / "whole"))
    assert numbers(result.steps) == numbers(whole.steps)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("written", [0, 1], ids=["nothing-written", "half-written"])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(
    tiny: Path, tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch, written: int
):
    real, calls = checkpoint.save_file, 0

    def filling_up(tensors: Any, path: Path, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 2 + written:  # two files a checkpoint: the first one succeeds
            path.write_bytes(b"half")
            full_disk()
        real(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", filling_up)
    with pytest.raises(OSError, match="No space left"):
        run(make_model(tiny, dropout=0.1), tiny, settings(tmp_path / "run"))
    assert names(tmp_path / "run") == ["checkpoints", "config.json", "log.jsonl"]
    assert names(tmp_path / "run" / "checkpoints") == ["step-000002"]
    monkeypatch.undo()
    result = run(make_model(tiny, dropout=0.1), tiny, settings(tmp_path / "run", resume=True))
    whole = run(make_model(tiny, dropout=0.1), tiny, settings(tmp_path / "whole"))
    assert numbers(result.steps) == numbers(whole.steps)


@pytest.mark.parametrize("part", ["weights", "config"])
def test_a_full_disk_leaves_the_old_adapter(
    tiny: Path, tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch, part: str
):
    folder = save_adapter(make_model(tiny), tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if part == "weights":
        monkeypatch.setattr(adapter_files, "save_file", full_disk)
    else:
        monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(make_model(tiny, seed=1), folder)
    monkeypatch.undo()
    assert names(tmp_path) == ["adapter"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_adapter_that_cannot_be_saved_does_not_cost_the_run(
    tiny: Path, tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch
):
    """The last checkpoint is written first, so the run only has to be resumed once there is space again."""
    monkeypatch.setattr(adapter_files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(make_model(tiny), tiny, settings(tmp_path))
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoints", "config.json", "log.json", "log.jsonl"]
    model = make_model(tiny, seed=1)
    result = run(model, tiny, settings(tmp_path, resume=True))
    assert result.finished and result.adapter == tmp_path / "adapter"


def test_if_no_checkpoint_is_whole_none_is_offered(tiny: Path, make_model: Any, stopped: Path):
    for name in ("step-000004", "step-000005"):
        cut(stopped / "checkpoints" / name / "optimizer.safetensors")
    with pytest.raises(
        ValueError, match=r"step-000005 is damaged .*no other checkpoint of this run is whole; leave out"
    ):
        run(make_model(tiny), tiny, settings(stopped, resume=True))


@pytest.mark.parametrize(
    ("part", "changed"),
    [("settings", {"seed": 1}), ("rows", {}), ("adapter", {"dropout": 0.3}), ("model, adapter", {"r": 4})],
    ids=str,
)
def test_a_foreign_checkpoint_says_what_is_other(
    tiny: Path, make_model: Any, stopped: Path, part: str, changed: dict[str, Any]
):
    model = make_model(tiny, **{key: value for key, value in changed.items() if key != "seed"})
    chosen = {key: value for key, value in changed.items() if key == "seed"}
    other = ", ".join(sorted(part.split(", "), key=["settings", "adapter", "model", "rows"].index))
    with pytest.raises(ValueError, match=rf"belongs to another run \(other {other}\); use another output_dir"):
        run(model, tiny, settings(stopped, resume=True, **chosen), ROWS[:-1] if part == "rows" else ROWS)


def test_a_foreign_checkpoint_among_own_ones_is_refused_and_the_own_one_offered(
    tiny: Path, tmp_path: Path, make_model: Any, stopped: Path
):
    run(make_model(tiny), tiny, settings(tmp_path / "foreign", seed=1, max_steps=6))
    shutil.copytree(tmp_path / "foreign/checkpoints/step-000006", stopped / "checkpoints/step-000006")
    own = f"{stopped}/checkpoints/step-000005$"
    with pytest.raises(ValueError, match=rf"step-000006 belongs to another run.*delete it to go on from .*: {own}"):
        run(make_model(tiny), tiny, settings(stopped, resume=True))


def test_what_a_killed_run_left_is_removed(tiny: Path, make_model: Any, stopped: Path):
    for name in (".step-000006.x1y2", ".step-000002.old"):
        (stopped / "checkpoints" / name).mkdir()
        (stopped / "checkpoints" / name / "trainable.safetensors").write_bytes(b"half")
    result = run(make_model(tiny), tiny, settings(stopped, resume=True))
    assert result.finished and names(stopped / "checkpoints") == ["step-000006", "step-000007"]


def test_a_full_disk_says_which_checkpoint_is_missing_and_which_one_is_there(
    tiny: Path, tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch
):
    run(make_model(tiny), tiny, settings(tmp_path, max_steps=2, save_every=0))
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    model, chosen = make_model(tiny), settings(tmp_path, max_steps=2, save_every=0, resume=True)
    with pytest.raises(
        OSError, match=r"checkpoint .*step-000002 cannot be written: No space left on device; .*whole: res"
    ):
        run(model, tiny, chosen)
    with pytest.raises(OSError, match=r"step-000002 cannot be written: No space.*there is none before it"):
        run(model, tiny, settings(tmp_path / "new", max_steps=2))


def test_a_full_disk_while_the_log_is_written(tiny: Path, tmp_path: Path, make_model: Any):
    """/dev/full answers every write as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    folder = import_module("minift.train.folder")
    log = folder.RunFolder(tmp_path, settings(tmp_path), [], {})
    log._lines = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(OSError, match=r"cannot write to .*log\.jsonl: No space left on device; make room, then resume"):
        log.add(StepRecord(1, 1.0, 1.0, 1.0, 1, 1, 1.0))


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users and permissions")
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(
    tiny: Path, make_model: Any, stop_after: Any
):
    """A superuser may write anywhere, so this is tried as another user."""
    locked = Path(tempfile.mkdtemp())  # not below tmp_path, which other users may not enter
    locked.chmod(0o555)
    model, tokenizer = make_model(tiny), minift.load_tokenizer(tiny)
    stop_after(1, times=2)  # a first step would raise KeyboardInterrupt
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=r"cannot write to the folder .*: Permission denied; choose another"):
            train(model, tokenizer, ROWS, settings(locked))
    finally:
        os.seteuid(was)
    assert names(locked) == []
    locked.rmdir()


def test_an_output_dir_that_is_a_file_is_refused(tiny: Path, tmp_path: Path, make_model: Any):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write to the folder .*file: File exists; choose another output_dir"):
        run(make_model(tiny), tiny, settings(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
