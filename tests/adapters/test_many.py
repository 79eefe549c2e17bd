"""Several adapters of one model against PEFT's: switched, disabled, deleted, combined."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

import minift
from minift.adapters.inject import lora_layers, low_rank_layers
from minift.adapters.lora import LoraConfig, LoraLinear
from minift.adapters.many import adapter_names, combine, delete_adapter, disabled, set_adapter

peft = pytest.importorskip("peft")

CONFIGS = {
    "one": LoraConfig(r=3, alpha=6, target_modules=("q_proj", "up_proj")),
    "two": LoraConfig(r=3, alpha=1, target_modules=("q_proj", "down_proj")),
    "three": LoraConfig(r=5, alpha=5, target_modules=("q_proj", "up_proj"), use_rslora=True),
}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if ".lora_" in n}


@pytest.fixture
def pair(tiny: Path) -> tuple[minift.CausalLM, Any]:
    """Both libraries with the same three adapters, of random A and B."""
    ours, theirs = minift.load_model(tiny), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in CONFIGS.items():
            minift.add_lora(ours, config, name)
            settings = peft.LoraConfig(
                r=config.r,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                target_modules=list(config.target_modules or ()),
                use_rslora=config.use_rslora,
                task_type="CAUSAL_LM",
            )
            if theirs is None:
                theirs = peft.get_peft_model(peers.peer_base(tiny, nf4=False), settings, adapter_name=name)
            else:
                theirs.add_adapter(name, settings)
    assert theirs is not None
    for name, value in trained(ours).items():
        with torch.no_grad():
            value.normal_(std=0.1)
            trained(theirs)[name].copy_(value)
    return ours, theirs.eval()


def same_logits(ours: minift.CausalLM, theirs: Any, differs_from: Tensor | None = None) -> Tensor:
    """Within 4 E, E the rounding error of theirs (see test_files.py)."""
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        expected, exact = theirs(ids).logits, copy.deepcopy(theirs).double()(ids).logits
        mine = ours(ids)
    error = (expected - exact).abs().max()
    assert (mine - expected).abs().max() <= 4 * error
    assert differs_from is None or (mine - differs_from).abs().max() > 1000 * error
    return mine


def test_switching(pair: tuple[minift.CausalLM, Any]):
    """Logits and what is trained are PEFT's."""
    ours, theirs = pair
    assert adapter_names(ours) == list(CONFIGS)
    before = None
    for name in [*CONFIGS, "one"]:
        set_adapter(ours, name)
        theirs.set_adapter(name)
        before = same_logits(ours, theirs, before)
        flags = {n: p.requires_grad for n, p in trained(theirs).items()}
        assert {n: p.requires_grad for n, p in trained(ours).items()} == flags
        assert {flag for n, flag in flags.items() if f".{name}." in n} == {True}
    set_adapter(ours, ["one", "two"], trainable=False)
    theirs.base_model.set_adapter(["one", "two"])
    same_logits(ours, theirs, before)
    assert not any(p.requires_grad for p in ours.parameters())


def test_disabled_is_the_original_model_bit_for_bit(pair: tuple[minift.CausalLM, Any], tiny: Path):
    ours, _ = pair
    set_adapter(ours, "two")
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        adapted = ours(ids)
        with disabled(ours):
            assert torch.equal(ours(ids), minift.load_model(tiny)(ids))
        assert torch.equal(ours(ids), adapted)
        with pytest.raises(KeyError), disabled(ours):
            raise KeyError
        assert torch.equal(ours(ids), adapted)
    assert not torch.equal(adapted, minift.load_model(tiny)(ids))


def test_deleting(pair: tuple[minift.CausalLM, Any], tiny: Path):
    ours, theirs = pair
    set_adapter(ours, ["one", "two"])
    theirs.base_model.set_adapter(["one", "two"])
    before = same_logits(ours, theirs)
    delete_adapter(ours, "one")
    theirs.delete_adapter("one")
    same_logits(ours, theirs, before)
    assert adapter_names(ours) == ["two", "three"]
    assert not any(".one." in name for name in ours.state_dict())
    delete_adapter(ours, "three")
    assert {path.rpartition(".")[2] for path in lora_layers(ours)} == {"q_proj", "down_proj"}  # up_proj is plain again
    delete_adapter(ours, "two")
    original = minift.load_model(tiny)
    assert ours.state_dict().keys() == original.state_dict().keys()
    ids = torch.arange(3, 20).unsqueeze(0)
    assert torch.equal(ours(ids), original(ids))


