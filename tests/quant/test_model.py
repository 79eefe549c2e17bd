"""Whole models: which layers are quantized, what the report says, and the way back.

The rule of names is transformers' (`should_convert_module`), called here as the reference.
"""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from minift.quant import (
    Linear4bit,
    Linear8bit,
    QuantConfig,
    QuantizedLinear,
    dequantize_4bit,
    dequantize_model,
    format_report,
    quantize_4bit,
    quantize_model,
    swap_linears,
)
from minift.quant.int8 import quantize_weight_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=False)
        self.down_proj = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down_proj(self.q_proj(x).relu()) + x)


class Model(nn.Module):
    """An embedding, two blocks and a head; the head's name and whether it is tied are the caller's choice."""

    def __init__(self, head: str = "lm_head", tied: bool = False):
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = head
        self.add_module(head, nn.Linear(16, 40, bias=False))
        if tied:
            self.get_submodule(head).weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.get_submodule(self.head)(x)


PROJECTIONS = ["layers.0.q_proj", "layers.0.down_proj", "layers.1.q_proj", "layers.1.down_proj"]


@pytest.mark.parametrize(
    ("head", "tied", "skip", "replaced"),
    [
        ("lm_head", False, ("lm_head",), PROJECTIONS),
        ("lm_head", True, ("lm_head",), PROJECTIONS),
        ("lm_head", False, (), [*PROJECTIONS, "lm_head"]),
        ("lm_head", True, (), PROJECTIONS),
        ("output", True, ("lm_head",), PROJECTIONS),
        ("output", False, ("lm_head",), [*PROJECTIONS, "output"]),
        ("lm_head", False, ("lm_head", "q_proj"), [name for name in PROJECTIONS if "q_proj" not in name]),
        ("lm_head", False, ("lm_head", "layers.1.q_proj"), [name for name in PROJECTIONS if name != "layers.1.q_proj"]),
        ("lm_head", False, ("lm_head", "layers.0"), PROJECTIONS[2:]),  # a beginning, up to a dot
        ("lm_head", False, ("lm_head", "layer", "ayers.0", "layers.1.q"), PROJECTIONS),  # no beginnings, no ends
        ("lm_head", False, ("lm_head", r"layers\.\d+\.q_proj"), PROJECTIONS[1::2]),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_which_layers_are_swapped(head: str, tied: bool, skip: tuple[str, ...], replaced: list[str], device: str):
    with torch.device(device):
        model = Model(head, tied)
    before = dict(model.named_modules())
    names = swap_linears(model, QuantConfig(skip=skip))
    assert sorted(names) == sorted(replaced)
    after = dict(model.named_modules())
    assert {name for name, module in after.items() if isinstance(module, Linear4bit)} == set(replaced)
    assert all(after[name] is module for name, module in before.items() if name not in replaced)
    for name in replaced:
        layer, linear = after[name], before[name]
        assert isinstance(layer, Linear4bit) and isinstance(linear, nn.Linear)
        assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)
        assert (layer.bias is None) == (linear.bias is None)
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {device}


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    path=st.lists(st.sampled_from(["model", "layers", "1", "11", "q_proj", "proj", "lm_head"]), min_size=1).map(
        ".".join
    ),
    skip=st.lists(st.sampled_from(["model", "layers.1", "1", "proj", "q_proj", ".*1", "lm_head", "model.layers", "l"])),
)
def test_names_are_skipped_as_transformers_skips_them(path: str, skip: list[str]):
    assert QuantConfig(skip=tuple(skip)).skips(path) == (not should_convert_module(path, skip))


