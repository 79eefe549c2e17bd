"""Merging and unmerging adapters: against the unmerged model, PEFT's merge_and_unload, and what the report claims."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
import transformers
from torch import Tensor, nn

import minift
from minift.adapters.drift import measure_drift
from minift.adapters.inject import lora_layers
from minift.adapters.lora import LoraConfig, LoraLinear
from minift.adapters.merge import unmerge_lora
from minift.adapters.switched import switched
from minift.quant import Linear4bit, QuantConfig, QuantizedLinear

CONFIG = LoraConfig(r=6, alpha=9)


def adapted(folder: Path, quantize: str | QuantConfig | None = None, dtype: torch.dtype | None = None):
    """A loaded model with a random (not zero) change of every linear layer."""
    model = minift.load_model(folder, quantize, dtype=dtype)
    minift.add_lora(model, CONFIG)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.matrices("default")[1], std=0.1)
    return model


def change(model: nn.Module, merged: nn.Module, ids: Tensor) -> float:
    return (model(ids) - merged(ids)).abs().max().item()


@pytest.mark.parametrize("bias", [False, True])
def test_a_merged_layer_computes_the_same(bias: bool):
    """In float64 the two ways differ by nothing but 1e-13, so the sum has the right scaling, order and sign."""
    layer = LoraLinear(nn.Linear(20, 10, bias=bias).requires_grad_(False))
    for name, config in {"one": LoraConfig(r=2, alpha=1), "two": LoraConfig(r=5, alpha=30)}.items():
        layer.add(name, config)
        nn.init.normal_(layer.matrices(name)[1])
    model = nn.Sequential(layer)
    x = torch.randn(4, 20)
    exact = copy.deepcopy(model).double()(x.double())
    assert minift.merge_lora(model).paths == ["0"]
    merged = model[0]
    assert type(merged) is nn.Linear
    assert (merged.bias is not None) == bias
    # The merged weight is rounded once to fp32, u = 2^-24, and so are the products and sums of its fp32 making (rank
    # 2 + 5 terms); the product with x has 20 terms.
    assert isinstance(layer.base.weight, Tensor)
    size = x.abs() @ (layer.base.weight.abs() + sum(
        config.scaling * layer.matrices(name)[1].abs() @ layer.matrices(name)[0].abs()
        for name, config in layer.configs.items()
    )).T + 1  # fmt: skip
    assert ((model(x) - exact).abs() <= 40 * 2**-24 * size).all()


@pytest.mark.parametrize("quantize", [None, "nf4", QuantConfig(quant_type="fp4", double_quant=False)])
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_merging_keeps_the_logits_in_fp32(
    request: pytest.FixtureRequest, name: str, quantize: str | QuantConfig | None
):
    """What merging may change is what rounding the merged weights to fp32 changes. Its size is measured: the logits
    move by D when every merged weight is turned by half a unit in the last place, up or down at random."""
    model = adapted(request.getfixturevalue(name), quantize)
    ids = torch.randint(3, model.config.vocab_size, (2, 17))
    with torch.no_grad():
        before = model(ids)
        paths = minift.merge_lora(model).paths
        assert len(paths) == 14
        after = model(ids)
        assert after.abs().max() > 1
        for path in paths:
            weight = model.get_submodule(path).get_parameter("weight")
            assert weight.dtype == torch.float32
            weight.mul_(1 + 2**-24 * (2 * torch.randint(0, 2, weight.shape) - 1).double())
        moved = (model(ids) - after).abs().max().item()
        assert 0 < moved < 1e-4
        # Rounding of the weights, and of the sums in a different order, which is of the same size.
        assert (after - before).abs().max().item() <= 8 * moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merging_in_16_bit_moves_the_logits_by_a_rounding(tiny: Path, quantize: str | None, dtype: torch.dtype):
    """Unmerged, 16 bit rounds the change and the sum of the outputs; merged, it rounds the sum of the weights. Both are
    roundings of the same fp32 model, from which 16 bit is D away without any merging."""
    model = adapted(tiny, quantize, dtype)
    with_fp32 = adapted(tiny, quantize, torch.float32)
    for path, layer in lora_layers(model).items():
        other = lora_layers(with_fp32)[path]
        base = layer.base.dequantize() if isinstance(layer.base, Linear4bit) else layer.base.weight
        other.base = nn.Linear(base.shape[1], base.shape[0], bias=False)
        with torch.no_grad():
            other.base.weight.copy_(base)
            for mine, its in zip(layer.matrices("default"), other.matrices("default"), strict=True):
                its.copy_(mine)
    for name, value in model.named_parameters():
        if "norm" in name or "embed" in name:
            with_fp32.get_parameter(name).data = value.data.float()
    ids = torch.randint(3, model.config.vocab_size, (2, 17))
    with torch.no_grad():
        exact, before = with_fp32(ids), model(ids).float()
        rounding = (before - exact).abs().max().item()
        minift.merge_lora(model)
        after = model(ids).float()
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert 0 < rounding < (0.2 if dtype == torch.bfloat16 else 0.02)
        assert (after - exact).abs().max().item() <= 2 * rounding
        assert (after - before).abs().max().item() <= 3 * rounding


@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_an_nf4_base_becomes_dense(request: pytest.FixtureRequest, name: str):
    """The decoded weight plus the change, in the compute dtype; quantizing the sum again would be another model."""
    model = adapted(request.getfixturevalue(name), "nf4")
    expected = {}
    for path, layer in lora_layers(model).items():
        assert isinstance(layer.base, Linear4bit)
        a_ri, b_or = (m.detach().double() for m in layer.matrices("default"))
        expected[path] = layer.base.dequantize().double() + 9 / 6 * b_or @ a_ri
    minift.merge_lora(model)
    assert not any(isinstance(module, Linear4bit | LoraLinear) for module in model.modules())
    for path, exact in expected.items():
        merged = model.get_submodule(path)
        assert type(merged) is nn.Linear and not merged.weight.requires_grad
        assert merged.weight.dtype == torch.float32
        # 6 products and their sum, scaled, added: 9 roundings of numbers below 1.
        assert (merged.weight.double() - exact).abs().max() <= 9 * 2**-24
        assert torch.unique(merged.weight).numel() > 1000  # of 16 values times a few hundred scales it is not


def test_bf16_is_rounded_once():
    """W + change in fp32, then bf16: rounding the change first would be off by one unit here and there."""
    layer = LoraLinear(nn.Linear(64, 64, bias=False).requires_grad_(False).bfloat16())
    layer.add("default", LoraConfig(r=4, alpha=8))
    nn.init.normal_(layer.matrices("default")[1])
    a_ri, b_or = layer.matrices("default")
    assert isinstance(layer.base, nn.Linear)
    expected = (layer.base.weight.float() + (b_or @ a_ri) * 2.0).bfloat16()
    twice = layer.base.weight + ((b_or @ a_ri) * 2.0).bfloat16()
    model = nn.Sequential(layer)
    minift.merge_lora(model)
    merged = model[0].get_parameter("weight")
    assert torch.equal(merged, expected)
    assert not torch.equal(merged, twice)


@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_merged_weights_equal_pefts_in_fp32(request: pytest.FixtureRequest, name: str):
    peft = pytest.importorskip("peft")
    folder = request.getfixturevalue(name)
    ours = adapted(folder)
    settings = peft.LoraConfig(r=6, lora_alpha=9, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(peers.peer_base(folder, nf4=False), settings)
    for key, value in ours.named_parameters():
        if ".lora_" in key:
            theirs.get_parameter(f"base_model.model.{key}").data.copy_(value.data)
    merged = theirs.merge_and_unload()
    minift.merge_lora(ours)
    theirs_by_name = dict(merged.named_parameters())
    assert dict(ours.named_parameters()).keys() == theirs_by_name.keys()
    for key, value in ours.named_parameters():
        # The same sum in fp32; only the order within the rank-6 product may differ: see above.
        assert (value - theirs_by_name[key]).abs().max() <= 2 * 9 * 2**-24, key
    ids = torch.randint(3, ours.config.vocab_size, (2, 17))
    assert (ours(ids) - merged(ids).logits).abs().max() <= 1e-5


def test_only_active_adapters_are_merged(tiny: Path):
    model = adapted(tiny)
    minift.add_lora(model, CONFIG, adapter="second")
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.matrices("second")[1], std=0.1)
        layer.active = ["second"]
    layer = lora_layers(model)["model.layers.0.mlp.up_proj"]
    expected = layer.base.weight + layer.delta("second")
    minift.merge_lora(model)
    assert torch.equal(model.get_parameter("model.layers.0.mlp.up_proj.weight"), expected)


def test_a_head_that_is_tied_to_the_embedding_is_not_changed_with_it(tiny: Path):
    """Merging into the shared matrix would change what the model reads along with what it says."""
    model = minift.load_model(tiny)
    minift.add_lora(model, LoraConfig(r=2, target_modules=("lm_head",)))
    nn.init.normal_(lora_layers(model)["lm_head"].matrices("default")[1])
    ids = torch.randint(3, model.config.vocab_size, (2, 7))
    before, embedding = model(ids), model.model.embed_tokens.weight.clone()
    minift.merge_lora(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert (model(ids) - before).abs().max() <= 1e-4 * before.abs().max()


def test_the_original_weight_is_left_alone(tiny: Path):
    """The merged weight is a new tensor: whoever else holds the base keeps it."""
    model = adapted(tiny)
    layer = lora_layers(model)["model.layers.1.self_attn.o_proj"]
    weight, before = layer.base.weight, layer.base.weight.clone()
    minift.merge_lora(model)
    assert torch.equal(weight, before)


def test_nothing_to_merge_is_refused(tiny: Path):
    model = minift.load_model(tiny)
    with pytest.raises(ValueError, match="nothing to merge: the model has no adapter"):
        minift.merge_lora(model)
    minift.add_lora(model)
    with minift.disabled(model), pytest.raises(ValueError, match="no active adapter"):
        minift.merge_lora(model)
    minift.merge_lora(model)
    with pytest.raises(ValueError, match="nothing to merge"):
        minift.merge_lora(model)


# --- which adapters, which layers -------------------------------------------------------------------------------------


def test_named_adapters_are_merged_and_other_layers_stay_quantized(tiny: Path):
    model = minift.load_model(tiny, "nf4")
    minift.add_lora(model, LoraConfig(r=2, target_modules=("q_proj",)), "one")
    minift.add_lora(model, LoraConfig(r=2, target_modules=("q_proj", "up_proj")), "two")
    for layer in lora_layers(model).values():
        for name in layer.configs:
            nn.init.normal_(layer.matrices(name)[1])
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    expected = layer.base_weight() + layer.delta("one")
    report = minift.merge_lora(model, ["one"])
    assert (report.adapters, report.dropped) == (("one",), ("two",))
    assert report.paths == [f"model.layers.{number}.self_attn.q_proj" for number in range(2)]
    assert torch.equal(model.get_parameter("model.layers.1.self_attn.q_proj.weight"), expected)
    assert type(model.get_submodule("model.layers.1.mlp.up_proj")) is Linear4bit
    assert not lora_layers(model)
    assert "not merged: two" in report.format()


def test_what_is_trained_beside_is_merged_too(tiny: Path):
    """A trained norm, and LoRA on the embedding: the merged model has no place of an adapter left."""
    model = minift.load_model(tiny)
    minift.add_lora(model, LoraConfig(r=2, target_modules=("q_proj", "embed_tokens"), modules_to_save=("norm",)))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        ids = torch.randint(3, model.config.vocab_size, (2, 9))
        before = model(ids)
        report = minift.merge_lora(model, token_ids=ids)
        after = model(ids)
    assert not switched(model)
    assert report.paths == ["model.embed_tokens", *(f"model.layers.{n}.self_attn.q_proj" for n in range(2))]
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()  # fp32: see above
    assert report.drift and report.drift.largest == (after - before).abs().max().item()


# --- what the report says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 0.0), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_the_report_says_what_rounding_lost(tiny: Path, dtype: torch.dtype, unit: float):
    model = adapted(tiny, "nf4", dtype)
    exact = {path: layer.base_weight() + layer.delta("default") for path, layer in lora_layers(model).items()}
    report = minift.merge_lora(model)
    squares = [0.0, 0.0]
    for layer in report.layers:
        sum_oi, stored_oi = exact[layer.path], model.get_parameter(f"{layer.path}.weight")
        assert layer.stored == str(dtype).removeprefix("torch.")
        assert layer.size == pytest.approx(sum_oi.norm().item(), rel=1e-5)
        assert layer.rounding == pytest.approx((stored_oi.float() - sum_oi).norm().item(), rel=1e-5)
        assert layer.from_original is None
        squares = [squares[0] + layer.size**2, squares[1] + layer.rounding**2]
    assert report.rounding == pytest.approx((squares[1] / squares[0]) ** 0.5)
    # Each weight is off by at most u of it; uniformly distributed below that it is u / sqrt(3) times 1 / (1 to 2).
    assert unit / 4 <= report.rounding <= unit
    assert report.from_original is None and report.drift is None


def test_the_difference_to_the_original_weights(tiny: Path, tmp_path: Path):
    """It is what quantization lost: the change is the same. Read from the folder, or taken from a model."""
    originals = minift.load_model(tiny)
    paths = list(lora_layers(adapted(tiny, "nf4")))
    lost = {
        path: minift.load_model(tiny, "nf4").get_submodule(path).dequantize(torch.float32)  # pyright: ignore
        - originals.get_parameter(f"{path}.weight")
        for path in paths
    }
    for original in (tiny, str(tiny), originals):
        report = minift.merge_lora(adapted(tiny, "nf4"), original=original)
        assert report.paths == paths
        for layer in report.layers:
            # (W + D) - (O + D) rounds three times, to 2^-24 of numbers of size about 1.
            assert layer.from_original == pytest.approx(lost[layer.path].norm().item(), rel=1e-4)
        total = sum(float(layer.from_original or 0) ** 2 for layer in report.layers) ** 0.5
        assert report.from_original == pytest.approx(total / sum(layer.size**2 for layer in report.layers) ** 0.5)
        assert (
            f"differ by {100 * total / sum(layer.size**2 for layer in report.layers) ** 0.5:.3g} %" in report.format()
        )
    plain = minift.merge_lora(adapted(tiny), original=tiny)
    assert plain.from_original == 0
    half = minift.load_model(tiny, "nf4")
    minift.add_lora(half, LoraConfig(r=2, target_modules=("lm_head", "embed_tokens", "up_proj")))
    report = minift.merge_lora(half, original=tiny)
    assert [layer.path for layer in report.layers if not layer.from_original] == ["model.embed_tokens", "lm_head"]


def test_with_dora_the_change_depends_on_the_weight(tiny: Path):
    model, originals = minift.load_model(tiny, "nf4"), minift.load_model(tiny)
    path = "model.layers.0.mlp.up_proj"
    minift.add_lora(model, LoraConfig(r=3, use_dora=True, target_modules=(path,)))
    layer = lora_layers(model)[path]
    nn.init.normal_(layer.matrices("default")[1], std=0.3)
    a_ri, b_or, m_o = (p.detach().double() for p in (*layer.matrices("default"), layer.magnitude("default")))
    merged = []
    for weight_oi in (layer.base_weight(), originals.get_parameter(f"{path}.weight").detach()):
        moved_oi = weight_oi.double() + 16 / 3 * b_or @ a_ri
        merged.append(m_o.unsqueeze(1) * moved_oi / moved_oi.norm(dim=1, keepdim=True))
    report = minift.merge_lora(model, original=originals)
    assert report.layers[0].from_original == pytest.approx((merged[0] - merged[1]).norm().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_originals_of_other_families(tmp_path: Path, family: str):
    """GPT-2's files hold linear weights transposed, and names without "transformer."; both without quantization: 0."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 32},
        "opt": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
                "max_position_embeddings": 32, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    }[family]  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    for quantize in (None, "nf4"):
        model = minift.load_model(tmp_path / family, quantize)
        minift.add_lora(model, LoraConfig(r=2))
        report = minift.merge_lora(model, original=tmp_path / family)
        distances = [layer.from_original for layer in report.layers]
        assert all(0.05 < float(d or 0) / layer.size < 0.2 for d, layer in zip(distances, report.layers, strict=True)) \
            if quantize else distances == [0] * len(report)  # fmt: skip


