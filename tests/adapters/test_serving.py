"""Rows of one batch with adapters of their own: against separate calls, and against PEFT's adapter_names.

E is the distance of fp32 logits from the same model's in float64: one sample of what rounding does. Two results that
differ by rounding only may be off by E each, so by 4 E (as in test_lora.py).
"""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

import minift
from minift.adapters.lora import LoraConfig, LoraLinear
from minift.adapters.many import set_adapter
from minift.adapters.serving import adapters_of_rows
from minift.model.generate import generate_batch, generate_tokens
from minift.quant.config import QuantConfig

# Different ranks, scalings, layers and kinds; dropout, which must be off.
CONFIGS = {
    "a": LoraConfig(r=3, alpha=6, target_modules=("q_proj", "up_proj")),
    "b": LoraConfig(r=5, alpha=5, target_modules=("q_proj", "down_proj"), use_dora=True),
    "c": LoraConfig(r=2, alpha=4, dropout=0.5),
    "d": LoraConfig(r=8, alpha=3, target_modules=("v_proj", "o_proj"), use_rslora=True),
    "e": LoraConfig(r=1, alpha=1, target_modules=("gate_proj",)),
    "f": LoraConfig(r=4, alpha=8, rank_pattern={"k_proj": 6}, target_modules=("k_proj", "up_proj")),
    "g": LoraConfig(r=3, alpha=6, use_dora=True),
    "h": LoraConfig(r=2, alpha=2, target_modules=("up_proj",), layers_to_transform=(1,)),
}
MIXED = ["h", "a", None, "c", "a", "b", "g", "d", "e", "f", "b"]


def serving(
    folder: Path, quantize: str | QuantConfig | None = None, configs: dict[str, LoraConfig] = CONFIGS
) -> minift.CausalLM:
    model = minift.load_model(folder, quantize)
    for name, config in configs.items():
        minift.add_lora(model, config, name)
    randomize(model)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if ".lora_" in n}


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for value in trained(model).values():
        value.mul_(1 + 0.2 * torch.rand_like(value)).add_(0.1 * torch.randn_like(value))


@torch.no_grad()
def separately(model: minift.CausalLM, names: Sequence[str | None], ids: Tensor) -> Tensor:
    """Each row in a call of its own, with its adapter switched on for the whole model."""
    rows = []
    for name, row in zip(names, ids, strict=True):
        set_adapter(model, [name] if name else [], trainable=False)
        rows.append(model(row.unsqueeze(0)))
    return torch.cat(rows)


@pytest.mark.parametrize("quantize", [None, "nf4", QuantConfig("fp4", double_quant=False)], ids=str)
def test_one_forward_equals_separate_ones(tiny: Path, quantize: str | QuantConfig | None):
    """Eight adapters and the base in eleven rows. In float64 nothing else is left, so no row takes a wrong share."""
    model = serving(tiny, quantize)
    ids = torch.randint(3, 380, (len(MIXED), 9))
    expected = separately(model, MIXED, ids)
    if quantize is None:
        doubled = copy.deepcopy(model).double()
        exact = separately(doubled, MIXED, ids)
        error = (expected - exact).abs().max()
        with torch.no_grad(), adapters_of_rows(doubled, MIXED):
            assert (doubled(ids) - exact).abs().max() <= 1e-6 * error  # 2^-53 instead of 2^-24, with room
    else:
        error = (expected - separately(serving_in_float64(model), MIXED, ids)).abs().max()
    with torch.no_grad(), adapters_of_rows(model, MIXED):
        mixed = model(ids)
    assert (mixed - expected).abs().max() <= 4 * error
    for row in range(1, len(MIXED)):  # and each row's adapter matters
        others = separately(model, MIXED[row:] + MIXED[:row], ids)
        differs = [MIXED[row:][i] != MIXED[i] if i < len(MIXED) - row else False for i in range(len(MIXED))]
        assert ((others - mixed).abs().amax((1, 2))[torch.tensor(differs)] > 100 * error).all()


def serving_in_float64(model: minift.CausalLM) -> minift.CausalLM:
    """The same numbers in float64: decoded weights instead of quantized ones."""
    exact = copy.deepcopy(model)
    for layer in [module for module in exact.modules() if isinstance(module, LoraLinear)]:
        weight_oi = layer.base_weight()
        layer.base = nn.Linear(layer.in_features, layer.out_features, bias=False)
        layer.base.weight = nn.Parameter(weight_oi, requires_grad=False)
    return exact.double()


def test_alike_rows_are_set_adapter_to_the_bit(tiny: Path):
    """The same products of the same shapes; and without any name the model is the original one."""
    model, ids = serving(tiny), torch.randint(3, 380, (5, 7))
    with torch.no_grad():
        for name in CONFIGS:
            set_adapter(model, name)
            expected = model(ids)
            set_adapter(model, list(CONFIGS))
            with adapters_of_rows(model, [name] * 5):
                assert torch.equal(model(ids), expected)
        with adapters_of_rows(model, [None] * 5):
            assert torch.equal(model(ids), minift.load_model(tiny)(ids))


