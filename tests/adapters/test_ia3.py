"""IA3 against PEFT: which layers, initial values, forward, every gradient, merging, and files both ways."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import checkpoints
import peers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import minift
from minift.adapters.ia3 import IA3Config, IA3Linear, ia3_layers, merge_ia3
from minift.adapters.verbs import add_adapter, delete_method, load_adapter, save_adapter
from minift.quant.linear import Linear4bit, Linear8bit, QuantizedLinear

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 25).view(2, 11)


def add_theirs(base: nn.Module, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM", **settings))


def their_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model.").removesuffix(".default"): p
        for name, p in model.named_parameters()
        if ".ia3_l." in name
    }


def our_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{path}.ia3_l": layer.ia3_l for path, layer in ia3_layers(model).items()}


def randomize(ours: nn.Module, *theirs: nn.Module) -> None:
    for name, p in our_factors(ours).items():
        with torch.no_grad():
            p.normal_(mean=1.0, std=0.3)
            for model in theirs:
                their_factors(model)[name].copy_(p)


def pair(folder: Path, quantize: str | None = None, **settings: Any) -> tuple[minift.CausalLM, Any]:
    """The same model with the same random factors in both libraries."""
    # Without double quantization: bitsandbytes' nested codes come from a coarse table on the CPU.
    format = minift.QuantConfig(double_quant=False) if quantize else None
    ours = minift.load_model(folder, format)
    theirs = peers.peer_base(folder, nf4=quantize is not None, double_quant=False)
    add_adapter(ours, IA3Config(**settings))
    theirs = add_theirs(theirs, **settings)
    randomize(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_a_seed_gives_pefts_initial_values(request: pytest.FixtureRequest, name: str, ones: bool):
    folder = request.getfixturevalue(name)
    ours, base = minift.load_model(folder), peers.peer_base(folder, nf4=False)
    torch.manual_seed(5)
    add_adapter(ours, IA3Config(init_ia3_weights=ones))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    theirs = their_factors(add_theirs(base, init_ia3_weights=ones))
    assert torch.equal(after, torch.get_rng_state())
    assert our_factors(ours).keys() == theirs.keys()
    for key, p in our_factors(ours).items():
        assert torch.equal(p, theirs[key]) and bool((p == 1).all()) == ones, key
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == our_factors(ours).keys()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": []},
        {"target_modules": ["k_proj", "o_proj"]},
        {"target_modules": r".*layers\.1\..*(k|down)_proj", "feedforward_modules": r".*down_proj"},
        {"target_modules": "all-linear", "feedforward_modules": ["mlp.down_proj"]},
        {"target_modules": ["k_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]},
        {"target_modules": ["k_proj", "down_proj"], "exclude_modules": r".*\.0\..*"},
        # An end without a dot before it: also of o_proj, as PEFT has it.
        {"target_modules": "all-linear", "feedforward_modules": ["o_proj", "n_proj"]},
    ],
    ids=str,
)
def test_the_same_layers_as_peft(tiny: Path, settings: dict[str, Any]):
    ours = minift.load_model(tiny)
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    add_adapter(ours, IA3Config(**given))
    theirs = their_factors(add_theirs(peers.peer_base(tiny, nf4=False), **settings))
    assert {key: p.shape for key, p in our_factors(ours).items()} == {key: p.shape for key, p in theirs.items()}


FAMILIES = {name: case for name, case in checkpoints.FAMILY_NAMES.items() if name not in ("phi3", "smollm3")}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_by_default(tmp_path: Path, family: str):
    """PEFT's table, its shapes (GPT-2's linears are stored the other way round there), and its logits.

    Bound: 4 E, E the distance of PEFT's fp32 logits from the same in float64 (checkpoints.assert_close)."""
    folder = checkpoints.checkpoint(tmp_path / "model", **FAMILIES[family])
    ours, theirs = minift.load_model(folder, attention="eager"), checkpoints.load_theirs(folder, "eager")
    add_adapter(ours, IA3Config())
    theirs = add_theirs(theirs).eval()
    assert {k: p.shape for k, p in our_factors(ours).items()} == {k: p.shape for k, p in their_factors(theirs).items()}
    randomize(ours, theirs)
    with torch.no_grad():
        expected, exact = theirs(IDS).logits, checkpoints.in_fp64(theirs.base_model.model)(IDS).logits
        difference = (ours(IDS) - expected).abs().max()
    assert difference <= 4 * (expected - exact).abs().max() < 1e-3


