"""The state of adapted layers against PEFT's `get_layer_status`, and after merging."""

from pathlib import Path
from typing import Any

import pytest

import minift
from minift.adapters.merge import merge_lora, unmerge_lora
from minift.study.status import format_status, layer_status


def test_status_is_pefts(tiny: Path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    ours = minift.load_model(tiny)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tiny)
    for name, r, targets in (("ada", 2, ("q_proj", "down_proj")), ("bob", 4, ("q_proj",))):
        minift.add_lora(ours, minift.LoraConfig(r=r, target_modules=targets), name)
        config = peft.LoraConfig(r=r, target_modules=list(targets))
        if name == "ada":
            theirs = peft.get_peft_model(theirs, config, name)
        else:
            theirs.add_adapter(name, config)
    for active in ("ada", "bob"):
        minift.set_adapter(ours, active)
        theirs.set_adapter(active)
        found = {place.path: place for place in layer_status(ours)}
        others = {status.name.removeprefix("model."): status for status in theirs.get_layer_status()}
        assert found.keys() == others.keys() and len(found) == 4
        for path, status in others.items():
            assert found[path].adapters == tuple(status.available_adapters)
            own = tuple(name for name in status.active_adapters if name in status.available_adapters)
            assert found[path].active == own
            trained = any(status.requires_grad[name] for name in status.available_adapters)
            assert (found[path].trained > 0) == trained and found[path].merged == ()


def test_the_table_and_merged_adapters(tiny: Path):
    model = minift.load_model(tiny)
    assert layer_status(model) == [] and format_status(model) == "no adapters"
    for name in ("ada", "bob"):
        minift.add_lora(model, minift.LoraConfig(r=2, target_modules=("q_proj",)), name)
    minift.set_adapter(model, "ada")
    lines = format_status(model).split("\n")
    assert lines[0].split() == ["layer", "adapters", "active", "merged", "trained"]
    assert lines[1].split() == ["2", "x", "self_attn.q_proj", "ada,", "bob", "ada", "-", f"{2 * 2 * 2 * 64:,}"]
    assert len(lines) == 2
    merge_lora(model, ["bob"], keep=True)
    merged = format_status(model).split("\n")
    assert merged[1].split() == ["2", "x", "self_attn.q_proj", "ada,", "bob", "-", "bob", "0"]
    with pytest.raises(ValueError, match="no adapter"):
        minift.set_adapter(model, "ada")
    unmerge_lora(model)
    assert [(place.active, place.merged) for place in layer_status(model)] == [(("bob",), ())] * 2