def test_format_is_checked_early():
    with pytest.raises(ValueError, match=r"'int4'.*nf4, fp4, int8"):
        QuantConfig("int4")
    for blocksize in (48, 16, 8192):
        with pytest.raises(ValueError, match="blocksize"):
            QuantConfig(blocksize=blocksize)
    for threshold in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="threshold"):
            QuantConfig("int8", threshold=threshold)
    with pytest.raises(ValueError, match="compute_dtype"):
        QuantConfig(compute_dtype=torch.int32)
    with pytest.raises(ValueError, match="quant_storage"):
        QuantConfig(quant_storage=torch.complex64)
    with pytest.raises(ValueError, match="skip"):
        QuantConfig(skip="lm_head")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="regular expression"):
        QuantConfig(skip=("layers.(",))
    assert QuantConfig.named("fp4") == QuantConfig("fp4")
    assert QuantConfig.named(None) is None
    with pytest.raises(ValueError, match="'int3'"):
        QuantConfig.named("int3")


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig("fp4", double_quant=False),
        QuantConfig("int8"),
        QuantConfig(compute_dtype=torch.bfloat16, quant_storage=torch.float16, skip=()),
    ],
)
def test_settings_survive_config_json(config: QuantConfig):
    """Written and read again; a compute dtype that was left open is written as transformers' default."""
    again = QuantConfig.from_json(config.to_json(), "here")
    if config.quant_type == "int8":
        assert (again.quant_type, again.threshold, again.skip) == ("int8", config.threshold, config.skip)
    else:
        assert again.compute_dtype == (config.compute_dtype or torch.float32)
        assert again == replace(config, compute_dtype=again.compute_dtype)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.ModuleDict({"lm_head": nn.Linear(4, 4)})])
def test_nothing_to_swap_is_refused(model: nn.Module):
    with pytest.raises(ValueError, match="nothing to quantize"):
        swap_linears(model, QuantConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["nf4", "fp4", QuantConfig(blocksize=32, double_quant=False)])
def test_quantize_model(quantize: str | QuantConfig, dtype: torch.dtype):
    """Every layer holds what quantize_4bit makes of its weight; everything else is the same object."""
    model = Model().to(dtype)
    original = copy.deepcopy(model)
    untouched = {
        name: p for name, p in model.named_parameters() if "proj.weight" not in name and "proj.bias" not in name
    }
    reports = quantize_model(model, quantize)
    assert sorted(r.path for r in reports if r.format) == sorted(PROJECTIONS)
    config = QuantConfig.named(quantize)
    assert config is not None
    for name in PROJECTIONS:
        layer, linear = model.get_submodule(name), original.get_submodule(name)
        assert isinstance(layer, Linear4bit) and isinstance(linear, nn.Linear)
        packed, state = quantize_4bit(linear.weight, config.quant_type, config.blocksize, config.double_quant)
        assert torch.equal(layer.weight, packed)
        assert torch.equal(layer.dequantize(), dequantize_4bit(packed, state))
        assert layer.compute_dtype == layer.stored_dtype == dtype
        assert (layer.bias is None) == (linear.bias is None)
        assert layer.bias is None or (torch.equal(layer.bias, linear.bias) and not layer.bias.requires_grad)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in untouched.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_model_int8(dtype: torch.dtype):
    model = Model().to(dtype)
    original = copy.deepcopy(model)
    quantize_model(model, "int8")
    for name in PROJECTIONS:
        layer, linear = model.get_submodule(name), original.get_submodule(name)
        assert isinstance(layer, Linear8bit) and isinstance(linear, nn.Linear)
        codes, absmax = quantize_weight_int8(linear.weight)
        assert torch.equal(layer.weight, codes) and torch.equal(layer.absmax, absmax)
    assert model(torch.randint(0, 40, (2, 9))).dtype == dtype
    dequantize_model(model)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_the_report():
    """Bytes by hand (16 x 16 weights: 128 packed bytes and 4 scales), errors from the weights themselves."""
    model = Model("output", tied=True)
    original = copy.deepcopy(model)
    reports = {r.path: r for r in quantize_model(model, QuantConfig(double_quant=False, skip=("layers.1.q_proj",)))}
    assert set(reports) == {*PROJECTIONS, "output"}
    assert reports["output"].format is None and reports["output"].reason == "shares the embedding's weight"
    assert reports["layers.1.q_proj"].reason == "named in skip"
    report = reports["layers.0.q_proj"]
    assert (report.format, report.shape, report.reason) == ("nf4", (16, 16), "")
    assert (report.bytes_before, report.bytes_after) == (4 * 256, 128 + 4 * 4)
    before, layer = original.get_submodule("layers.0.q_proj"), model.get_submodule("layers.0.q_proj")
    assert isinstance(before, nn.Linear) and isinstance(layer, Linear4bit)
    weight = before.weight.detach().double()
    expected = ((layer.dequantize().double() - weight).square().mean() / weight.square().mean()).sqrt().item()
    assert abs(report.error - expected) < 1e-6 * expected
    text = format_report(list(reports.values()))
    assert len(text.splitlines()) == 1 + 5 + 1 and "kept: named in skip" in text
    total = sum(r.bytes_before for r in reports.values()), sum(r.bytes_after for r in reports.values())
    assert text.splitlines()[-1].split() == ["total", f"{total[0]:,}", f"{total[1]:,}"]


