"""Preparation for training with quantized layers: against PEFT's, and the bytes that the book gives."""

from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from book_models import OPT, PHI3, on_meta
from torch import nn

import minift
from minift.adapters.ia3 import IA3Config
from minift.adapters.kbit import POLICIES, SCALES, bytes_by_kind, prepare_for_kbit_training
from minift.model.decoder import CausalLM
from minift.quant import QuantConfig, QuantizedLinear, swap_linears

PHI3_ROTARY = 32 * 48 * 4  # in the book's transformers each layer held a table of 48 fp32 numbers
FREE = [("float16", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]  # the rest, and compute


def quantized(config: Any, dtype: torch.dtype) -> CausalLM:
    model = on_meta(config, dtype)
    swap_linears(model, QuantConfig())
    return model


def as_the_book_counts(model: nn.Module) -> int:
    """Parameters and buffers, without the quantization state: get_memory_footprint."""
    return sum(size for kind, size in bytes_by_kind(model).items() if kind != SCALES)


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_phi3_mini_is_the_books_2206_mb_and_2651_mb():
    """The book prepares with PEFT's policy and adds LoRA of rank 8 to all four linears of a block."""
    sizes = {}
    for policy in POLICIES:
        model = quantized(PHI3, torch.bfloat16)
        assert as_the_book_counts(model) + PHI3_ROTARY == 2_206_347_264
        prepared = prepare_for_kbit_training(model, policy)
        assert bytes_by_kind(model) == prepared.after
        minift.add_lora(model, minift.LoraConfig(r=8))
        sizes[policy] = as_the_book_counts(model) + PHI3_ROTARY
    rest = 2 * 32064 * 3072 + 65 * 3072  # embedding, head, and two norms a block and one at the end
    assert sizes == {"peft": 2_651_080_704, "keep": 2_651_080_704 - 2 * rest}
    assert sizes["peft"] - 2_206_347_264 == 2 * rest + 4 * 12_582_912


@pytest.mark.parametrize(("dtype", "before"), [(torch.float32, 264_151_040), (torch.float16, 207_835_136)])
def test_opt_350m_is_the_books_264_mb(dtype: torch.dtype, before: int):
    """Loaded in fp32 there is nothing to cast (so the book's figure does not move); loaded in fp16 it gets as large."""
    model = quantized(OPT, dtype)
    assert as_the_book_counts(model) == before
    prepared = prepare_for_kbit_training(model, "peft")
    assert as_the_book_counts(model) == 264_151_040
    assert (prepared.before == prepared.after) == (dtype == torch.float32) == (not prepared.cast)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_table_adds_up(tiny: Path):
    model = minift.load_model(tiny, "nf4", torch.bfloat16)
    prepared = prepare_for_kbit_training(model, "peft")
    held = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}  # tied ones once
    assert sum(prepared.after.values()) == sum(held.values())
    rest = 384 * 64 + 5 * 64
    codes = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) // 2
    blocks = 2 * codes // 64
    assert prepared.before == {"bfloat16": 2 * rest, "nf4": codes, SCALES: blocks + 14 * (4 + 4)}
    assert prepared.after == {"float32": 4 * rest, "nf4": codes, SCALES: blocks + 14 * (4 + 4)}
    table = prepared.format().splitlines()
    assert [line.split() for line in table[1:3]] == [
        ["bfloat16", f"{2 * rest:,}", "0"],
        ["nf4", f"{codes:,}", f"{codes:,}"],
    ]
    assert table[-2].split() == ["total", f"{sum(prepared.before.values()):,}", f"{sum(held.values()):,}"]
    assert table[-1] == "6 parameters cast to float32, 6 frozen"


# --- against PEFT -----------------------------------------------------------------------------------------------------


