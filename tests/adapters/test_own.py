"""Training a model's own parameters: BitFit by its counts and against autograd, norms against PEFT, everything."""

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
from minift.adapters.method import Method, method_of
from minift.adapters.own import BitFitConfig, FullConfig, NormConfig
from minift.adapters.report import report, without_gradient
from minift.adapters.verbs import add_adapter, delete_method, load_adapter, save_adapter
from minift.quant.linear import QuantizedLinear

IDS = torch.arange(3, 27).view(2, 12)


def family(tmp_path: Path, name: str) -> Path:
    return checkpoints.checkpoint(tmp_path / "model", **checkpoints.FAMILY_NAMES[name])


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def randomize(model: nn.Module) -> None:
    for p in trained(model).values():
        with torch.no_grad():
            p.add_(0.2 * torch.randn(p.shape).to(p.dtype))


def loss(model: nn.Module) -> Tensor:
    logits = model(IDS)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    return logits.float().log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).mean()


# --- BitFit -----------------------------------------------------------------------------------------------------------

# d = 64, an MLP of 96 (GPT-2: 256), q of 64 and k, v of 32 each; OPT and GPT-2: as many key heads as query heads.
LLAMA = 64 + 2 * 32 + 64 + 96 + 96 + 64  # q, k, v, o, gate, up, down
BIASES = {
    "llama": 2 * LLAMA,
    "mistral": 2 * LLAMA,
    "smollm3": 2 * LLAMA,
    "gemma2": 2 * LLAMA,
    "phi3": 2 * LLAMA,  # the same numbers in fewer, larger vectors
    "qwen2": 2 * (64 + 2 * 32),  # those that it has
    # BitFit's formula, with an MLP of f: q, k, v, o, two norms (6 d), f + d for the MLP; no final norm in opt-350m.
    "opt": 2 * (6 * 64 + 96 + 64),
    "gpt2": 2 * 11 * 64 + 64,  # f = 4 d: 11 d a block; and the final norm
}


@pytest.mark.parametrize("name", BIASES)
def test_bitfit_trains_as_many_biases_as_the_formula_says(tmp_path: Path, name: str):
    folder = family(tmp_path, name)
    ours = minift.load_model(folder)
    before = ours(IDS)
    has_biases = name in ("qwen2", "opt", "gpt2")
    own = [key for key, _ in ours.named_parameters() if key.endswith(".bias")]
    assert bool(own) == has_biases
    add_adapter(ours, BitFitConfig())
    assert sum(p.numel() for p in trained(ours).values()) == BIASES[name]
    assert all(key.endswith(".bias") for key in trained(ours))
    assert not has_biases or list(trained(ours)) == own
    assert torch.equal(ours(IDS), before) or (ours(IDS) - before).abs().max() < 1e-5  # + 0 may take another kernel
    loss(ours).backward()
    assert without_gradient(ours) == []


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt2"])
def test_bitfits_gradients(tmp_path: Path, name: str):
    """As transformers' with the same biases: within 4 E of it, E its rounding error (checkpoints.assert_close). The
    gradient of k's bias is zero in theory where positions are not rotary, so an ulp of all gradients is added."""
    folder = family(tmp_path, name)
    ours, theirs = minift.load_model(folder, attention="eager"), checkpoints.load_theirs(folder, "eager")
    add_adapter(ours, BitFitConfig())
    randomize(ours)
    for key, p in trained(ours).items():
        module = theirs.get_submodule(key.rpartition(".")[0])
        module.bias = nn.Parameter(p.detach().clone())
    exact = checkpoints.in_fp64(theirs)
    found = []
    for model in (ours, theirs, exact):
        named = dict(model.named_parameters())
        logits = model(IDS) if model is ours else model(IDS).logits
        value = logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).mean()
        found.append(torch.autograd.grad(value, [named[key] for key in trained(ours)]))
    ulp = 2**-23 * max(float(grad.abs().max()) for grad in found[2])
    for key, mine, other, true in zip(trained(ours), *found, strict=True):
        assert (mine - other).abs().max() <= 4 * ((other - true).abs().max() + ulp), key


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_layer_trains_its_bias(tiny: Path, quantize: str, dtype: torch.dtype):
    """d loss / d b is the sum of dy over the rows; the bias has the dtype of the layers around it."""
    ours = minift.load_model(tiny, quantize, dtype=dtype)
    add_adapter(ours, BitFitConfig())
    layer = ours.model.layers[1].mlp.up_proj
    assert isinstance(layer, QuantizedLinear) and layer.bias is not None and layer.bias.dtype == dtype
    nn.init.normal_(layer.bias)
    x, dy = torch.randn(9, 64).to(dtype), torch.randn(9, 128).to(dtype)
    y = layer(x)
    y.backward(dy)
    bias, layer.bias = layer.bias, None
    # One rounding of the sum in the result's dtype, and in bf16 one of the product before it, of numbers below 16.
    unit = {torch.float32: 2**-24, torch.bfloat16: 2**-9}[dtype]
    assert (y - layer(x) - bias).abs().max() <= 2 * unit * max(float(y.abs().max()), float(layer(x).abs().max()))
    assert bias.grad is not None
    # A sum of 9 numbers, 8 roundings at most of the unit and sizes.
    error = (bias.grad.double() - dy.double().sum(0)).abs()
    assert (error <= 9 * unit * dy.double().abs().sum(0)).all()


