"""Which layers are adapted, with which rank: always asked of the installed PEFT, on the same checkpoint."""

import re
import warnings
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import transformers

import minift
from minift.adapters.inject import linear_layers, lora_layers
from minift.adapters.lora import LoraConfig
from minift.adapters.report import report, without_gradient
from minift.adapters.targets import USUAL, usual_targets
from minift.model.families import FAMILIES

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve blocks, so that their numbers have one and two digits."""
    return Path(peers.tiny_llama(tmp_path_factory.mktemp("models") / "deep", layers=12))


def theirs_with(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            peers.peer_base(folder, nf4=False), peft.LoraConfig(task_type="CAUSAL_LM", **options)
        )


LIMITS = [
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.k_proj", "proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\d?\..*"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    {"target_modules": r".*_proj", "exclude_modules": ["model.layers.3.mlp.up_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 11},
    {"target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [0, 10], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["model.layers.3.self_attn.q_proj", "v_proj"], "layers_to_transform": [2]},
    {"target_modules": ["q_proj"], "layers_to_transform": [2, 3], "exclude_modules": ["layers.3.self_attn.q_proj"]},
]


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_limits_leave_out_what_peft_leaves_out(deep: Path, options: dict[str, Any]):
    ours = minift.load_model(deep)
    wrapped = minift.add_lora(ours, LoraConfig(r=2, **options))
    theirs = theirs_with(deep, r=2, **options)
    assert 0 < len(wrapped) < 7 * 12
    assert sorted(wrapped) == sorted(theirs.targeted_module_names)


PATTERNS = [
    ({"q_proj": 3}, {}),
    ({"q_proj": 3, "layers.1.self_attn.v_proj": 5}, {"v_proj": 7}),
    ({r"layers\.[01]\..*": 3, "q_proj": 6}, {r"model\.layers\.1\.self_attn\.q_proj": 1.5}),
    ({"proj": 3, ".*proj": 7}, {}),  # the first is no end of a path after a dot
    ({"model.layers.0.self_attn.q_proj": 3}, {"self_attn": 2}),
]


@pytest.mark.parametrize(("ranks", "alphas"), PATTERNS, ids=str)
def test_patterns_give_layers_the_rank_and_alpha_of_peft(tiny: Path, tmp_path: Path, ranks: dict, alphas: dict):
    ours = minift.load_model(tiny)
    targets = ["q_proj", "v_proj"]
    torch.manual_seed(3)
    minift.add_lora(ours, LoraConfig(4, 6, target_modules=tuple(targets), rank_pattern=ranks, alpha_pattern=alphas))
    torch.manual_seed(3)
    theirs = theirs_with(tiny, r=4, lora_alpha=6, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)
    found = set()
    for path, layer in lora_layers(ours).items():
        other = theirs.base_model.model.get_submodule(path)
        config = layer.configs["default"]
        assert config.r == other.r["default"] == len(layer.matrices("default")[0])
        assert config.scaling == other.scaling["default"]
        assert torch.equal(layer.matrices("default")[0], other.lora_A["default"].weight)
        found.add((config.r, config.alpha))
    assert len(found) > 1 or ranks.keys() == {"proj", ".*proj"}
    # The file says what was given, not what it means for each layer.
    minift.save_adapter(ours, tmp_path / "saved")
    settings = peft.LoraConfig.from_pretrained(tmp_path / "saved")
    assert (settings.r, settings.rank_pattern, settings.alpha_pattern) == (4, ranks, alphas)
    again = minift.load_model(tiny)
    minift.load_adapter(again, tmp_path / "saved")
    for path, layer in lora_layers(again).items():
        assert layer.configs["default"].scaling == lora_layers(ours)[path].configs["default"].scaling


# --- what is usual for an architecture --------------------------------------------------------------------------------


def test_the_usual_targets_are_pefts():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    for family in FAMILIES:
        if family in THEIRS:
            assert list(usual_targets(family)) == THEIRS[family]
        else:
            assert family not in USUAL
            with pytest.raises(ValueError, match=f"no usual LoRA targets for '{family}'.*all-linear"):
                usual_targets(family)
    assert set(FAMILIES) - set(USUAL) == {"phi3", "smollm3"}


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_no_targets_are_those_usual_for_the_architecture(name: str, tmp_path: Path):
    """GPT-2's file says that linear weights are stored transposed, and PEFT gives equal logits for it."""
    kind = {"opt": transformers.OPTConfig, "gpt2": transformers.GPT2Config, "llama": transformers.LlamaConfig}[name]
    sizes = {
        "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2},
        "gpt2": {"n_embd": 32, "n_layer": 2},
        "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    }[name]
    heads = {"n_head" if name == "gpt2" else "num_attention_heads": 2}
    config = kind(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes, **heads)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="sdpa").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    ours = minift.load_model(tmp_path / "base")
    wrapped = minift.add_lora(ours, LoraConfig(r=2, target_modules=None))
    assert sorted(wrapped) == sorted(theirs.targeted_module_names)
    for layer in lora_layers(ours).values():
        torch.nn.init.normal_(layer.matrices("default")[1])
    minift.save_adapter(ours, tmp_path / "saved")
    settings = peft.LoraConfig.from_pretrained(tmp_path / "saved")
    assert settings.fan_in_fan_out == (name == "gpt2")
    assert sorted(settings.target_modules) == sorted(USUAL[name])

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="sdpa")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    ids = torch.randint(3, 50, (2, 9))
    with torch.no_grad():
        expected, exact = loaded(ids).logits, loaded.double()(ids).logits
        # 4 E, E the rounding error of theirs (see test_files.py); the adapter moves the logits by far more.
        assert (ours(ids) - expected).abs().max() <= 4 * (expected - exact).abs().max()
        before = minift.load_model(tmp_path / "base")(ids)
        assert (ours(ids) - before).abs().max() > 1000 * (expected - exact).abs().max()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ["exclude_modules=('q_proj',)", "q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, ["layers_to_transform=(9,)"]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
            ["layers_pattern=('h',)", "layers here"],
        ),
    ],
    ids=str,
)
def test_limits_that_leave_nothing_are_named(tiny: Path, options: dict[str, Any], words: list[str]):
    ours = minift.load_model(tiny)
    with pytest.raises(ValueError) as error:
        minift.add_lora(ours, LoraConfig(**options))
    assert all(word in str(error.value) for word in words)
    assert not lora_layers(ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "needs a list"),
        ({"layers_to_transform": []}, "numbers of blocks"),
        ({"layers_to_transform": ["1"]}, "numbers of blocks"),
        ({"exclude_modules": 3}, "exclude_modules"),
        ({"exclude_modules": "("}, "exclude_modules"),
        ({"rank_pattern": {"q_proj": 0}}, "rank must be at least 1, got 0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha must be positive"),
        ({"init": "olora"}, "'olora'.*gaussian"),
        ({"init": "pissa_niter_"}, "pissa_niter_<number>"),
        ({"loftq_iterations": 0}, "loftq_iterations"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_all_linear_in_any_case_is_no_regular_expression():
    assert LoraConfig(target_modules="All-Linear") == LoraConfig()


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_report_counts_what_is_trained(tiny: Path, quantize: str | None):
    ours = minift.load_model(tiny, quantize)
    minift.add_lora(ours, LoraConfig(r=4, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 2}))
    found = report(ours)
    theirs = theirs_with(tiny, r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    trained, total = theirs.get_nb_trainable_parameters()
    assert (found.trained, found.total, found.share) == (trained, total, trained / total)
    assert sum(layer.trained for layer in found.matched) == trained
    assert sorted(layer.path for layer in found.matched) == sorted(theirs.targeted_module_names)
    assert {(layer.shape, layer.r) for layer in found.matched} == {((64, 64), 4), ((32, 64), 2)}
    assert {*found.unmatched, *(layer.path for layer in found.matched)} == set(linear_layers(ours))
    text = found.format()
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj +2 x +\[64, 64\] +rank 4 +1,024 trained", text)
    assert "not adapted: model.layers.*.self_attn.k_proj, " in text and "lm_head" in text
    assert f"{trained:,} of {total:,} parameters are trained" in text


def test_the_report_refuses_when_nothing_is_trained(tiny: Path, tmp_path: Path):
    ours = minift.load_model(tiny)
    with pytest.raises(ValueError, match="no adapter 'default'"):
        report(ours)
    minift.add_lora(ours, LoraConfig(r=2))
    minift.save_adapter(ours, tmp_path / "saved")
    again = minift.load_model(tiny)
    minift.load_adapter(again, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"frozen.*trainable=True"):
        report(again)


def test_parameters_without_a_gradient_are_named(tiny: Path):
    ours = minift.load_model(tiny)
    minift.add_lora(ours, LoraConfig(r=2, target_modules=("q_proj", "lm_head")))
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert set(without_gradient(ours)) == trained
    ours.hidden(torch.arange(3, 12).unsqueeze(0)).sum().backward()
    assert without_gradient(ours) == ["lm_head.lora_A.default.weight", "lm_head.lora_B.default.weight"]
