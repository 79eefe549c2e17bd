"""What a LoRA trains besides linear layers: in files, switched off, deleted, and merged.

Files go both ways with PEFT, and the logits are those that PEFT computes from them (tolerances as in test_files.py).
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from beside_kinds import (
    KINDS,
    adapted,
    add_theirs,
    base_of,
    config_of,
    maker,
    our_tensors,
    some_ids,
    their_tensors,
)
from torch import nn

import minift
from minift.adapters.many import delete_adapter, disabled, set_adapter
from minift.adapters.switched import switched

peft = pytest.importorskip("peft")

OVER_NF4 = ["embedding, narrow", "norms", "whole, shared", "tokens, tied", "all biases"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return maker(tmp_path_factory.mktemp("models"))


def assert_same_logits(ours: nn.Module, theirs: Any) -> None:
    ids = some_ids()
    with torch.no_grad():
        expected, exact = theirs(ids).logits, copy.deepcopy(theirs).double()(ids).logits
        assert (ours(ids) - expected).abs().max() <= 4 * (expected - exact).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_is_saved_here(models: Any, tmp_path: Path, kind: str):
    ours = adapted(models, kind)
    minift.save_adapter(ours, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # keys that match nothing, or are missing
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message=".*tied.*")
        theirs = peft.PeftModel.from_pretrained(base_of(models(KINDS[kind][0])), tmp_path / "saved").eval()
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_read_here(models: Any, tmp_path: Path, kind: str):
    """By PEFT's defaults: it also saves the tables of adapted embeddings."""
    folder = models(KINDS[kind][0])
    theirs = add_theirs(base_of(folder), config_of(kind))
    with torch.no_grad():
        for value in their_tensors(theirs).values():
            value.add_(0.2 * torch.randn(value.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.eval().save_pretrained(tmp_path)
    ours = minift.load_model(folder)
    minift.load_adapter(ours, tmp_path)
    assert not [name for name, p in ours.named_parameters() if p.requires_grad]
    assert_same_logits(ours, theirs)
    again = minift.load_model(folder)
    minift.load_adapter(again, tmp_path, trainable=True)
    assert {p for p in again.parameters() if p.requires_grad} == set(our_tensors(again).values())


# --- on and off -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "quantize"), [*((kind, None) for kind in KINDS), *((k, "nf4") for k in OVER_NF4)])
def test_switched_off_and_deleted_the_model_is_the_original(models: Any, kind: str, quantize: str | None):
    folder, ids = models(KINDS[kind][0]), some_ids()
    original = minift.load_model(folder, quantize)
    ours = adapted(models, kind, quantize)
    with torch.no_grad():
        before, mine = original(ids), ours(ids)
        assert not torch.allclose(before, mine, rtol=0.01)
        with disabled(ours):
            assert torch.equal(ours(ids), before)
        assert torch.equal(ours(ids), mine)
        set_adapter(ours, [])
        assert torch.equal(ours(ids), before)
        assert not [name for name, p in ours.named_parameters() if p.requires_grad]
        set_adapter(ours, "default")
        assert torch.equal(ours(ids), mine)
        assert {p for p in ours.parameters() if p.requires_grad} == set(our_tensors(ours).values())
        delete_adapter(ours, "default")
        assert torch.equal(ours(ids), before)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in original.named_modules()]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in original.named_parameters()]


@pytest.mark.parametrize("kind", ["whole, shared", "tokens, tied", "all biases"])
def test_what_is_switched_off_moves_with_the_model_and_a_copy_is_apart(models: Any, kind: str):
    """Replaced biases are in no module meanwhile, and a tied head follows a module that it does not own."""
    ours, ids = adapted(models, kind), some_ids()
    with torch.no_grad():
        mine = ours(ids)
        other = copy.deepcopy(ours).double()
        with disabled(other):
            assert other(ids).dtype == torch.float64
            original = minift.load_model(models(KINDS[kind][0])).double()
            assert torch.equal(other(ids), original(ids))
        for value in our_tensors(other).values():
            value.zero_()
        assert torch.equal(ours(ids), mine)
        assert not torch.allclose(other(ids).float(), mine, rtol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_computes_the_same_and_is_an_ordinary_checkpoint(models: Any, tmp_path: Path, kind: str):
    """A tied head whose half was changed is untied, or the saved model would be another one (peft #2777)."""
    ours, ids = adapted(models, kind), some_ids()
    with torch.no_grad():
        expected = ours(ids)
        exact = copy.deepcopy(ours).double()(ids)
        minift.merge_lora(ours)
        merged = ours(ids)
        # Two ways of computing the same fp32 numbers: off by the rounding error of one of them each, and 4 as above;
        # merging rounds the weights once more.
        assert (merged - expected).abs().max() <= 8 * (expected - exact).abs().max()
    assert not switched(ours)
    assert not [name for name, p in ours.named_parameters() if p.requires_grad]
    minift.save_model(ours, tmp_path / "merged")
    again = minift.load_model(tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa").eval()
    with torch.no_grad():
        assert torch.equal(again(ids), merged)
        exact = copy.deepcopy(theirs).double()(ids).logits
        assert (theirs(ids).logits - merged).abs().max() <= 4 * (theirs(ids).logits - exact).abs().max()
    halves = {"embedding, tied", "embedding, narrow", "embedding, scaled", "positions"}
    tied = KINDS[kind][0] not in ("untied",) and kind not in halves
    assert again.config.tie_word_embeddings == tied


def test_two_copies_of_one_module_are_not_active_together(models: Any, tmp_path: Path):
    for kind in ("whole head", "tokens, untied", "all biases"):
        ours = adapted(models, kind)
        minift.save_adapter(ours, tmp_path / "saved")
        with pytest.raises(
            ValueError, match=r"adapter 'default' is active and has its own .*set_adapter\(model, \[\]\)"
        ):
            minift.add_lora(ours, config_of(kind), "second")
        with pytest.raises(ValueError, match="'default' is active"):
            minift.load_adapter(ours, tmp_path / "saved", "second")
        assert {name for place in switched(ours).values() for name in place.configs} == {"default"}
        ids = some_ids()
        with torch.no_grad():
            mine = ours(ids)
            set_adapter(ours, [])
            minift.load_adapter(ours, tmp_path / "saved", "second")
            assert torch.equal(ours(ids), mine)
            with pytest.raises(ValueError, match="default, second each have their own"):
                set_adapter(ours, ["default", "second"])
            assert torch.equal(ours(ids), mine)  # nothing was switched
            for name in ("default", "second"):
                set_adapter(ours, name)
                assert torch.equal(ours(ids), mine)
                assert {p for p in ours.parameters() if p.requires_grad} == set(our_tensors(ours, name).values())
            delete_adapter(ours, "default")
            assert torch.equal(ours(ids), mine)