def test_a_bad_weight_is_named():
    model = Model()
    with torch.no_grad():
        model.get_submodule("layers.1.q_proj").weight[3, 3] = float("nan")  # pyright: ignore
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj: .*NaN"):
        quantize_model(model)
    with pytest.raises(ValueError, match="format"):
        quantize_model(Model(), None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_model_gives_the_same_bits(quant_type: str, dtype: torch.dtype, tied: bool):
    model = Model(tied=tied).to(dtype)
    quantize_model(model, quant_type)
    ids = torch.randint(0, 40, (2, 9))
    wanted = model(ids)
    assert sorted(dequantize_model(model)) == sorted(PROJECTIONS)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    assert torch.equal(model(ids), wanted)
    linear = model.get_submodule(PROJECTIONS[1])
    assert isinstance(linear, nn.Linear) and linear.weight.dtype == dtype
    assert not linear.weight.requires_grad and (linear.out_features, linear.in_features) == (16, 16)
    assert dequantize_model(model) == []


def test_a_layer_that_computes_in_another_dtype_becomes_one_of_its_surroundings():
    """bf16 model, fp32 arithmetic: the plain layers must fit bf16 activations, also after `.to()`."""
    for cast, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = Model().bfloat16()
        quantize_model(model, QuantConfig(compute_dtype=torch.float32))
        ids = torch.randint(0, 40, (2, 9))
        model = model if cast is None else model.to(cast)
        before = model(ids)
        dequantize_model(model)
        assert model.get_submodule(PROJECTIONS[0]).weight.dtype == expected
        # Rounded inputs and products of 16 numbers: bf16 keeps 8 bits.
        torch.testing.assert_close(model(ids), before, rtol=0.1, atol=0.1)


def test_only_one_kind_is_dequantized():
    model = Model()
    quantize_model(model, QuantConfig("int8", skip=("lm_head", "q_proj")))
    quantize_model(model, QuantConfig())
    kinds = [type(model.get_submodule(name)) for name in PROJECTIONS]
    assert kinds == [Linear4bit, Linear8bit] * 2
    assert dequantize_model(model, Linear4bit) == PROJECTIONS[::2]
    assert [type(model.get_submodule(name)) for name in PROJECTIONS] == [nn.Linear, Linear8bit] * 2


def test_quantized_model_trains_what_is_left():
    """Gradients reach the embedding through both blocks, and equal those of the dequantized model."""
    model = Model()
    quantize_model(model)
    ids = torch.randint(0, 40, (2, 9))
    model(ids).square().sum().backward()
    ours = model.embed_tokens.weight.grad
    model.zero_grad()
    dequantize_model(model)
    model(ids).square().sum().backward()
    theirs = model.embed_tokens.weight.grad
    assert ours is not None and theirs is not None and ours.abs().sum() > 0
    assert torch.equal(ours, theirs)
