"""A run trains and saves whatever the model holds: LoRA's relatives (minift/adapters), and what is unfrozen by hand."""

import shutil
from pathlib import Path
from typing import Any

import peers
import pytest
import torch

import minift
from minift.adapters.bottleneck import PfeifferConfig
from minift.adapters.method import Method, method_of
from minift.adapters.verbs import METHODS, add_adapter, load_adapter
from minift.train.checkpoint import fingerprint
from minift.train.config import TrainConfig
from minift.train.loop import train

ROWS = peers.demo_rows(8)
EXAMPLES: dict[str, Method] = {method.name: method() for method in METHODS}


def settings(output: Path, **chosen: Any) -> TrainConfig:
    given: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "lr": 1e-2, "shuffle": False, "save_every": 3} | chosen
    return TrainConfig(**given, output_dir=str(output))


def logits(model: Any, folder: Path) -> torch.Tensor:
    ids = minift.load_tokenizer(folder).encode("The sea is wide")
    with torch.no_grad():
        return model(torch.tensor([ids]))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_method_is_trained_saved_and_resumed(tiny: Path, tmp_path: Path, make_model: Any, name: str):
    """The saved adapter gives the trained model's logits; the run goes on bit for bit; the loss falls."""
    model, tokenizer = make_model(tiny, r=0), minift.load_tokenizer(tiny)
    untrained = logits(model, tiny)
    add_adapter(model, EXAMPLES[name])
    result = train(model, tokenizer, ROWS, settings(tmp_path))
    assert result.steps[-2].loss < result.steps[0].loss - 1e-3  # the same rows: two batches take turns
    assert result.adapter is not None
    trained = logits(model.eval(), tiny)
    assert (trained - untrained).abs().max() > 1e-3

    fresh = make_model(tiny, r=0)
    load_adapter(fresh, result.adapter)
    assert method_of(fresh) is not None and torch.equal(logits(fresh.eval(), tiny), trained)

    shutil.rmtree(tmp_path / "checkpoints" / "step-000006")
    model = make_model(tiny, r=0)
    torch.manual_seed(99)  # what is drawn comes from the checkpoint
    add_adapter(model, EXAMPLES[name])
    again = train(model, tokenizer, ROWS, settings(tmp_path, resume=True))
    assert [record.loss for record in again.steps] == [record.loss for record in result.steps]
    assert torch.equal(logits(model.eval(), tiny), trained)


def test_the_settings_of_a_method_are_part_of_a_runs_identity(tiny: Path, make_model: Any):
    seen = []
    for method in (PfeifferConfig(), PfeifferConfig(), PfeifferConfig(reduction_factor=8), None):
        model = make_model(tiny, r=0)
        if method is not None:
            torch.manual_seed(0)
            add_adapter(model, method)
        seen.append(fingerprint([], model, TrainConfig())["adapter"])
    assert seen[0] == seen[1] and len(set(seen)) == 3


def test_what_is_unfrozen_by_hand_is_trained_and_has_no_adapter(tiny: Path, tmp_path: Path, make_model: Any):
    model = make_model(tiny, r=0).requires_grad_(False)
    for layer in model.model.layers:
        layer.input_layernorm.weight.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = train(model, minift.load_tokenizer(tiny), ROWS, settings(tmp_path))
    assert result.finished and result.adapter is None and not (tmp_path / "adapter").exists()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"model.layers.{n}.input_layernorm.weight" for n in range(2)}