def test_an_adapter_that_holds_a_part_of_the_weights_stays(tiny: Path):
    ours = minift.load_model(tiny)
    minift.add_lora(ours, LoraConfig(r=2, init="pissa"))
    with pytest.raises(ValueError, match="'pissa'"):
        delete_adapter(ours, "default")
    assert adapter_names(ours) == ["default"]


# --- combining --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "linear", "cat"])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.5)])
def test_a_combination_is_pefts(pair: tuple[minift.CausalLM, Any], method: str, weights: tuple[float, float]):
    ours, theirs = pair
    torch.manual_seed(2)
    paths = combine(ours, ["one", "two"], weights, "new", method)
    theirs.add_weighted_adapter(["one", "two"], list(weights), "new", combination_type=method)
    assert {path.rpartition(".")[2] for path in paths} == {"q_proj", "up_proj", "down_proj"}
    assert all("new" not in layer.active for layer in lora_layers(ours).values())
    assert not any(p.requires_grad for n, p in trained(ours).items() if ".new." in n)
    for path in paths:
        layer, other = ours.get_submodule(path), theirs.base_model.model.get_submodule(path)
        assert isinstance(layer, LoraLinear)
        (a_ri, b_or), (their_a, their_b) = layer.matrices("new"), (other.lora_A["new"], other.lora_B["new"])
        assert layer.configs["new"].scaling == other.scaling["new"] == 1
        assert a_ri.shape == their_a.weight.shape and b_or.shape == their_b.weight.shape
        mine, expected = (b_or @ a_ri).double(), (their_b.weight @ their_a.weight).double()
        # Sums of at most 6 products of about 20 roundings; svd: 100 roundings, the next singular value is well apart.
        assert (mine - expected).abs().max() <= 200 * 2**-24 * expected.abs().max()
        if method != "svd":  # singular directions have no sign of their own
            assert torch.allclose(a_ri, their_a.weight, rtol=1e-6, atol=0)
            assert torch.allclose(b_or, their_b.weight, rtol=1e-6, atol=0)
    set_adapter(ours, "new")
    theirs.set_adapter("new")
    same_logits(ours, theirs)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_cat_and_svd_keep_the_weighted_sum(pair: tuple[minift.CausalLM, Any], method: str):
    """Ranks 3, 3 and 5, one of them rsLoRA: at rank 11 the sum in float64 is met up to rounding."""
    ours, _ = pair
    weights = (0.5, -2.0, 1.25)
    combine(ours, list(CONFIGS), weights, "new", method, rank=11 if method == "svd" else None)
    layer = lora_layers(ours)["model.layers.1.self_attn.q_proj"]
    total = torch.zeros(64, 64, dtype=torch.float64)
    for (name, config), weight in zip(CONFIGS.items(), weights, strict=True):
        a_ri, b_or = (matrix.double() for matrix in layer.matrices(name))
        total += weight * config.alpha / (config.r**0.5 if config.use_rslora else config.r) * b_or @ a_ri
    assert layer.matrices("new")[0].shape == (11, 64)
    assert (layer.delta("new") - total).abs().max() <= 200 * 2**-24 * total.abs().max()


