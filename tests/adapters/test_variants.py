"""rsLoRA, DoRA and the ways to begin, against PEFT: initial values, logits, every gradient, and files both ways.

A model's numbers are compared as in test_lora.py: E is the distance of PEFT's fp32 numbers from its own in float64, and
ours may be 4 E from PEFT's. Quantized bases: the reference is PEFT in float64 over the weights that bitsandbytes
decodes.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from checkpoints import assert_as_close
from torch import Tensor, nn

import minift
from minift.adapters.inject import linear_layers, lora_layers
from minift.adapters.lora import LoraConfig, LoraLinear
from minift.quant import Linear4bit, QuantConfig

peft = pytest.importorskip("peft")

TARGETS = ("q_proj", "down_proj")
INITS = {"default": True, "random": False, "gaussian": "gaussian", "pissa": "pissa", "pissa_niter_2": "pissa_niter_2"}
FORMS: list[dict[str, Any]] = [
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True},
    {"init": "random"},
    {"init": "pissa"},
    {"init": "pissa", "use_dora": True},
]


def their_config(config: LoraConfig) -> Any:
    targets = config.target_modules
    assert targets is not None
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=INITS[config.init],  # pyright: ignore[reportArgumentType]
        task_type="CAUSAL_LM",
    )


def add_theirs(base: nn.Module, config: LoraConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, their_config(config))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if ".lora_" in n}


def randomize(ours: nn.Module, *theirs: nn.Module) -> None:
    """Other values for everything that is trained, the same in all models: zeros and |W| would hide mistakes."""
    for name, value in trained(ours).items():
        with torch.no_grad():
            value.mul_(1 + 0.3 * torch.rand_like(value)).add_(0.05 * torch.randn_like(value))
            for model in theirs:
                trained(model)[name].copy_(value)


def assert_model_equals_peft(ours: nn.Module, theirs: nn.Module, reference: nn.Module) -> None:
    ids = torch.randint(3, 380, (2, 17))
    assert trained(ours).keys() == trained(theirs).keys() == trained(reference).keys()
    runs = []
    for logits, parameters in [
        (ours(ids), trained(ours)),
        (theirs(ids).logits, trained(theirs)),
        (reference(ids).logits, trained(reference)),
    ]:
        gradients = torch.autograd.grad(logits.square().mean(), tuple(parameters.values()))
        runs.append({"logits": logits.detach()} | dict(zip(parameters, gradients, strict=True)))
    assert_as_close(*runs)


# --- the beginning ----------------------------------------------------------------------------------------------------


def randomized_slack(weight: Tensor, dtype: str) -> float:
    """How far two runs of the randomized method may be apart, relative to their largest number. It multiplies by W five
    times, sums of at most 131 terms, in an order that follows the addresses of its tensors; singular directions turn by
    such an error divided by the distance of neighbouring singular values. In bf16 the results are rounded on top."""
    values = torch.linalg.svdvals(weight.double())[:7]
    gap = ((values[:-1] - values[1:]) / values[0]).min().item()
    return 5 * 131 * 2**-24 / gap + (2**-7 if dtype == "bfloat16" else 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("init", INITS)
def test_a_seed_gives_pefts_initial_values(tiny_odd: Path, init: str, dtype: str):
    """The base's weights, too. Over bf16 PEFT gives A and B the base's dtype for a moment: its are ours, rounded."""
    config = LoraConfig(r=5, alpha=7, target_modules=TARGETS, init=init)
    ours = minift.load_model(tiny_odd, dtype=getattr(torch, dtype))
    base = peers.peer_base(tiny_odd, nf4=False, dtype=dtype)
    original = {path: ours.get_parameter(f"{path}.weight") for path in linear_layers(ours)}
    torch.manual_seed(4)
    minift.add_lora(ours, config)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    theirs = add_theirs(base, config)
    assert torch.equal(after, torch.get_rng_state())
    for name, value in trained(ours).items():
        other = trained(theirs)[name]
        assert value.dtype == other.dtype == torch.float32
        weight = original[name.partition(".lora_")[0]]
        slack = randomized_slack(weight, dtype) * other.abs().max() if "niter" in init else 0
        assert (value.to(getattr(torch, dtype)).float() - other).abs().max() <= slack, name
        assert value.any() or (".lora_B." in name and init in ("default", "gaussian"))
    for path, layer in lora_layers(ours).items():
        other = theirs.base_model.model.get_submodule(path).base_layer.weight
        assert layer.base.weight.dtype == other.dtype
        slack = randomized_slack(original[path], dtype) * other.abs().max() if "niter" in init else 0
        assert (layer.base.weight - other).abs().max() <= slack, path


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_dora_begins_with_the_sizes_of_the_rows(tiny: Path, quantize: str | None):
    config = LoraConfig(r=4, use_dora=True, target_modules=TARGETS, init="random")
    ours = minift.load_model(tiny, quantize and QuantConfig(double_quant=False))
    theirs = peers.peer_base(tiny, nf4=bool(quantize), double_quant=False)
    torch.manual_seed(1)
    minift.add_lora(ours, config)
    torch.manual_seed(1)
    theirs = add_theirs(theirs, config)
    for path, layer in lora_layers(ours).items():
        own, other = layer.magnitude("default"), trained(theirs)[f"{path}.lora_magnitude_vector.default.weight"]
        weight = layer.base_weight().double() + layer.configs["default"].scaling * (
            layer.matrices("default")[1].double() @ layer.matrices("default")[0].double()
        )
        assert own.dtype == torch.float32 and own.requires_grad
        # A root of a sum of i squares of sums of r + 1 terms: u = 2^-24 for each of i / 2 + r + 3 roundings at most.
        bound = (layer.in_features / 2 + 7) * 2**-24
        exact = weight.norm(dim=1)
        # Rows may cancel; the terms' sizes bound what their sums are off by.
        size = exact + layer.configs["default"].scaling * (
            layer.matrices("default")[1].double().abs() @ layer.matrices("default")[0].double().abs()
        ).norm(dim=1)
        assert ((own - exact).abs() <= bound * size).all()
        assert ((own - other).abs() <= 2 * bound * size).all()


def test_a_begins_normal_with_deviation_one_over_r():
    layer = LoraLinear(nn.Linear(4000, 3))
    layer.add("default", LoraConfig(r=10, init="gaussian"))
    a_ri, b_or = layer.matrices("default")
    # 40000 squares of deviation 1/10: their mean is off by sqrt(2 / 40000) / 100 a deviation.
    assert abs(a_ri.square().mean().item() - 1 / 100) <= 5 * (2 / 40000) ** 0.5 / 100
    assert not b_or.any()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_pissa_moves_a_part_of_the_weight_and_keeps_the_sum(init: str):
    base = nn.Linear(40, 30).requires_grad_(False)
    before = base.weight.clone()
    singular = torch.linalg.svdvals(before.double())
    layer = LoraLinear(base)
    layer.add("default", LoraConfig(r=6, alpha=18, init=init))
    delta = layer.delta("default")
    # Two sums of at most 6 + 1 terms, rounded in fp32.
    assert torch.allclose(layer.base_weight() + delta, before, rtol=0, atol=16 * 2**-24 * before.abs().max().item())
    found = torch.linalg.svdvals(delta.double())
    assert found[6] < 1e-6  # rank 6
    # Exact up to fp32 rounding (100 roundings); the randomized method finds at least 9 tenths of each value.
    least = singular[:6] * (1 - 100 * 2**-24 if init == "pissa" else 0.9)
    assert (found[:6] >= least).all() and (found[:6] <= singular[:6] * (1 + 100 * 2**-24)).all()
    assert base.weight is not layer.base.weight and torch.equal(base.weight, before)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_repairs_what_nf4_loses(iterations: int):
    """Against bitsandbytes' quantizer and numpy's singular values."""
    import numpy

    functional = pytest.importorskip("bitsandbytes").functional
    base = nn.Linear(128, 64).requires_grad_(False)
    weight = base.weight.clone()
    layer = LoraLinear(base)
    layer.add("default", LoraConfig(r=8, alpha=8, init="loftq", loftq_iterations=iterations))
    residual = weight
    for _ in range(iterations):
        packed, state = functional.quantize_4bit(residual, quant_type="nf4", blocksize=64)
        decoded = functional.dequantize_4bit(packed, state)
        u, s, vh = numpy.linalg.svd((weight - decoded).double().numpy(), full_matrices=False)
        repair = torch.from_numpy((u[:, :8] * s[:8]) @ vh[:8]).float()
        residual = weight - repair
    assert isinstance(layer.base, Linear4bit) and layer.base.nested_absmax is None
    # In later rounds the scales differ in their last bits, and a residual may lie on the edge of two codes: at most one
    # in a thousand, each off by a code, which is more than 1e-3 of the largest number.
    different = (layer.base.dequantize() - decoded).abs() > (1e-3 * decoded.abs().max() if iterations > 1 else 0)
    assert different.double().mean() <= (1e-3 if iterations > 1 else 0)
    assert (layer.delta("default") - repair).abs().max() <= 1e-2 * repair.abs().max()
    plain = (weight - functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))).norm()
    assert (weight - layer.base_weight() - layer.delta("default")).norm() < 0.9 * plain


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "loftq"])
def test_a_start_from_weights_that_are_gone_is_refused_and_nothing_changes(tiny: Path, init: str):
    quantized, adapted, narrow = minift.load_model(tiny, "nf4"), minift.load_model(tiny), minift.load_model(tiny)
    minift.add_lora(adapted, LoraConfig(r=2, target_modules=("down_proj",)), adapter="first")
    for model, r, message in [(quantized, 2, "is quantized"), (adapted, 2, "an adapter already"), (narrow, 65, "65")]:
        before = {name: (value, value.requires_grad) for name, value in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            minift.add_lora(model, LoraConfig(r=r, target_modules=("q_proj", "down_proj"), init=init))
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(after[n] is p and p.requires_grad == flag for n, (p, flag) in before.items())


# --- forward and backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_a_model_in_fp32_equals_peft(request: pytest.FixtureRequest, name: str, options: dict[str, Any]):
    folder = request.getfixturevalue(name)
    config = LoraConfig(r=6, alpha=9, target_modules=TARGETS, **options)
    ours, theirs = minift.load_model(folder), add_theirs(peers.peer_base(folder, nf4=False), config)
    minift.add_lora(ours, config)
    randomize(ours, theirs)
    assert_model_equals_peft(ours, theirs, copy.deepcopy(theirs).double())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_model_over_nf4_equals_peft_over_bitsandbytes(tiny: Path, options: dict[str, Any]):
    """Training mode, no double quantization (see test_lora.py)."""
    pytest.importorskip("bitsandbytes")
    config = LoraConfig(r=6, alpha=9, target_modules=TARGETS, **options)
    ours = minift.load_model(tiny, QuantConfig(double_quant=False)).train()
    minift.add_lora(ours, config)
    theirs = add_theirs(peers.peer_base(tiny, double_quant=False), config)
    weights = peers.peer_nf4_weights(tiny, double_quant=False)
    reference = add_theirs(peers.peer_base(tiny, weights=weights), config).double()
    randomize(ours, theirs, reference)
    assert_model_equals_peft(ours, theirs, reference)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dora_layer_with_and_without_bias(dtype: torch.dtype, bias: bool):
    """Against PEFT (forward and every gradient) and the formula in float64. In bf16 the base's output, the two thin
    products, their factors and the sum are rounded, u = 2^-8 of the size of the terms each, seven roundings at most;
    sums of k terms cost k * 2^-24 more."""
    base = nn.Linear(24, 10, bias=bias).requires_grad_(False).to(dtype)
    layer = LoraLinear(base)
    layer.add("default", LoraConfig(r=3, alpha=5, use_dora=True, init="random"))
    randomize(layer)
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(base)),
        peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["0"]),
    )
    own = layer.tensors("default").values()
    others = [p for n, p in theirs.named_parameters() if ".lora_" in n]
    for mine, other in zip(own, others, strict=True):
        other.data.copy_(mine)
    x, dy = torch.randn(7, 24, dtype=dtype, requires_grad=True), torch.randn(7, 10, dtype=dtype)
    y, y_theirs = layer(x), theirs(x)
    assert y.dtype == dtype
    a, b, m = (p.detach().double().requires_grad_() for p in own)
    w, x_exact = base.weight.double(), x.detach().double().requires_grad_()
    moved = w + 5 / 3 * b @ a
    gain = m / moved.detach().norm(dim=1)
    offset = base.bias.double() if bias else torch.zeros(10, dtype=torch.float64)
    exact_y = x_exact @ moved.T * gain + offset
    size_y = (x.detach().double().abs() @ (w.abs() + 5 / 3 * b.abs() @ a.abs()).T) * (gain.abs() + 1) + 2 * offset.abs()
    exact = [exact_y, *torch.autograd.grad(exact_y, (x_exact, a, b, m), dy.double())]
    mine = [y, *torch.autograd.grad(y, (x, *own), dy)]
    other = [y_theirs, *torch.autograd.grad(y_theirs, (x, *others), dy)]
    unit = 7 * (2**-8 if dtype == torch.bfloat16 else 2**-24) + 60 * 2**-24
    assert ((y - exact_y).abs() <= unit * size_y).all()
    for found, peer, value in zip(mine, other, exact, strict=True):
        # Gradients are sums of at most 24 * 10 terms of mixed sign; their size is bounded by their largest number
        # times 8, which the float64 magnitudes of this seed stay below.
        assert found.dtype == peer.dtype
        assert (found - value).abs().max() <= 8 * unit * value.abs().max()
        assert (found.double() - peer.double()).abs().max() <= 16 * unit * value.abs().max()


def test_doras_norm_gets_no_gradient_and_its_merge_is_its_forward(tiny: Path):
    ours = minift.load_model(tiny)
    minift.add_lora(ours, LoraConfig(r=4, use_dora=True, dropout=0.4))
    randomize(ours)
    ours = ours.double().eval()
    ids = torch.randint(3, 380, (2, 9))
    before = ours(ids)
    # The merged weights are computed in fp32 and rounded to it: 2^-24 of a number, in each of 14 layers in a row.
    assert len(minift.merge_lora(ours)) == 14
    assert (ours(ids) - before).abs().max() <= 1e-4 * before.abs().max()


def test_dropout_with_dora_draws_what_peft_draws(tiny: Path):
    """With dropout PEFT computes the base's part of DoRA from the dropped input, too."""
    config = LoraConfig(r=4, use_dora=True, dropout=0.3, target_modules=TARGETS)
    ours, theirs = minift.load_model(tiny).train(), add_theirs(peers.peer_base(tiny, nf4=False), config).train()
    minift.add_lora(ours, config)
    randomize(ours, theirs)
    ids = torch.randint(3, 380, (2, 9))
    torch.manual_seed(5)
    mine = ours(ids)
    torch.manual_seed(5)
    other = theirs(ids).logits
    moved = (copy.deepcopy(theirs).eval()(ids).logits - other).abs().max()
    assert moved > 0.1 and (mine - other).abs().max() <= 1e-4 * moved