def test_the_drift_is_what_the_formulas_say():
    """By hand, with numpy, on other shapes than those of one chunk."""
    before, after = torch.randn(3, 50, 7), torch.randn(3, 50, 7)
    drift = measure_drift(before, after)
    p, q = (np.exp(x.double().numpy()) / np.exp(x.double().numpy()).sum(-1, keepdims=True) for x in (before, after))
    assert drift.tokens == 150
    assert drift.largest == pytest.approx(np.abs(after.numpy() - before.numpy()).max(), rel=1e-6)
    assert drift.mean == pytest.approx(np.abs(after.numpy() - before.numpy()).mean(), rel=1e-5)
    assert drift.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-9)
    assert drift.same_argmax == (p.argmax(-1) == q.argmax(-1)).mean()
    same = measure_drift(before, before)
    assert (same.largest, same.mean, same.kl, same.same_argmax) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="shapes"):
        measure_drift(before, after[1:])


# --- quantized again --------------------------------------------------------------------------------------------------


def test_quantizing_again_is_what_peft_does_and_drifts(tiny: Path):
    """PEFT's merge of a 4-bit base quantizes again: the same codes and scales as ours when asked to, and another model
    than the one that was trained. Into 16 bit (here fp32) only rounding is left."""
    peft = pytest.importorskip("peft")
    format = QuantConfig(double_quant=False)  # on a CPU bitsandbytes rounds the scales' scales by a table of its own
    ours = adapted(tiny, format)
    settings = peft.LoraConfig(r=6, lora_alpha=9, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs: Any = peft.get_peft_model(peers.peer_base(tiny, double_quant=False), settings)
    for key, value in ours.named_parameters():
        if ".lora_" in key:
            theirs.get_parameter(f"base_model.model.{key}").data.copy_(value.data)
    ids = torch.randint(3, ours.config.vocab_size, (4, 17))
    into_dense = minift.merge_lora(copy.deepcopy(ours), token_ids=ids)
    with torch.no_grad():
        unmerged = theirs(ids).logits
        with pytest.warns(UserWarning, match="rounding errors"):
            merged = theirs.merge_and_unload()
        other = measure_drift(unmerged, merged(ids).logits)
    report = minift.merge_lora(ours, requantize=True, token_ids=ids)
    assert {layer.stored for layer in report.layers} == {"nf4"}
    different = total = 0
    for path in report.paths:
        mine, its = ours.get_submodule(path), merged.get_submodule(path)
        assert type(mine) is Linear4bit and type(its).__name__ == "Linear4bit"
        different += (mine.weight.view(-1) != its.weight.data.view(-1)).sum().item()
        total += mine.weight.numel()
        # The sums may differ by the order of the rank-6 products, 9 roundings of numbers below 1; so may the scales.
        assert (mine.absmax - its.weight.quant_state.absmax).abs().max() <= 9 * 2**-24
    assert different <= 0.001 * total  # sums within that distance of one of 15 thresholds
    drift, kept = report.drift, into_dense.drift
    assert drift and kept
    for name in ("largest", "mean", "kl"):
        assert getattr(drift, name) == pytest.approx(getattr(other, name), rel=0.02)
    assert drift.same_argmax < 1 == kept.same_argmax
    assert kept.largest < 1e-4 < 0.1 < drift.largest
    assert kept.kl < 1e-9 < 1e-3 < drift.kl
    assert "nf4" in report.format() and "KL divergence" in report.format()


@pytest.mark.parametrize("quantize", ["nf4", "int8", QuantConfig(quant_type="fp4", blocksize=128)], ids=str)
def test_the_format_stays_when_quantized_again(tiny: Path, tmp_path: Path, quantize: str | QuantConfig):
    model = adapted(tiny, quantize, torch.bfloat16)
    layers = lora_layers(model)
    before = {p: (b.config, b.compute_dtype, b.stored_dtype) for p, b in ((p, m.base) for p, m in layers.items())
              if isinstance(b, QuantizedLinear)}  # fmt: skip
    ids = torch.randint(3, model.config.vocab_size, (1, 9))
    minift.merge_lora(model, requantize=True, token_ids=ids)
    after = {p: (m.config, m.compute_dtype, m.stored_dtype) for p, m in model.named_modules()
             if isinstance(m, QuantizedLinear)}  # fmt: skip
    assert before == after and len(after) == 14
    again = minift.load_model(minift.save_model(model, tmp_path / "saved"))
    assert torch.equal(again(ids), model(ids))


# --- unmerging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_unmerging_restores_every_bit(tiny: Path, quantize: str | None, dtype: torch.dtype):
    model = adapted(tiny, quantize, dtype)
    ids = torch.randint(3, model.config.vocab_size, (2, 17))
    with torch.no_grad():
        before, state = model(ids), {name: t.clone() for name, t in model.state_dict().items()}
        paths = minift.merge_lora(model, keep=True).paths
        merged = model(ids)
        assert type(model.get_submodule(paths[0])) is nn.Linear and not torch.equal(merged, before)
        assert set(model.state_dict()) == set(minift.load_model(tiny).state_dict())  # what is kept is not saved
        assert unmerge_lora(model) == paths
        assert torch.equal(model(ids), before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="nothing to unmerge"):
        unmerge_lora(model)


@pytest.mark.parametrize(("dtype", "unit"), [("float32", 2**-24), ("bfloat16", 2**-8)])
def test_subtracting_restores_only_to_rounding(tiny: Path, dtype: str, unit: float):
    """PEFT adds and subtracts. Its result is off by what the docstring of merge.py says, and not by nothing."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=6, lora_alpha=9, init_lora_weights=False, target_modules="all-linear")
    theirs: Any = peft.get_peft_model(peers.peer_base(tiny, nf4=False, dtype=dtype), settings)
    weights = {name: p for name, p in theirs.named_parameters() if "base_layer.weight" in name}
    before = {name: p.detach().clone() for name, p in weights.items()}
    theirs.merge_adapter()
    merged = {name: p.detach().clone() for name, p in weights.items()}
    theirs.unmerge_adapter()
    off = {name: (p.detach().double() - before[name].double()).abs() for name, p in weights.items()}
    for name, error in off.items():
        # The sum, the difference, and D, which PEFT rounds to the weight's dtype before it subtracts: u of each; the
        # size of the sum and of the difference is itself known to a few u only.
        whole, weight = merged[name].double(), before[name].double()
        assert (error <= unit * (whole.abs() + weight.abs() + (whole - weight).abs()) * (1 + 4 * unit)).all(), name
    assert max(error.max() for error in off.values()) > 0


def test_a_kept_merge_moves_with_the_model_and_is_saved_as_plain(tiny: Path, tmp_path: Path):
    model = adapted(tiny, "nf4")
    ids = torch.randint(3, model.config.vocab_size, (2, 7))
    with torch.no_grad():
        before = model(ids)
        minift.merge_lora(model, keep=True)
        twin = copy.deepcopy(model)
        saved = minift.load_model(minift.save_model(model, tmp_path / "saved"))
        assert torch.equal(saved(ids), model(ids))
        unmerge_lora(twin)
        assert torch.equal(twin(ids), before) and not lora_layers(model)
    unmerge_lora(model.to("meta"))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_unmerging_a_head_ties_it_again(tiny: Path):
    model = minift.load_model(tiny)
    minift.add_lora(model, LoraConfig(r=2, target_modules=("lm_head",)))
    minift.merge_lora(model, keep=True)
    assert not model.config.tie_word_embeddings
    unmerge_lora(model)
    assert model.config.tie_word_embeddings
    assert lora_layers(model)["lm_head"].base.weight is model.model.embed_tokens.weight


# --- saved as a Hugging Face folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_transformers_loads_the_merged_model(
    tiny: Path, tmp_path: Path, quantize: str | None, targets: str | tuple[str, ...]
):
    """With equal logits; layers that were not adapted are still quantized, and read by bitsandbytes."""
    model = minift.load_model(tiny, QuantConfig(double_quant=False) if quantize else None)
    minift.add_lora(model, LoraConfig(r=4, target_modules=targets))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.matrices("default")[1], std=0.1)
    minift.merge_lora(model)
    mixed = any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert mixed == (quantize is not None and targets != "all-linear")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        minift.save_model(model, tmp_path / "merged"), **({"device_map": {"": "cpu"}} if mixed else {})
    ).train()  # in eval mode bitsandbytes would repack its layers
    ids = torch.randint(3, model.config.vocab_size, (2, 17))
    with torch.no_grad():
        expected, mine = theirs(ids).logits, model(ids)
        moved = copy.deepcopy(model)
        for p in moved.parameters():  # the size of what rounding does: see above
            p.mul_(1 + 2**-24 * (2 * torch.randint(0, 2, p.shape) - 1).double())
        assert (mine - expected).abs().max() <= 8 * (moved(ids) - mine).abs().max()


# --- refused ----------------------------------------------------------------------------------------------------------


def broken(model: minift.CausalLM) -> minift.CausalLM:
    with torch.no_grad():
        lora_layers(model)["model.layers.1.mlp.down_proj"].matrices("default")[1][3, 2] = float("nan")
    return model


@pytest.mark.parametrize(
    ("quantize", "options", "message"),
    [
        ("nf4", {"adapters": ["x"]}, "no adapter 'x'; it has default"),
        ("nf4", {"adapters": "default"}, "got the string 'default'"),
        ("nf4", {"adapters": []}, "nothing to merge"),
        ("nf4", {"requantize": True}, "give token_ids"),
        (None, {"requantize": True, "token_ids": torch.ones(1, 2).long()}, "no adapted layer was quantized"),
        ("nf4", {"token_ids": torch.ones(3).long()}, r"\[b, s\], got torch.int64 \(3,\)"),
        ("nf4", {"token_ids": torch.full((1, 2), 384)}, "within 0 and 384, got 384"),
        ("nf4", {"original": "NF4"}, "is quantized itself"),
        ("nf4", {"original": nn.Linear(2, 2)}, "no unquantized layer model.layers.0.self_attn.q_proj"),
        ("nf4", {"original": "ODD"}, "has shape"),
        ("nf4", {"original": "NOWHERE"}, "NOWHERE"),
    ],
    ids=str,
)
def test_what_is_refused_leaves_the_model_alone(
    tiny: Path, tiny_odd: Path, tmp_path: Path, quantize: str | None, options: dict[str, Any], message: str
):
    model = adapted(tiny, quantize)
    folders = {"ODD": tiny_odd, "NF4": tmp_path / "nf4"}
    if options.get("original") == "NF4":
        minift.save_model(minift.load_model(tiny, "nf4"), tmp_path / "nf4")
    if isinstance(options.get("original"), str):
        options = {"original": folders.get(options["original"], options["original"])}
    ids = torch.arange(10).view(2, 5)
    before = model(ids)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        minift.merge_lora(model, **options)
    assert torch.equal(model(ids), before) and len(lora_layers(model)) == 14


def test_a_broken_adapter_is_not_merged(tiny: Path):
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj is not finite"):
        minift.merge_lora(broken(adapted(tiny)))
    model = adapted(tiny, dtype=torch.float16)
    with torch.no_grad():
        lora_layers(model)["model.layers.0.mlp.down_proj"].matrices("default")[1][0] = 1e6
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj is not finite in torch.float16"):
        minift.merge_lora(model)
    assert len(lora_layers(model)) == 14


def test_what_cannot_be_kept_or_compared(tiny: Path):
    model = minift.load_model(tiny)
    minift.add_lora(model, LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("norm",)))
    with pytest.raises(ValueError, match="keep: only low-rank"):
        minift.merge_lora(model, keep=True)
    model = minift.load_model(tiny)
    minift.add_lora(model, LoraConfig(r=2, target_modules=("q_proj",), init="pissa"))
    with pytest.raises(ValueError, match="original: an adapter that began"):
        minift.merge_lora(model, original=tiny)
    model = adapted(tiny)
    minift.merge_lora(model, keep=True)
    minift.add_lora(model, CONFIG, "later")
    with pytest.raises(ValueError, match="keeps an earlier merge"):
        minift.merge_lora(model, keep=True)
    with pytest.raises(ValueError, match="changed since the merge"):
        unmerge_lora(model)
