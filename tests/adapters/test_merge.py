"""Merging an adapter: the merged model against the unmerged one, and against PEFT's merge_and_unload."""

import copy
from pathlib import Path

import peers
import pytest
import torch
from torch import Tensor, nn

import minift
from minift.adapters.inject import lora_layers
from minift.adapters.lora import LoraConfig, LoraLinear
from minift.quant import Linear4bit, QuantConfig

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
    assert minift.merge_lora(model) == ["0"]
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
        paths = minift.merge_lora(model)
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


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merging_in_bf16_moves_the_logits_by_a_rounding(tiny: Path, quantize: str | None):
    """Unmerged, bf16 rounds the change and the sum of the outputs; merged, it rounds the sum of the weights. Both are
    roundings of the same fp32 model, from which bf16 is D away without any merging."""
    model = adapted(tiny, quantize, torch.bfloat16)
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
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert 0 < rounding < 0.2
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
    minift.merge_lora(model)
    with pytest.raises(ValueError, match="nothing to merge"):
        minift.merge_lora(model)