@pytest.mark.parametrize("family", ["phi3", "smollm3"])
def test_a_family_without_a_usual_place(tmp_path: Path, family: str):
    ours = minift.load_model(checkpoints.checkpoint(tmp_path / "model", **checkpoints.FAMILY_NAMES[family]))
    before = [p.requires_grad for p in ours.parameters()]
    with pytest.raises(ValueError, match=rf"IA3 in '{family}'.*target_modules and feedforward_modules"):
        add_adapter(ours, IA3Config())
    with pytest.raises(ValueError, match=r"name feedforward_modules: "):
        add_adapter(ours, IA3Config(target_modules=("o_proj", "down_proj")))
    assert [p.requires_grad for p in ours.parameters()] == before and ours(IDS).requires_grad
    first = "qkv_proj" if family == "phi3" else "k_proj"
    add_adapter(ours, IA3Config(target_modules=(first, "down_proj"), feedforward_modules=("down_proj",)))
    assert len(ia3_layers(ours)) == 2 * ours.config.num_hidden_layers


@pytest.mark.parametrize(("name", "quantize"), [("tiny", None), ("tiny_odd", None), ("tiny", "nf4")])
def test_logits_and_gradients_equal_pefts(request: pytest.FixtureRequest, name: str, quantize: str | None):
    """Within 4 E, E the rounding error of PEFT's own (with dequantized weights in float64 it is the same formula)."""
    folder = request.getfixturevalue(name)
    ours, theirs = pair(folder, quantize)
    if quantize:
        base = peers.peer_base(folder, nf4=False, weights=peers.peer_nf4_weights(folder, double_quant=False))
        exact = add_theirs(base)
        for key, p in their_factors(exact).items():
            p.data.copy_(their_factors(theirs)[key])
        exact = exact.double()
    else:
        exact = copy.deepcopy(theirs).double()
    found = []
    for run, factors in ((ours, our_factors(ours)), (theirs, their_factors(theirs)), (exact, their_factors(exact))):
        logits = run(IDS)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        loss = logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).mean()
        grads = torch.autograd.grad(loss, list(factors.values()))
        found.append({"logits": logits.detach()} | dict(zip(factors, grads, strict=True)))
    mine, other, true = found
    assert mine.keys() == other.keys() and len(mine) == 7
    for key in mine:
        error = (other[key] - true[key]).abs().max()
        assert 0 < error < 1e-4, key
        # A gradient of one factor is a sum over few numbers: E of one tensor is a small sample, so 4 of it and an ulp.
        bound = 4 * error + 2**-23 * true[key].abs().max()
        assert (mine[key] - other[key]).abs().max() <= bound, key
    assert (mine["logits"] - minift.load_model(folder, quantize)(IDS)).abs().max() > 0.01


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_equals_pefts_bit_for_bit(dtype: torch.dtype, on_input: bool):
    """The same operations in the same order: the product in fp32, one rounding; and so back."""
    base = nn.Linear(37, 23).to(dtype).requires_grad_(False)
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(base)),
        peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if on_input else []),
    )
    ours = IA3Linear(base, on_input)
    (factors,) = their_factors(theirs).values()
    assert ours.ia3_l.shape == factors.shape and factors.dtype == torch.float32
    with torch.no_grad():
        ours.ia3_l.normal_(mean=1.0)
        factors.copy_(ours.ia3_l)
    results = []
    x, dy = torch.randn(3, 5, 37), torch.randn(3, 5, 23).to(dtype)
    for module, p in ((ours, ours.ia3_l), (theirs, factors)):
        given = x.to(dtype).requires_grad_()
        y = module(given)
        y.backward(dy)
        assert given.grad is not None and p.grad is not None and y.dtype == dtype
        results.append((y.detach(), given.grad, p.grad))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("on_input", [False, True])