def test_zero_biases_leave_again(tiny: Path):
    ours = minift.load_model(tiny, "nf4")
    before, names = ours(IDS), set(ours.state_dict())
    add_adapter(ours, BitFitConfig())
    randomize(ours)
    assert len(set(ours.state_dict()) - names) == 14 and not torch.equal(ours(IDS), before)
    delete_method(ours)
    assert set(ours.state_dict()) == names and torch.equal(ours(IDS), before)
    assert all(m.bias is None for m in ours.modules() if isinstance(m, QuantizedLinear | nn.Linear))


def test_narrow_embeddings_and_the_head_get_no_bias(tmp_path: Path):
    """opt-350m's project_in and project_out are no linears of blocks."""
    case = checkpoints.FAMILY_NAMES["opt"] | {"enable_bias": False, "layer_norm_elementwise_affine": False}
    ours = minift.load_model(checkpoints.checkpoint(tmp_path / "model", **case))
    add_adapter(ours, BitFitConfig())
    assert {name.split(".")[2] for name in trained(ours)} == {"layers"} and len(trained(ours)) == 2 * 6


# --- norms ------------------------------------------------------------------------------------------------------------

KNOWN = [name for name in checkpoints.FAMILY_NAMES if name not in ("phi3", "smollm3", "opt")]


def add_theirs(base: nn.Module, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, peft.LNTuningConfig(task_type="CAUSAL_LM", **settings))


def their_norms(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model.").replace("ln_tuning_layers.default.", ""): p
        for name, p in model.named_parameters()
        if ".ln_tuning_layers." in name
    }


