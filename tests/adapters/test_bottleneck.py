"""Bottleneck adapters against a straightforward reference: hooks on the linears of a transformers model that add
U act(D x + c) + b, written from the papers' formulas. And the papers' counts, gradients, starts and precisions."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from torch import Tensor, nn

import minift
from minift.adapters.bottleneck import (
    BottleneckConfig,
    BottleneckLinear,
    HoulsbyConfig,
    ParallelConfig,
    Passage,
    PfeifferConfig,
    Tap,
)
from minift.adapters.report import report, without_gradient
from minift.adapters.verbs import add_adapter, delete_method, load_adapter, save_adapter
from minift.model.generate import generate_tokens
from minift.quant.linear import Linear4bit

IDS = torch.arange(3, 27).view(2, 12)
CONFIGS = {config.name: config for config in (HoulsbyConfig, PfeifferConfig, ParallelConfig)}
BLOCKS = {"opt": "model.decoder.layers", "gpt2": "transformer.h"}
ATTENTION_END = {"opt": "self_attn.out_proj", "gpt2": "attn.c_proj"}
MLP_END = {"opt": "fc2", "gpt2": "mlp.c_proj"}
MLP_BEGIN = {"opt": "fc1", "gpt2": "mlp.c_fc", "phi3": "mlp.gate_up_proj"}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "swish": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + (x / math.sqrt(2)).erf()) / 2,
    "tanh": lambda x: 1 - 2 / ((2 * x).exp() + 1),
}


def bottleneck(x: Tensor, values: dict[str, Tensor], path: str, activation: str) -> Tensor:
    """U act(D x + c) + b."""
    parts = ("adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias")
    down, c, up, b = (values[f"{path}.{part}"].to(x.dtype) for part in parts)
    return ACTIVATIONS[activation](x @ down.T + c) @ up.T + b


def hook(theirs: nn.Module, family: str, name: str, config: BottleneckConfig, values: dict[str, Tensor]) -> None:
    """Give a transformers model the adapters with these values."""
    blocks = BLOCKS.get(family, "model.layers")
    s, activation = config.scaling, config.non_linearity
    seen: dict[str, Tensor] = {}

    def after(path: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *given: given[-1] + s * bottleneck(given[-1], values, path, activation))

    def beside(path: str, first: nn.Module, last: nn.Module) -> None:
        first.register_forward_pre_hook(lambda _, given: seen.update({path: given[0]}))
        last.register_forward_hook(
            lambda *given: given[-1] + s * bottleneck(seen[path].view_as(given[-1]), values, path, activation)
        )

    for number, block in enumerate(theirs.get_submodule(blocks).children()):
        end, attention = MLP_END.get(family, "mlp.down_proj"), ATTENTION_END.get(family, "self_attn.o_proj")
        path = f"{blocks}.{number}.{end}"
        if name == "parallel":
            first = block.get_submodule(MLP_BEGIN.get(family, "mlp.up_proj"))
            beside(path, first, block.get_submodule(end))
        else:
            after(path, block.get_submodule(end))
        if name == "houlsby":
            after(f"{blocks}.{number}.{attention}", block.get_submodule(attention))


def randomized(model: minift.CausalLM) -> dict[str, Tensor]:
    """The adapter's tensors by their names in the file, after giving them values that show."""
    tensors = model.method.tensors(model)
    for value in tensors.values():
        nn.init.normal_(value, std=0.2)
    return tensors


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", checkpoints.FAMILY_NAMES)
def test_logits_and_gradients_equal_the_reference(tmp_path: Path, family: str, name: str):
    folder = checkpoints.checkpoint(tmp_path / "model", **checkpoints.FAMILY_NAMES[family])
    ours, theirs = minift.load_model(folder, attention="eager"), checkpoints.load_theirs(folder, "eager")
    config = CONFIGS[name](reduction_factor=7)
    add_adapter(ours, config)
    tensors = randomized(ours)
    values = {key: value.detach().clone().requires_grad_() for key, value in tensors.items()}
    hook(theirs, family, name, config, values)
    adapters = (2 if name == "houlsby" else 1) * ours.config.num_hidden_layers
    assert len(values) == 4 * adapters

    checkpoints.assert_close(lambda m: m(IDS) if m is ours else m(IDS).logits, ours(IDS), theirs)
    upstream = torch.randn(ours(IDS).shape)
    found = [
        torch.autograd.grad((logits * upstream.to(logits.dtype)).sum(), list(leaves.values()))
        for logits, leaves in (
            (ours(IDS), tensors), (theirs(IDS).logits, values),
            (checkpoints.in_fp64(theirs)(IDS).logits, values),
        )
    ]  # fmt: skip
    # Two evaluations of one formula in fp32, each with an error like E of theirs; a bias' gradient has few numbers, so
    # its E is a small sample and an ulp of the largest of them is added.
    for key, mine, other, exact in zip(values, *found, strict=True):
        error = (other - exact).abs().max() + 2**-23 * exact.abs().max()
        assert exact.abs().max() > 0 and (mine - other).abs().max() <= 4 * error, key


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_gradient_in_float64(name: str, activation: str):
    """Finite differences of a layer, with respect to its input and the adapter's four parameters."""
    torch.manual_seed(2)
    passage = Passage() if name == "parallel" else None
    config = CONFIGS[name](reduction_factor=2, non_linearity=activation)
    layer = BottleneckLinear(nn.Linear(6, 5).requires_grad_(False), config, passage).double()
    parameters = layer.own()
    for p in parameters.values():
        nn.init.normal_(p)

    def run(x: Tensor, beside: Tensor, *own: Tensor) -> Tensor:
        if passage is not None:
            passage.put(beside)
        return torch.func.functional_call(layer, dict(zip(parameters, own, strict=True)), (x,))

    inputs = [torch.randn(3, 6), torch.randn(3, 5), *parameters.values()]
    assert torch.autograd.gradcheck(run, [value.detach().double().requires_grad_() for value in inputs])