# --- files ------------------------------------------------------------------------------------------------------------


def assert_same_logits(ours: minift.CausalLM, theirs: Any) -> None:
    ids = torch.randint(3, 380, (2, 15))
    with torch.no_grad():
        expected, exact = theirs(ids).logits, copy.deepcopy(theirs).double()(ids).logits
        assert (ours(ids) - expected).abs().max() <= 4 * (expected - exact).abs().max()


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_files_both_ways(tiny: Path, tmp_path: Path, options: dict[str, Any]):
    """PiSSA's base weights are computed again from the original ones, on both sides."""
    config = LoraConfig(r=4, alpha=6, target_modules=TARGETS, **options)
    ours = minift.load_model(tiny)
    minift.add_lora(ours, config)
    randomize(ours)
    minift.save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(peers.peer_base(tiny, nf4=False), tmp_path / "ours").eval()
    assert_same_logits(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = minift.load_model(tiny)
    minift.load_adapter(again, tmp_path / "theirs", adapter="other")
    loaded = next(iter(lora_layers(again).values())).given["other"]
    assert (loaded.use_dora, loaded.use_rslora, loaded.scaling) == (config.use_dora, config.use_rslora, config.scaling)
    assert_same_logits(again, theirs)
    with torch.no_grad():
        ids = torch.randint(3, 380, (1, 9))
        assert (minift.load_model(tiny)(ids) - again(ids)).abs().max() > 1e-2


def test_a_loftq_adapter_comes_back_on_the_original_model(tiny: Path, tmp_path: Path):
    config = LoraConfig(r=4, alpha=4, target_modules=TARGETS, init="loftq", loftq_iterations=2)
    ours = minift.load_model(tiny)
    minift.add_lora(ours, config)
    randomize(ours)
    minift.save_adapter(ours, tmp_path / "saved")
    again = minift.load_model(tiny)
    minift.load_adapter(again, tmp_path / "saved")
    ids = torch.randint(3, 380, (1, 9))
    assert torch.equal(ours(ids), again(ids))
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] == "loftq"
    assert settings["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 2}
    with pytest.raises(ValueError, match="is quantized"):
        minift.load_adapter(minift.load_model(tiny, "nf4"), tmp_path / "saved")


def test_a_start_that_cannot_be_computed_again_is_not_saved(tiny: Path, tmp_path: Path):
    ours = minift.load_model(tiny)
    minift.add_lora(ours, LoraConfig(r=4, init="pissa_niter_2"))
    with pytest.raises(ValueError, match=r"'pissa_niter_2'.*random"):
        minift.save_adapter(ours, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