@pytest.mark.parametrize("name", KNOWN)
def test_norms_equal_pefts(tmp_path: Path, name: str):
    """The same parameters by default, logits and gradients: within 4 E of PEFT's, E its rounding error."""
    folder = family(tmp_path, name)
    ours, theirs = minift.load_model(folder, attention="eager"), checkpoints.load_theirs(folder, "eager")
    add_adapter(ours, NormConfig())
    theirs = add_theirs(theirs).eval()
    assert trained(ours).keys() == their_norms(theirs).keys() and trained(ours)
    randomize(ours)
    for key, p in their_norms(theirs).items():
        p.data.copy_(trained(ours)[key])
    exact = copy.deepcopy(theirs).double()
    exact.base_model.model.set_attn_implementation("exact")
    found = []
    for model, parameters in ((ours, trained(ours)), (theirs, their_norms(theirs)), (exact, their_norms(exact))):
        logits = model(IDS) if model is ours else model(IDS).logits
        value = logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).mean()
        grads = torch.autograd.grad(value, [parameters[key] for key in trained(ours)])
        found.append([logits.detach(), *grads])
    for key, mine, other, true in zip(["logits", *trained(ours)], *found, strict=True):
        error = (other - true).abs().max()
        assert error < 1e-3, key
        assert (mine - other).abs().max() <= 4 * error + 2**-23 * true.abs().max(), key


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["input_layernorm"]},
        {"target_modules": ["norm", "layers.1.post_attention_layernorm"]},
        {"target_modules": r".*layers\.0\..*norm"},
        {"exclude_modules": ["norm"]},
        {"exclude_modules": r".*\.1\..*"},
    ],
    ids=str,
)
def test_norm_files_both_ways(tiny: Path, tmp_path: Path, settings: dict[str, Any]):
    peft = pytest.importorskip("peft")
    ours, theirs = minift.load_model(tiny), add_theirs(peers.peer_base(tiny, nf4=False), **settings)
    add_adapter(ours, NormConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}))
    assert trained(ours).keys() == their_norms(theirs).keys()
    randomize(ours)
    for key, p in their_norms(theirs).items():
        p.data.copy_(trained(ours)[key])
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    mine, other = (load_file(tmp_path / way / "adapter_model.safetensors") for way in ("ours", "theirs"))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    loaded = minift.load_model(tiny)
    load_adapter(loaded, tmp_path / "theirs")
    assert torch.equal(loaded(IDS), ours(IDS)) and not trained(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns about keys that match nothing, or are missing
        warnings.filterwarnings("ignore", "Unsupported layer type")
        again = peft.PeftModel.from_pretrained(peers.peer_base(tiny, nf4=False), tmp_path / "ours")
    assert torch.equal(again.eval()(IDS).logits, theirs.eval()(IDS).logits)
    contents = [json.loads((tmp_path / way / "adapter_config.json").read_text()) for way in ("ours", "theirs")]
    for content in contents:
        content.update(peft_version=None, auto_mapping=None)
        if isinstance(content["target_modules"], list):
            content["target_modules"] = sorted(content["target_modules"])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_norms_over_other_bases(tiny: Path, quantize: str | None, dtype: str):
    """Trained in the dtype that they have, as PEFT does; the gradient arrives through quantized layers."""
    pytest.importorskip("bitsandbytes")
    ours = minift.load_model(tiny, quantize, dtype=getattr(torch, dtype))
    add_adapter(ours, NormConfig())
    theirs = their_norms(add_theirs(peers.peer_base(tiny, nf4=quantize is not None, dtype=dtype)))
    assert {key: (p.dtype, p.shape) for key, p in trained(ours).items()} == {
        key: (p.dtype, p.shape) for key, p in theirs.items()
    }
    assert all(torch.equal(p, theirs[key]) for key, p in trained(ours).items())
    loss(ours).backward()
    assert without_gradient(ours) == []


@pytest.mark.parametrize("name", ["phi3", "smollm3", "opt"])
def test_norms_of_families_that_peft_does_not_list(tmp_path: Path, name: str):
    ours = minift.load_model(family(tmp_path, name))
    with pytest.raises(ValueError, match=rf"no usual norms to train in '{name}'.*target_modules, of .*norm"):
        add_adapter(ours, NormConfig())
    add_adapter(ours, NormConfig(target_modules=r".*norm"))
    assert all("norm" in key for key in trained(ours))
    assert len(trained(ours)) == {"phi3": 5, "smollm3": 5, "opt": 8}[name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("q_proj",)}, r"no norm matches target .*q_proj.*norms here: input_layernorm, norm, post"),
        ({"target_modules": ("norm", "ln_1")}, "no norm matches target .*ln_1"),
        ({"target_modules": ()}, "no norm matches"),
        ({"target_modules": "nothing"}, "no norm matches target .*nothing"),
        ({"exclude_modules": r".*"}, "leaves no norm"),
        ({"target_modules": "(norm"}, "norms target_modules '.norm' is not a regular expression"),
        ({"target_modules": 3}, "must be a string or a list of names, got 3"),
        ({"target_modules": "all-linear"}, "name norms"),
    ],
)
def test_norms_that_are_refused(tiny: Path, settings: dict[str, Any], message: str):
    ours = minift.load_model(tiny)
    with pytest.raises(ValueError, match=message):
        add_adapter(ours, NormConfig(**settings))
    assert len(trained(ours)) == len(list(ours.parameters()))


