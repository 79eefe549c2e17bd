"""What a run leaves on the disk: which files, in which format, how many checkpoints; and a run's identity."""

import json
import pickle
import stat
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from safetensors.torch import load_file

import minift
from minift.data.encode import Example
from minift.train.checkpoint import fingerprint
from minift.train.config import TrainConfig
from minift.train.loop import train

ROWS = peers.demo_rows(8)


@pytest.fixture(scope="module", params=["adamw", "adamw8bit"])
def output(request: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> Path:
    """The folder of a finished run of 7 steps with a checkpoint every 2; r=64 gives 8-bit state to some matrices.

    Whatever would pickle or unpickle on the way fails.
    """
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        max_steps=7, batch_size=2, save_every=2, optimizer=request.param, output_dir=str(folder), log_every=2
    )

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, ("save", "load")), (pickle, ("dump", "dumps", "load", "loads"))):
            for name in names:
                patch.setattr(owner, name, refuse)
        train(make_model(tiny, r=64, dropout=0.1), minift.load_tokenizer(tiny), ROWS, config)
        train(make_model(tiny, r=64, dropout=0.1), minift.load_tokenizer(tiny), ROWS, replace(config, resume=True))
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_these_files_and_no_others(output: Path):
    assert files(output) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        *(
            f"checkpoints/step-{step:06d}/{name}"
            for step in (6, 7)
            for name in ("optimizer.safetensors", "state.json", "trainable.safetensors")
        ),
        "config.json",
        "log.json",
        "log.jsonl",
    ]


def test_no_file_holds_a_pickle(output: Path):
    for name in files(output):
        path = output / name
        assert not zipfile.is_zipfile(path), name  # torch.save's container
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            assert [json.loads(part) for part in ([text] if path.suffix == ".json" else text.splitlines())]
        else:
            assert path.suffix == ".safetensors" and load_file(path), name
            assert path.read_bytes()[8:9] == b"{", name  # a JSON header behind its 8-byte length


def test_files_are_readable_like_any_other(output: Path, tmp_path: Path):
    """Temporary files are private to their owner; what is handed on must not be."""
    plain = tmp_path / "plain"
    plain.write_text("")
    (tmp_path / "folder").mkdir()
    for path in output.rglob("*"):
        like = tmp_path / "folder" if path.is_dir() else plain
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(like.stat().st_mode), path


def test_a_checkpoint_holds_the_trained_parameters_and_the_whole_state(output: Path, tiny: Path, make_model: Any):
    newest = output / "checkpoints" / "step-000007"
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    trained, optimizer = load_file(newest / "trainable.safetensors"), load_file(newest / "optimizer.safetensors")
    model = make_model(tiny, r=64)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert {name: tensor.shape for name, tensor in trained.items()} == shapes
    assert [record["step"] for record in state["steps"]] == list(range(1, 8))
    assert "rng.cpu" in optimizer
    elements = sum(tensor.numel() for tensor in trained.values())
    if any("codes" in name for name in optimizer):  # two codes of a byte a parameter of the large matrices
        large = sum(tensor.numel() for tensor in trained.values() if tensor.numel() >= 4096)
        assert sum(tensor.numel() for tensor in optimizer.values() if tensor.dtype == torch.uint8) >= 2 * large
    else:
        means = [tensor for name, tensor in optimizer.items() if name.endswith((".m", ".v"))]
        assert sum(tensor.numel() for tensor in means) == 2 * elements
        assert all(tensor.dtype == torch.float32 for tensor in means)


# --- the identity of a run


EXAMPLES = [Example([1, 2, 3], [-100, 2, 3]), Example([4, 5], [-100, 5])]
OTHER_VALUES = {
    "epochs": 2, "max_steps": 5, "batch_size": 1, "gradient_accumulation": 2, "lr": 1e-5, "schedule": "cosine",
    "warmup_steps": 3, "weight_decay": 0.1, "max_grad_norm": 0.5, "optimizer": "adamw", "loss_on": "all",
    "max_length": 99, "packing": "bfd", "share_prefix": False, "shuffle": False, "seed": 1,
    "gradient_checkpointing": "selective", "output_dir": "elsewhere", "cache": "tokens", "save_every": 3,
    "resume": True, "log_every": 2,
    "group_by_length": True, "problems": "drop", "keep_last": 5, "eval_every": 3, "patience": 2, "best": True,
    "tensorboard": False, "paged": True, "page_budget": 1, "stochastic_rounding": True, "decay_order": "bnb",
}  # fmt: skip
FREE = {
    "gradient_checkpointing", "output_dir", "cache", "save_every", "resume", "log_every",
    "keep_last", "patience", "tensorboard", "paged", "page_budget",
}  # fmt: skip