@pytest.mark.parametrize(("d", "factor", "m"), [(64, 16, 4), (65, 16, 4), (64, 2, 32), (63, 2.5, 25), (8, 16, 1)])
def test_width_of_the_bottleneck(d: int, factor: float, m: int):
    layer = BottleneckLinear(nn.Linear(3, d), PfeifferConfig(reduction_factor=factor))
    assert {key: tuple(p.shape) for key, p in layer.own().items()} == {
        "adapter_down.weight": (m, d), "adapter_down.bias": (m,), "adapter_up.weight": (d, m), "adapter_up.bias": (d,),
    }  # fmt: skip


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(("name", "each", "factor"), [("houlsby", 2, 16), ("pfeiffer", 1, 16), ("parallel", 1, 2)])
def test_counts_are_those_of_the_papers(tiny: Path, name: str, each: int, factor: int, quantize: str | None):
    """2 m d + d + m an adapter (Houlsby et al., section 2.1), with the defaults of adapter-hub."""
    ours = minift.load_model(tiny, quantize)
    before = sum(p.numel() for p in minift.load_model(tiny).parameters())
    add_adapter(ours, CONFIGS[name]())
    d, layers = 64, 2
    m = d // factor
    expected = layers * each * (2 * m * d + d + m)
    found = report(ours)
    assert (found.trained, found.total) == (expected, before + expected)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_starts_at_or_near_the_model(tiny: Path, name: str):
    """Relative to what a sublayer gives, U act(D y) has a size of about sqrt(m d) 0.02^2: 0.0064 with m = 4, d = 64
    (activations make it smaller); the parallel form changes nothing at first."""
    ours = minift.load_model(tiny)
    before = ours(IDS)
    add_adapter(ours, CONFIGS[name]())
    if name == "parallel":
        assert torch.equal(ours(IDS), before)
        return
    layer = ours.model.layers[0].mlp.down_proj
    y = torch.randn(100, 64)
    layer.base = nn.Identity()
    change = (layer(y) - y).norm() / y.norm()
    assert 0 < change < 2 * math.sqrt(4 * 64) * 0.02**2