def test_norms_without_parameters(tmp_path: Path):
    case = checkpoints.FAMILY_CASES["opt, no biases, bare norms"]
    ours = minift.load_model(checkpoints.checkpoint(tmp_path / "model", **case))
    with pytest.raises(ValueError, match=r"no norm matches.*norms here: none"):
        add_adapter(ours, NormConfig(target_modules=r".*norm"))


# --- everything -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_trains_everything_in_its_dtype(request: pytest.FixtureRequest, name: str, dtype: torch.dtype):
    ours = minift.load_model(request.getfixturevalue(name), dtype=dtype)
    names = {key for key, _ in ours.named_parameters()}
    add_adapter(ours, FullConfig())
    assert trained(ours).keys() == names
    assert ("lm_head.weight" in names) == (name == "tiny_odd")  # a tied head is the embedding
    loss(ours).backward()
    assert without_gradient(ours) == []
    assert {p.grad.dtype for p in ours.parameters() if p.grad is not None} == {dtype}
    randomize(ours)
    learned = {key: p.detach().clone() for key, p in ours.named_parameters()}
    delete_method(ours)  # no second copy of the model is kept: what has been learned stays
    assert all(torch.equal(p, learned[key]) and not p.requires_grad for key, p in ours.named_parameters())
    assert not hasattr(ours, "originals")


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_full_refuses_a_quantized_model(tiny: Path, quantize: str):
    ours = minift.load_model(tiny, quantize)
    with pytest.raises(ValueError, match=rf"model.layers.0.self_attn.q_proj is quantized \({quantize}.*without quant"):
        add_adapter(ours, FullConfig())
    assert trained(ours) and getattr(ours, "method", None) is None


@pytest.mark.parametrize("method", [NormConfig(), FullConfig()])
def test_own_parameters_are_merged_by_being_kept(tiny: Path, tmp_path: Path, method: Method):
    ours = minift.load_model(tiny)
    add_adapter(ours, method)
    randomize(ours)
    names = set(trained(ours))
    assert set(method.merge(ours)) == names
    assert method_of(ours) is None and not trained(ours) and not hasattr(ours, "originals")
    minift.save_model(ours, tmp_path / "merged")
    assert torch.equal(minift.load_model(tmp_path / "merged")(IDS), ours(IDS))


def test_a_fully_trained_model_is_saved_as_a_model(tiny: Path, tmp_path: Path):
    """And BitFit's zero biases are not: no checkpoint of the architecture has a place for them."""
    ours = minift.load_model(tiny)
    add_adapter(ours, FullConfig())
    randomize(ours)
    minift.save_model(ours, tmp_path / "whole")
    assert torch.equal(minift.load_model(tmp_path / "whole")(IDS), ours(IDS))
    for quantize in (None, "nf4"):
        ours = minift.load_model(tiny, quantize)
        add_adapter(ours, BitFitConfig())
        with pytest.raises(ValueError, match=r"_proj\.bias is not part of a llama checkpoint"):
            minift.save_model(ours, tmp_path / "none")
        with pytest.raises(ValueError, match=r"bitfit cannot be merged: .* no place for .*q_proj\.bias"):
            BitFitConfig().merge(ours)
    ours = minift.load_model(tiny)
    add_adapter(ours, BitFitConfig())
    with pytest.raises(ValueError, match=r"q_proj\.bias"):
        minift.save_model(ours, tmp_path / "biased")


def test_the_reports(tiny: Path):
    ours = minift.load_model(tiny)
    add_adapter(ours, FullConfig())
    assert report(ours).share == 1 and report(ours).unmatched == ()