def small(**changed: Any) -> torch.nn.Module:
    """A trained matrix `a`, a frozen one `b`; `changed` replaces some of that, None removes it."""
    parts = {"a": torch.zeros(2, 3), "b": torch.ones(4)} | changed
    model = torch.nn.Module()
    for name, value in parts.items():
        if value is not None:
            model.register_parameter(name, torch.nn.Parameter(value, requires_grad=name != "b"))
    return model


def with_lora(**changed: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(3, 2)})
    settings: dict[str, Any] = {"r": 2, "alpha": 4} | changed
    minift.add_lora(model, minift.LoraConfig(**settings))
    return model


def identity(examples: list[Example] = EXAMPLES, model: torch.nn.Module | None = None, **settings: Any) -> Any:
    return fingerprint(examples, model or small(), TrainConfig(**settings))


def test_every_setting_has_been_thought_of():
    assert OTHER_VALUES.keys() == {setting.name for setting in fields(TrainConfig)}
    for name, value in OTHER_VALUES.items():
        assert value != getattr(TrainConfig(), name), name


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_settings_that_decide_what_a_step_does_are_part_of_the_identity(name: str):
    base: dict[str, Any] = {"eval_every": 1 if name in ("patience", "best") else 0}  # these two need evaluations
    assert (identity(**base | {name: OTHER_VALUES[name]}) == identity(**base)) == (name in FREE)


@pytest.mark.parametrize(
    "examples",
    [
        EXAMPLES[:1],
        EXAMPLES[::-1],
        [*EXAMPLES, EXAMPLES[0]],
        [Example([1, 2, 3], [-100, -100, 3]), EXAMPLES[1]],
        [Example([1, 2, 9], [-100, 2, 3]), EXAMPLES[1]],
        [Example([1, 2], [-100, 2]), Example([3, 4, 5], [3, -100, 5])],
    ],
    ids=["fewer", "order", "more", "labels", "ids", "split"],
)
def test_rows_are_part_of_the_identity(examples: list[Example]):
    assert identity(examples) != identity()


@pytest.mark.parametrize(
    "model",
    [
        small(b=None),
        small(c=torch.zeros(1)),
        small(a=torch.zeros(3, 2)),
        small(a=None, c=torch.zeros(2, 3)),
        small(a=torch.zeros(2, 3, dtype=torch.bfloat16)),
        small(b=torch.full((4,), 1 + 2**-23)),
        small().requires_grad_(False),
        small().requires_grad_(True),
    ],
    ids=["fewer", "more", "shape", "name", "dtype", "frozen-value", "all-frozen", "all-trained"],
)
def test_the_model_is_part_of_the_identity(model: torch.nn.Module):
    assert identity(model=model) != identity()


@pytest.mark.parametrize("changed", [{"r": 1}, {"alpha": 8}, {"dropout": 0.1}], ids=str)
def test_the_adapters_settings_are_part_of_the_identity(changed: dict[str, Any]):
    assert identity(model=with_lora()) == identity(model=with_lora())
    assert identity(model=with_lora(**changed)) != identity(model=with_lora())


def test_what_training_changes_is_not():
    """A run goes on with the weights of the checkpoint, whatever those in memory are."""
    assert identity(model=small(a=torch.ones(2, 3))) == identity()


def test_a_shared_parameter_that_is_trained_is_not_either():
    """A tied head is the embedding under a second name."""

    def tied(value: float) -> torch.nn.Module:
        model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
        shared = torch.nn.Parameter(torch.full((5, 3), value))
        for layer in model.values():
            layer.register_parameter("weight", shared)
        return model

    assert identity(model=tied(1.0)) == identity(model=tied(2.0))


def test_evaluation_rows_are_part_of_the_identity():
    """The best step is the best on these."""
    ours = fingerprint(EXAMPLES, small(), TrainConfig(), EXAMPLES[:1])
    assert ours != fingerprint(EXAMPLES, small(), TrainConfig(), EXAMPLES[1:])
    assert ours != identity() == fingerprint(EXAMPLES, small(), TrainConfig(), [])