def pair(folder: Path, policy: str, dtype: str, compute: str) -> tuple[minift.CausalLM, Any]:
    peft = pytest.importorskip("peft")
    # Without double quantization: on a CPU bitsandbytes rounds the scales' scales by a table of its own.
    format = QuantConfig(double_quant=False, compute_dtype=getattr(torch, compute))
    ours = minift.load_model(folder, format, getattr(torch, dtype))
    theirs = peers.peer_base(folder, double_quant=False, dtype=dtype, compute_dtype=compute)
    prepare_for_kbit_training(ours, policy)
    if policy == "peft":
        peft.prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
    return ours, theirs


@pytest.mark.parametrize(("dtype", "compute"), FREE)
@pytest.mark.parametrize("policy", POLICIES)
def test_logits_are_pefts(tiny: Path, policy: str, dtype: str, compute: str):
    """To the bit: the same products of the same dtypes in the same order. "keep" is the model as it was loaded."""
    ours, theirs = pair(tiny, policy, dtype, compute)
    ids = torch.randint(3, 380, (2, 17))
    mine, other = ours(ids), theirs(ids).logits
    assert mine.dtype == other.dtype == (torch.float32 if policy == "peft" else getattr(torch, dtype))
    assert torch.equal(mine, other)
    assert mine.std() > 0.1


@pytest.mark.parametrize("policy", POLICIES)
def test_dtypes_and_flags_are_pefts(tiny_odd: Path, policy: str):
    ours, theirs = pair(tiny_odd, policy, "bfloat16", "bfloat16")
    plain = {name: p for name, p in theirs.named_parameters() if "Params4bit" not in type(p).__name__}
    expected = {name: (p.dtype, p.requires_grad) for name, p in plain.items()}
    found = {name: (p.dtype, p.requires_grad) for name, p in ours.named_parameters()}
    if policy == "peft":
        assert found == expected
    assert found.keys() == expected.keys()
    assert {dtype for dtype, _ in found.values()} == {torch.float32 if policy == "peft" else torch.bfloat16}
    assert not any(flag for _, flag in found.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_only_what_lies_between_the_layers_changes_its_dtype(tiny: Path, policy: str):
    """The embedding's dtype is that of all inputs and outputs; the products stay in the compute dtype."""
    model = minift.load_model(tiny, "nf4", torch.bfloat16)
    tied = model.lm_head.weight
    prepare_for_kbit_training(model, policy)
    outside = torch.float32 if policy == "peft" else torch.bfloat16
    seen = set()
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, y: seen.add((inputs[0].dtype, y.dtype)))
    model(torch.arange(10)[None])
    assert seen == {(outside, outside)}
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    assert {layer.plain().weight.dtype for layer in layers} == {outside}
    assert model.lm_head.weight is model.model.embed_tokens.weight is tied


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_prepared_model_is_trained_saved_and_loaded(tiny: Path, tmp_path: Path, quantize: str, policy: str):
    model = minift.load_model(tiny, quantize, torch.bfloat16)
    prepare_for_kbit_training(model, policy)
    minift.add_lora(model)
    ids = torch.randint(3, 380, (2, 9))
    model(ids).float().square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    fresh = minift.load_model(tiny, quantize, torch.bfloat16)
    prepare_for_kbit_training(fresh, policy)
    again = minift.load_model(minift.save_model(fresh, tmp_path / "saved"))
    assert again.dtype == fresh.dtype == (torch.float32 if policy == "peft" else torch.bfloat16)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_prepared(tiny: Path):
    with pytest.raises(ValueError, match="no quantized layers"):
        prepare_for_kbit_training(minift.load_model(tiny, dtype=torch.bfloat16), "peft")
    model = minift.load_model(tiny, "nf4", torch.bfloat16)
    with pytest.raises(ValueError, match="'fp32': choose one of keep, peft"):
        prepare_for_kbit_training(model, "fp32")
    minift.add_lora(model)
    with pytest.raises(ValueError, match="before adapters are added"):
        prepare_for_kbit_training(model)
    assert model.dtype == torch.bfloat16 and any(p.requires_grad for p in model.parameters())
    other = minift.load_model(tiny, "nf4")
    minift.add_adapter(other, IA3Config())
    with pytest.raises(ValueError, match="before adapters are added"):
        prepare_for_kbit_training(other)