def test_a_bf16_layer_in_4_bits(on_input: bool):
    """PEFT returns fp32 here (and attention then refuses it): ours is that, rounded to bf16 (module docstring)."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, 128).bfloat16()
    theirs = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(weight, False, quant_type="nf4", compress_statistics=False)
    model = nn.Sequential(theirs.to("cpu"))
    model.is_loaded_in_4bit = True  # pyright: ignore
    feedforward = ["0"] if on_input else []
    theirs = peft.get_peft_model(model, peft.IA3Config(target_modules=["0"], feedforward_modules=feedforward))
    base = nn.Linear(128, 64, bias=False)
    base.weight.data.copy_(weight)
    ours = IA3Linear(Linear4bit.from_linear(base.bfloat16(), minift.QuantConfig(double_quant=False)), on_input)
    (factors,) = their_factors(theirs).values()
    with torch.no_grad():
        ours.ia3_l.normal_(mean=1.0)
        factors.copy_(ours.ia3_l)
    x = torch.randn(40, 128).bfloat16()
    expected, y = theirs.train()(x), ours(x)
    assert expected.dtype == torch.float32 and y.dtype == torch.bfloat16
    # On the input theirs rounds l x to bf16, too (to the compute dtype), so the products are the same; on the output
    # the one rounding to bf16 is ours alone.
    assert torch.equal(y, expected.bfloat16())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_input", [False, True])
def test_merging_equals_pefts(on_input: bool, dtype: torch.dtype, bias: bool):
    base = nn.Linear(37, 23, bias=bias).to(dtype).requires_grad_(False)
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(base)),
        peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if on_input else []),
    )
    ours = nn.Sequential(IA3Linear(base, on_input))
    (factors,), (mine,) = their_factors(theirs).values(), our_factors(ours).values()
    with torch.no_grad():
        mine.normal_(mean=1.0)
        factors.copy_(mine)
    merged = theirs.merge_and_unload()[0]
    assert merge_ia3(ours) == ["0"]  # pyright: ignore[reportArgumentType]
    assert type(ours[0]) is nn.Linear
    for other, own in zip(merged.parameters(), ours[0].parameters(), strict=True):
        assert torch.equal(own, other) and own.dtype == dtype and not own.requires_grad


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_merged_and_unmerged_logits(tiny: Path, quantize: str | None):
    """4 and 8 bits are decoded. An int8 layer also rounds x to 8 bits, which the merged one does not."""
    ours = minift.load_model(tiny, quantize)
    add_adapter(ours, IA3Config())
    randomize(ours)
    kept = ia3_layers(ours)
    decoded = {
        path: layer.base.plain() if isinstance(layer.base, QuantizedLinear) else layer.base
        for path, layer in kept.items()
    }
    before = ours(IDS)
    paths = merge_ia3(ours)
    assert paths == list(kept) and ours.method is None
    for path, layer in kept.items():
        # W' x and W (l x) are sums of n = 64 or 128 products of three factors each: at most (n + 3) roundings of fp32.
        x = torch.randn(9, layer.base.in_features)
        weight = decoded[path].weight.double() * layer.ia3_l.double()
        size = (x.double().abs() @ weight.abs().T).max()
        expected = x.double() @ weight.T
        merged = ours.get_submodule(path)
        assert (merged(x).double() - expected).abs().max() <= (layer.base.in_features + 3) * 2**-24 * size
    if quantize != "int8":
        # Each of the 14 layers behind the first factor passes on an error at rounding level (2^-24 a rounding of sums
        # of about 100): 1e-4 is far below what a missing factor (0.3 of a weight) would do.
        assert (ours(IDS) - before).abs().max() < 1e-4
    with pytest.raises(ValueError, match="no IA3"):
        merge_ia3(ours)


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bit])
def test_removing_gives_the_same_layers_back(tiny: Path, kind: type):
    ours = minift.load_model(tiny, "nf4" if kind is Linear4bit else "int8")
    before = dict(ours.named_modules())
    expected = ours(IDS)
    add_adapter(ours, IA3Config())
    randomize(ours)
    assert not torch.equal(ours(IDS), expected)
    delete_method(ours)
    assert {path: id(m) for path, m in ours.named_modules()} == {path: id(m) for path, m in before.items()}
    assert torch.equal(ours(IDS), expected)


# --- files ------------------------------------------------------------------------------------------------------------

SAVED = [
    {},
    {"target_modules": ("k_proj", "up_proj"), "feedforward_modules": ("up_proj",)},
    {"target_modules": r".*layers\.1\..*(k|down)_proj", "feedforward_modules": r".*down_proj"},
    {"target_modules": ("k_proj",)},
    {"target_modules": ("k_proj", "v_proj"), "exclude_modules": ("layers.0.self_attn.k_proj",)},
]


def their_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


@pytest.mark.parametrize("settings", SAVED, ids=str)
def test_peft_reads_what_is_saved_here(tiny: Path, tmp_path: Path, settings: dict[str, Any]):
    ours, theirs = pair(tiny, **settings)
    save_adapter(ours, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns about keys that match nothing, or are missing
        again = peft.PeftModel.from_pretrained(peers.peer_base(tiny, nf4=False), tmp_path / "saved")
    assert {key: p.shape for key, p in their_factors(again).items()} == {
        key: p.shape for key, p in their_factors(theirs).items()
    }
    for key, p in their_factors(again).items():
        assert torch.equal(p, their_factors(theirs)[key]), key
    assert torch.equal(again.eval()(IDS).logits, theirs.eval()(IDS).logits)


@pytest.mark.parametrize("settings", SAVED[:3], ids=str)
def test_what_peft_saves_is_read_here(tiny: Path, tmp_path: Path, settings: dict[str, Any]):
    ours, theirs = pair(tiny, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    mine, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {key: t.shape for key, t in mine.items()} == {key: t.shape for key, t in other.items()}
    loaded = minift.load_model(tiny)
    assert load_adapter(loaded, tmp_path / "theirs") == "default"
    assert torch.equal(loaded(IDS), ours(IDS))
    assert not any(p.requires_grad for p in loaded.parameters())
    contents = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    for content in contents:
        for key, value in content.items():
            content[key] = sorted(value) if isinstance(value, list) else value
        content.update(peft_version=None, auto_mapping=None)
    assert contents[0] == contents[1]


def test_gpt2_both_ways(tmp_path: Path):
    folder = checkpoints.checkpoint(tmp_path / "model", **checkpoints.FAMILY_NAMES["gpt2"])
    ours, theirs = minift.load_model(folder), add_theirs(checkpoints.load_theirs(folder, "sdpa")).eval()
    add_adapter(ours, IA3Config())
    randomize(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = minift.load_model(folder)
    load_adapter(loaded, tmp_path / "theirs")
    assert torch.equal(loaded(IDS), ours(IDS))
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(checkpoints.load_theirs(folder, "sdpa"), tmp_path / "ours").eval()
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"something_new": 3}, "something_new=3 is not supported"),
        ({"target_modules": ["q_proj"], "feedforward_modules": []}, "has no place for"),
        ({"target_modules": ["x_proj"], "feedforward_modules": []}, "no .*layer matches"),
        ({"feedforward_modules": ["gate_proj"]}, "must be among target_modules"),
        ({"target_modules": 5}, "target_modules must be a string or a list of names, got 5"),
        ({"target_modules": "(k_proj"}, "is not a regular expression"),
        # Other shapes: k_proj's factors would stand at its input, [1, 64] for [32, 1].
        ({"feedforward_modules": ["k_proj"]}, "shape"),
    ],
)
def test_settings_that_are_refused(tiny: Path, tmp_path: Path, change: dict[str, Any], message: str):
    ours, _ = pair(tiny)
    save_adapter(ours, tmp_path / "saved")
    path = tmp_path / "saved" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = minift.load_model(tiny)
    expected = model(IDS).detach()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "saved")
    assert torch.equal(model(IDS), expected) and model(IDS).requires_grad and not ia3_layers(model)