def test_a_seed_gives_the_values_of_adapter_hub():
    """Its Adapter makes both linears (drawing their usual values), then draws both weights again."""
    torch.manual_seed(1)
    first = BottleneckLinear(base := nn.Linear(3, 8), PfeifferConfig(reduction_factor=2))
    beside = BottleneckLinear(base, ParallelConfig(), Passage())
    torch.manual_seed(1)
    nn.Linear(3, 8)
    down, up = nn.Linear(8, 4), nn.Linear(4, 8)
    down.weight.data.normal_(mean=0.0, std=0.02)
    up.weight.data.normal_(mean=0.0, std=0.02)
    assert torch.equal(first.adapter_down.weight, down.weight) and torch.equal(first.adapter_up.weight, up.weight)
    down, up = nn.Linear(8, 4), nn.Linear(4, 8)
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    assert torch.equal(beside.adapter_down.weight, down.weight) and not beside.adapter_up.weight.any()
    for linear in (first.adapter_down, first.adapter_up, beside.adapter_down, beside.adapter_up):
        assert not linear.bias.any()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_in_bf16(name: str, quantized: bool):
    """Six roundings to bf16 (2^-9 each) stand on the way of a number: of D or c, h, U, its product, b, the sum. ReLU
    makes no number larger. Sums are fp32's, of at most 64 numbers: 64 * 2^-24 is less than a hundredth of one."""
    passage = Passage() if name == "parallel" else None
    base = nn.Linear(64, 48).bfloat16().requires_grad_(False)
    config = CONFIGS[name](reduction_factor=3, non_linearity="relu")
    layer = BottleneckLinear(Linear4bit.from_linear(base) if quantized else base, config, passage)
    for p in layer.own().values():
        nn.init.normal_(p, std=0.3)
    x, beside = torch.randn(30, 64).bfloat16(), torch.randn(30, 48).bfloat16()
    if passage is not None:
        passage.put(beside)
    y, y0 = layer(x), layer.base(x)
    assert y.dtype == torch.bfloat16
    values = {f"0.{key}": p.detach() for key, p in layer.own().items()}
    seen = (beside if passage is not None else y0).double()
    exact = y0.double() + config.scaling * bottleneck(seen, values, "0", "relu")
    sizes = {key: value.abs() for key, value in values.items()}
    size = y0.double().abs() + config.scaling * bottleneck(seen.abs(), sizes, "0", "relu")
    assert ((y.double() - exact).abs() <= 6.1 * 2**-9 * size).all()
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.own().values())


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_checkpointing_changes_no_gradient(tiny: Path, checkpointing: Any):
    """The block is computed again in the backward pass, and the parallel adapter's input is handed over again."""
    ours = minift.load_model(tiny)
    add_adapter(ours, ParallelConfig())
    tensors = list(randomized(ours).values())
    found = [
        torch.autograd.grad(ours.hidden(IDS, gradient_checkpointing=way).sum(), tensors)
        for way in (False, checkpointing)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_nothing_outlives_the_forward_pass(tiny: Path):
    ours = minift.load_model(tiny)
    add_adapter(ours, ParallelConfig())
    ours(IDS)
    taps = [module for module in ours.modules() if isinstance(module, Tap)]
    assert len(taps) == 2 and all(vars(tap.passage) == {"_x": None} for tap in taps)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache(tiny: Path, name: str):
    """Token by token, as from one forward pass over the whole text."""
    ours = minift.load_model(tiny)
    add_adapter(ours, CONFIGS[name]())
    randomized(ours)
    ids, prompt = [5, 17, 40, 8], [5, 17, 40, 8]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(ours(torch.tensor([ids]))[0, -1].argmax()))
    assert [int(token) for token in generate_tokens(ours, [prompt], 6)] == ids[4:]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_trained_and_removed(tiny: Path, name: str):
    ours = minift.load_model(tiny, "nf4").eval()
    before, modules = ours(IDS), {path: id(module) for path, module in ours.named_modules()}
    add_adapter(ours, CONFIGS[name]())
    randomized(ours)
    assert not any(module.training for module in ours.modules())
    assert not torch.equal(ours(IDS), before)
    ours(IDS).sum().backward()
    assert without_gradient(ours) == []
    delete_method(ours)
    assert {path: id(module) for path, module in ours.named_modules()} == modules
    assert torch.equal(ours(IDS), before)


def test_pefts_loader_refuses_the_file(tiny: Path, tmp_path: Path):
    """PEFT has none of these methods: what the docstring says of such a folder."""
    peft = pytest.importorskip("peft")
    for name, config in CONFIGS.items():
        ours = minift.load_model(tiny)
        add_adapter(ours, config())
        save_adapter(ours, tmp_path / name)
        with pytest.raises(KeyError, match=name.upper()):
            peft.PeftConfig.from_pretrained(str(tmp_path / name))


def test_the_form_is_part_of_the_file(tiny: Path, tmp_path: Path):
    ours = minift.load_model(tiny)
    add_adapter(ours, ParallelConfig(reduction_factor=5.5, non_linearity="tanh", scaling=0.25))
    randomized(ours)
    save_adapter(ours, tmp_path / "saved")
    again = minift.load_model(tiny)
    load_adapter(again, tmp_path / "saved")
    assert again.method == ParallelConfig(5.5, "tanh", 0.25)
    assert torch.equal(again(IDS), ours(IDS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction_factor": 0}, "houlsby reduction_factor must be a positive number, got 0"),
        ({"reduction_factor": "16"}, "must be a positive number, got '16'"),
        ({"scaling": float("nan")}, "houlsby scaling must be a positive number"),
        ({"scaling": float("inf")}, "houlsby scaling must be a positive number"),
        ({"non_linearity": "silly"}, "non_linearity 'silly': choose one of relu, swish, gelu, tanh"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        HoulsbyConfig(**settings)