def test_a_group_is_computed_as_in_a_batch_of_its_own():
    """For one base output, the rows of an adapter are exactly the two thin products over these rows, written out."""
    layer = LoraLinear(nn.Linear(24, 10).requires_grad_(False))
    for name, config in {"one": LoraConfig(r=2, alpha=3), "two": LoraConfig(r=5, alpha=4)}.items():
        layer.add(name, config)
    randomize(layer)
    model = nn.Sequential(layer).eval()
    names, x = ["two", None, "one", "two"], torch.randn(4, 3, 24)
    with torch.no_grad(), adapters_of_rows(model, names):
        y, base_y = model(x), layer.base(x)
        for name, scaling in (("one", 1.5), ("two", 0.8)):
            rows = [i for i, own in enumerate(names) if own == name]
            a_ri, b_or = layer.matrices(name)
            t_nr = x[rows].flatten(0, 1) @ a_ri.T
            expected = torch.addmm(base_y[rows].flatten(0, 1), t_nr, b_or.T, alpha=scaling)
            assert torch.equal(y[rows].flatten(0, 1), expected)
        assert torch.equal(y[1], base_y[1])


@pytest.mark.parametrize("nf4", [False, True])
def test_logits_are_pefts(tiny: Path, nf4: bool):
    peft = pytest.importorskip("peft")
    configs = {name: CONFIGS[name] for name in ("a", "d", "h")}  # no DoRA, which PEFT refuses in mixed batches
    # Without double quantization: on a CPU bitsandbytes rounds the scales' scales by a table of its own.
    ours = serving(tiny, QuantConfig(double_quant=False) if nf4 else None, configs)
    theirs: Any = peers.peer_base(tiny, nf4=nf4, double_quant=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in configs.items():
            settings = peft.LoraConfig(
                r=config.r, lora_alpha=config.alpha, target_modules=list(config.target_modules or ()),
                use_rslora=config.use_rslora, task_type="CAUSAL_LM",
                layers_to_transform=list(config.layers_to_transform) if config.layers_to_transform else None,
            )  # fmt: skip
            if hasattr(theirs, "peft_config"):
                theirs.add_adapter(name, settings)
            else:
                theirs = peft.get_peft_model(theirs, settings, adapter_name=name)
    assert trained(ours).keys() == trained(theirs).keys()
    with torch.no_grad():
        for name, value in trained(ours).items():
            trained(theirs)[name].copy_(value)
    for module in theirs.modules():  # of the whole only a flag: bitsandbytes would repack its layers in eval mode
        module.training = module.training and "Linear4bit" in type(module).__name__
    names = ["d", "a", None, "h", "a"]
    ids = torch.randint(3, 380, (len(names), 8))
    with torch.no_grad():
        expected = theirs(ids, adapter_names=[name or "__base__" for name in names]).logits
        exact = separately(serving_in_float64(ours), names, ids)
        with adapters_of_rows(ours, names):
            mine = ours(ids)
    error = (expected - exact).abs().max()
    assert 0 < error < 1e-4
    assert (mine - expected).abs().max() <= 4 * error


def test_rows_of_an_adapted_embedding(tiny: Path):
    """Ids instead of numbers come in; and the copies that an active adapter trains beside LoRA are out of the way."""
    configs = {"a": LoraConfig(r=3, target_modules=("embed_tokens", "q_proj")), "b": CONFIGS["b"]}
    model, names = serving(tiny, None, configs), ["a", "b", None, "a"]
    ids = torch.randint(3, 380, (4, 6))
    expected = separately(model, names, ids)
    error = (expected - separately(copy.deepcopy(model).double(), names, ids)).abs().max()
    minift.add_lora(model, LoraConfig(r=2, modules_to_save=("model.norm",)), "whole")
    with torch.no_grad():
        model.get_parameter("model.norm.copies.whole.weight").zero_()
        with adapters_of_rows(model, names):
            assert (model(ids) - expected).abs().max() <= 4 * error
        assert not model(ids).any()
    with pytest.raises(ValueError, match=r"'whole' has its own model\.norm"), adapters_of_rows(model, ["whole"]):
        pytest.fail("entered")


def test_prompts_of_different_lengths_generate_what_they_would_alone(tiny: Path):
    """Padding on the left, a cache, one token at a time, for each row its adapter."""
    model = serving(tiny, "nf4")
    prompts = [[5, 6, 7, 7, 5, 300, 12], [9], [4, 8, 9, 9], [9], [9]]
    names = ["g", "c", None, "b", None]
    with adapters_of_rows(model, names):
        together = torch.stack(list(generate_tokens(model, prompts, 12)), dim=1)
    for row, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        set_adapter(model, [name] if name else [])
        alone = torch.stack(list(generate_tokens(model, [prompt], 12)), dim=1)
        assert together[row].tolist() == alone[0].tolist()
    assert len({tuple(row) for row in together.tolist()}) == len(prompts)  # the adapters, not only the prompts, differ


def test_conversations_of_several_customers(tiny: Path):
    model, tokenizer = serving(tiny), minift.load_tokenizer(tiny)
    conversations = [[{"role": "user", "content": text}] for text in ("Hi", "What is the capital of France?", "Hi")]
    with adapters_of_rows(model, ["c", "g", None]):
        together = generate_batch(model, tokenizer, conversations, max_new_tokens=6)
    assert together[0] != together[2]
    for name, conversation, answer in zip(("c", "g", None), conversations, together, strict=True):
        set_adapter(model, [name] if name else [])
        assert generate_batch(model, tokenizer, [conversation], max_new_tokens=6) == [answer]


def test_contexts_nest_and_end(tiny: Path):
    """`disabled` within it is the base; an inner one replaces the outer; afterwards the active adapters are back."""
    model, ids = serving(tiny), torch.randint(3, 380, (2, 5))
    set_adapter(model, "c")
    with torch.no_grad():
        before = model(ids)
        with adapters_of_rows(model, ["a", "g"]):
            outer = model(ids)
            with minift.disabled(model):
                assert torch.equal(model(ids), minift.load_model(tiny)(ids))
            with adapters_of_rows(model, ["d"]):
                assert model(ids[:1]).shape[0] == 1
            assert torch.equal(model(ids), outer)
        assert torch.equal(model(ids), before)
        with pytest.raises(KeyError), adapters_of_rows(model, ["a", "g"]):
            raise KeyError
        assert torch.equal(model(ids), before)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_gradients_of_an_evaluated_model_are_right(tiny: Path, quantize: str | None):
    """Eval mode does not mean no gradients: each adapter's is the sum over its own rows, as from separate calls."""
    model = serving(tiny, quantize, {name: CONFIGS[name] for name in ("a", "c", "g")})
    set_adapter(model, ["a", "c", "g"])
    names, ids = ["c", "a", None, "c", "g"], torch.randint(3, 380, (5, 6))
    with adapters_of_rows(model, names):
        loss = model(ids).square().sum()
    mine = torch.autograd.grad(loss, list(trained(model).values()))
    totals = [torch.zeros_like(p) for p in trained(model).values()]
    for name, row in zip(names, ids, strict=True):
        with adapters_of_rows(model, [name]):
            grads = torch.autograd.grad(
                model(row.unsqueeze(0)).square().sum(), list(trained(model).values()), allow_unused=True
            ) if name else [None] * len(totals)  # fmt: skip
        totals = [total if grad is None else total + grad for total, grad in zip(totals, grads, strict=True)]
    for grad, total in zip(mine, totals, strict=True):
        # Sums of mixed sign through two layers; int8 rounds activations, so an ulp before can be a code after.
        assert (grad - total).abs().max() <= (0.05 if quantize == "int8" else 1e-4) * total.abs().max()
        assert total.any()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "x"], "no adapter 'x'; it has a, b, c"),
        (["__base__", "a"], "no adapter '__base__'"),
        ("ab", "got the string 'ab'"),
        ([], "at least one"),
    ],
)
def test_wrong_names_are_refused(tiny: Path, names: Any, message: str):
    model = serving(tiny)
    with pytest.raises(ValueError, match=message), adapters_of_rows(model, names):
        pytest.fail("entered")
    assert not any(layer.route for layer in model.modules() if isinstance(layer, LoraLinear))


def test_another_number_of_rows_is_refused(tiny: Path):
    """Also two texts in one flat row: they share it, so only one adapter could be meant."""
    model = serving(tiny)
    flat = torch.tensor([[0, 0, 0, 1, 1]])
    with torch.no_grad(), adapters_of_rows(model, ["a", None]):
        with pytest.raises(ValueError, match=r"named for 2 rows, but this batch has 1.*flat"):
            model(torch.arange(5)[None], documents_bs=flat)
        with pytest.raises(ValueError, match="named for 2 rows, but this batch has 3"):
            model(torch.arange(15).view(3, 5))
        model(torch.arange(10).view(2, 5))


def test_training_is_refused(tiny: Path):
    model = serving(tiny).train()
    with pytest.raises(ValueError, match="cannot be trained"), adapters_of_rows(model, ["a"]):
        pytest.fail("entered")
    with pytest.raises(ValueError, match="it has none"), adapters_of_rows(minift.load_model(tiny), ["a"]):
        pytest.fail("entered")