def test_a_combination_is_saved_and_read_by_peft(pair: tuple[minift.CausalLM, Any], tiny: Path, tmp_path: Path):
    ours, _ = pair
    combine(ours, ["one", "two"], [1.0, 0.5], "new", "cat")
    set_adapter(ours, "new")
    minift.save_adapter(ours, tmp_path / "saved", "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(peers.peer_base(tiny, nf4=False), tmp_path / "saved").eval()
    same_logits(ours, theirs)


@pytest.mark.parametrize(
    ("names", "weights", "options", "message"),
    [
        (["one", "nobody"], [1, 1], {}, "no adapter 'nobody'; it has one, two, three"),
        (["one", "two"], [1], {}, "1 weights"),
        (["one", "one"], [1, 1], {}, "one, one"),
        ([], [], {}, "0 adapters"),
        (["one"], [1], {"method": "ties"}, "'ties'.*svd, linear, cat"),
        (["one", "three"], [1, 1], {"method": "linear"}, "one rank"),
        (["one"], [1], {"method": "cat", "rank": 4}, "only 'svd'"),
        (["one"], [1], {"rank": 0}, "at least 1"),
        (["one"], [1], {"adapter": "two"}, "'two' exists already"),
    ],
    ids=str,
)
def test_what_cannot_be_combined(
    pair: tuple[minift.CausalLM, Any], names: list[str], weights: list[float], options: dict[str, Any], message: str
):
    ours, _ = pair
    before = set(ours.state_dict())
    with pytest.raises(ValueError, match=message):
        settings: dict[str, Any] = {"adapter": "new"} | options
        combine(ours, names, weights, **settings)
    assert set(ours.state_dict()) == before


def test_dora_is_not_combined_and_unknown_names_are_refused(tiny: Path):
    ours = minift.load_model(tiny)
    with pytest.raises(ValueError, match="it has none"):
        set_adapter(ours, "default")
    minift.add_lora(ours, LoraConfig(r=2, use_dora=True))
    with pytest.raises(ValueError, match="DoRA"):
        combine(ours, ["default"], [1.0], "new")
    for change in (set_adapter, delete_adapter):
        with pytest.raises(ValueError, match="no adapter 'x'; it has default"):
            change(ours, "x")


def test_what_is_trained_beside_is_switched_with_it(tiny: Path):
    """A trained norm: out of the model while its adapter is, back with it, gone when it is deleted; never combined."""
    ours, ids = minift.load_model(tiny), torch.arange(3, 20).unsqueeze(0)
    original = minift.load_model(tiny)(ids)
    minift.add_lora(
        ours, LoraConfig(r=2, target_modules=("q_proj", "embed_tokens"), modules_to_save=("model.norm",)), "one"
    )
    with torch.no_grad():
        ours.get_parameter("model.norm.copies.one.weight").mul_(2)
        adapted = ours(ids)
        assert torch.equal(adapted, 2 * original)
        with disabled(ours):
            assert torch.equal(ours(ids), original)
        assert torch.equal(ours(ids), adapted)
        set_adapter(ours, [])
        assert torch.equal(ours(ids), original) and not any(p.requires_grad for p in ours.parameters())
        minift.add_lora(ours, LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("model.norm",)), "two")
        with pytest.raises(ValueError, match=r"one, two each have their own model\.norm"):
            set_adapter(ours, ["one", "two"])
        assert adapter_names(ours) == ["one", "two"]
        set_adapter(ours, "one")
        assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
            name for name in ours.state_dict() if name.endswith((".one", ".one.weight"))
        }
        assert torch.equal(ours(ids), adapted)
        with pytest.raises(ValueError, match=r"'one' has its own model\.norm"):
            combine(ours, ["one"], [1.0], "new")
        for name in ("one", "two"):
            delete_adapter(ours, name)
    assert ours.state_dict().keys() == minift.load_model(tiny).state_dict().keys()
    assert torch.equal(ours(ids), original)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_changes_of_an_embedding_are_combined(tiny: Path, method: str):
    ours = minift.load_model(tiny)
    for name, r in (("one", 2), ("two", 3)):
        minift.add_lora(ours, LoraConfig(r=r, target_modules=("embed_tokens",)), name)
        layer = low_rank_layers(ours)["model.embed_tokens"]
        nn.init.normal_(layer.matrices(name)[0])
    expected = 0.5 * layer.delta("one") - 2 * layer.delta("two")
    combine(ours, ["one", "two"], [0.5, -2], "new", method, rank=5 if method == "svd" else None)
    # Of rank 5, so nothing is cut off; the svd of 64 x 384 numbers in fp32 is exact to some 64 u of the largest.
    assert (layer.delta("new") - expected).abs().max() <= 64 * 2**-24 * torch.linalg.matrix_norm(expected, 2)
