"""Adapter files: PEFT reads what is saved here, what PEFT saves is read here, and what does not fit is refused by name.

Both libraries hold the same base weights and the same A and B, so their logits may differ by rounding only: by no more
than 4 E, where E is the distance of PEFT's fp32 logits from its own in float64 (see model/test_decoder.py).
"""

import copy
import errno
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minift
from minift.adapters.inject import lora_layers
from minift.adapters.lora import LoraConfig

peft = pytest.importorskip("peft")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def randomize(model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(value, std=0.1)


def adapted(folder: Path, config: LoraConfig | None = None, quantize: str | None = None) -> minift.CausalLM:
    model = minift.load_model(folder, quantize)
    minift.add_lora(model, config or LoraConfig(r=4, alpha=6))
    randomize(model)
    return model


@pytest.fixture
def saved(tiny: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny model on q_proj and up_proj, rank 4."""
    config = LoraConfig(r=4, alpha=6, dropout=0.25, target_modules=("q_proj", "up_proj"))
    return minift.save_adapter(adapted(tiny, config), tmp_path / "saved")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def theirs_with(folder: Path, settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(peers.peer_base(folder, nf4=False), settings)


def assert_same_logits(ours: minift.CausalLM, theirs: Any) -> None:
    ids = torch.randint(3, ours.config.vocab_size, (2, 15))
    with torch.no_grad():
        expected, exact = theirs(ids).logits, copy.deepcopy(theirs).double()(ids).logits
        assert (ours(ids) - expected).abs().max() <= 4 * (expected - exact).abs().max()


# --- both ways with PEFT ----------------------------------------------------------------------------------------------

SPECS = {
    "all-linear": {"target_modules": "all-linear"},
    "a list": {"target_modules": ("q_proj", "down_proj"), "r": 3, "alpha": 5.0},
    "a regular expression": {"target_modules": r".*layers\.1\..*(k|v)_proj"},
    "the head, too": {"target_modules": ("o_proj", "lm_head")},
    "ends of paths": {"target_modules": ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")},
    "a fraction as alpha": {"alpha": 2.5, "target_modules": ("v_proj",)},
    "dropout": {"dropout": 0.5},
}
# A head that is tied to the embedding is left out: PEFT warns about it.
CASES = [(name, spec) for name in ("tiny", "tiny_odd") for spec in SPECS if (name, spec) != ("tiny", "the head, too")]


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_peft_reads_what_is_saved_here(request: pytest.FixtureRequest, tmp_path: Path, name: str, spec: str):
    folder = request.getfixturevalue(name)
    config = LoraConfig(**SPECS[spec])
    ours = adapted(folder, config)
    minift.save_adapter(ours, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns about keys that match nothing, or are missing
        theirs = peft.PeftModel.from_pretrained(peers.peer_base(folder, nf4=False), tmp_path / "saved").eval()
    assert_same_logits(ours, theirs)
    assert sorted(theirs.targeted_module_names) == sorted(lora_layers(ours))
    settings = theirs.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (config.r, config.alpha, config.dropout)
    assert settings.inference_mode and settings.task_type == "CAUSAL_LM"
    assert settings.base_model_name_or_path == str(folder)


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_what_peft_saves_is_read_here(request: pytest.FixtureRequest, tmp_path: Path, name: str, spec: str):
    folder = request.getfixturevalue(name)
    config = LoraConfig(**SPECS[spec])
    targets = config.target_modules
    theirs = theirs_with(
        folder,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=config.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets or ()),
            task_type="CAUSAL_LM",
        ),
    )
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path, save_embedding_layers=False)
    ours = minift.load_model(folder)
    assert minift.load_adapter(ours, tmp_path) == "default"
    assert sorted(lora_layers(ours)) == sorted(theirs.targeted_module_names)
    (loaded,) = {layer.configs["default"] for layer in lora_layers(ours).values()}
    assert (loaded.r, loaded.alpha, loaded.dropout) == (config.r, config.alpha, config.dropout)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": ["k_proj"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "orthogonal", "r": 4},
    ],
    ids=str,
)
def test_settings_of_peft_that_do_not_change_the_computation_are_accepted(tiny: Path, tmp_path: Path, options: dict):
    settings = peft.LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj"]} | options))
    theirs = theirs_with(tiny, settings)
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path)
    ours = minift.load_model(tiny)
    minift.load_adapter(ours, tmp_path)
    assert sorted(lora_layers(ours)) == sorted(theirs.targeted_module_names)
    assert_same_logits(ours, theirs)


# --- what is in the files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_a_round_trip_changes_no_bit(request: pytest.FixtureRequest, tmp_path: Path, name: str, quantize: str | None):
    folder = request.getfixturevalue(name)
    ours = adapted(folder, quantize=quantize)
    assert minift.save_adapter(ours, tmp_path / "a") == tmp_path / "a"
    again = minift.load_model(folder, quantize)
    assert minift.load_adapter(again, str(tmp_path / "a"), adapter="other") == "other"
    for path, layer in lora_layers(ours).items():
        loaded = lora_layers(again)[path]
        assert loaded.active == ["other"]
        # all-linear is spelled out in the file
        config = loaded.configs["other"]
        assert (config.r, config.alpha, config.dropout) == (4, 6, 0)
        for mine, other in zip(layer.matrices("default"), loaded.matrices("other"), strict=True):
            assert other.dtype == torch.float32 and torch.equal(mine, other)
    ids = torch.randint(0, ours.config.vocab_size, (2, 9))
    assert torch.equal(ours(ids), again(ids))
    minift.save_adapter(again, tmp_path / "b", adapter="other")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_keys_and_settings(saved: Path, tiny: Path):
    assert {path.name for path in saved.iterdir()} == {WEIGHTS, CONFIG}
    expected = {
        f"base_model.model.model.layers.{layer}.{module}.lora_{part}.weight": shape
        for layer in (0, 1)
        for module, out in (("self_attn.q_proj", 64), ("mlp.up_proj", 128))
        for part, shape in (("A", (4, 64)), ("B", (out, 4)))
    }
    assert {key: tuple(t.shape) for key, t in load_file(saved / WEIGHTS).items()} == expected
    content = json.loads((saved / CONFIG).read_text())
    assert content["peft_type"] == "LORA" and content["task_type"] == "CAUSAL_LM"
    assert (content["r"], content["lora_alpha"], content["lora_dropout"]) == (4, 6, 0.25)
    assert sorted(content["target_modules"]) == ["q_proj", "up_proj"]
    assert content["base_model_name_or_path"] == str(tiny)
    assert content["inference_mode"] is True and content["bias"] == "none"
    from peft.tuners.lora import LoraConfig as Theirs

    known = set(Theirs.__dataclass_fields__)
    assert set(content) <= known


def test_one_of_two_adapters_is_saved_by_name(tiny: Path, tmp_path: Path):
    ours = adapted(tiny, LoraConfig(r=2, target_modules=("q_proj",)))
    minift.add_lora(ours, LoraConfig(r=3, target_modules=("q_proj", "k_proj")), adapter="second")
    shapes = {}
    for adapter in ("default", "second"):
        minift.save_adapter(ours, tmp_path / adapter, adapter)
        shapes[adapter] = sorted({tuple(t.shape) for t in load_file(tmp_path / adapter / WEIGHTS).values()})
    assert shapes == {"default": [(2, 64), (64, 2)], "second": [(3, 64), (32, 3), (64, 3)]}


def test_an_adapter_that_is_not_there_is_not_saved(tiny: Path, tmp_path: Path):
    for model in (minift.load_model(tiny), adapted(tiny)):
        with pytest.raises(ValueError, match="'mine'"):
            minift.save_adapter(model, tmp_path / "saved", "mine")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("training", [False, True])
def test_dropout_follows_the_mode_of_the_model(saved: Path, tiny: Path, training: bool):
    """An adapter that was trained with dropout, loaded to talk to (chat), must not drop anything."""
    ours = minift.load_model(tiny).train(training)
    minift.load_adapter(ours, saved)
    assert {layer.training for layer in lora_layers(ours).values()} == {training}
    ids = torch.randint(0, ours.config.vocab_size, (2, 9))
    assert torch.equal(ours(ids), ours(ids)) != training


@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_is_frozen_unless_it_shall_be_trained(saved: Path, tiny: Path, trainable: bool):
    ours = minift.load_model(tiny)
    minift.load_adapter(ours, saved, trainable=trainable)
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        name for name, _ in ours.named_parameters() if trainable and ".lora_" in name
    }


def test_two_loaded_adapters_add_up(saved: Path, tiny: Path, tmp_path: Path):
    other = minift.save_adapter(adapted(tiny, LoraConfig(r=2, target_modules=("q_proj",))), tmp_path / "other")
    ours = minift.load_model(tiny)
    minift.load_adapter(ours, saved, adapter="one")
    minift.load_adapter(ours, other, adapter="two")
    assert lora_layers(ours)["model.layers.0.self_attn.q_proj"].active == ["one", "two"]
    assert lora_layers(ours)["model.layers.0.mlp.up_proj"].active == ["one"]


def test_weights_in_16_bits_are_read_exactly(saved: Path, tiny: Path):
    edit_weights(saved, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    stored = load_file(saved / WEIGHTS)
    ours = minift.load_model(tiny)
    minift.load_adapter(ours, saved)
    for path, layer in lora_layers(ours).items():
        for part, matrix in zip("AB", layer.matrices("default"), strict=True):
            assert matrix.dtype == torch.float32
            assert torch.equal(matrix, stored[f"base_model.model.{path}.lora_{part}.weight"].float())


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(folder: Path, base: Path, kind: type[Exception] = ValueError) -> str:
    """Loads, expects a refusal of one line that leaves the model as it was, and returns its message."""
    model = minift.load_model(base)
    with pytest.raises(kind) as error:
        minift.load_adapter(model, folder)
    message = str(error.value)
    assert message and "\n" not in message
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    return message


def test_an_adapter_of_a_model_of_other_width(saved: Path, tiny_odd: Path):
    message = refusal(saved, tiny_odd)
    assert "for another model" in message and "layers.0" in message and "(4, 64)" in message and "(4, 65)" in message


def test_an_adapter_of_a_model_with_more_layers(tiny: Path, tmp_path: Path):
    peers.tiny_llama(tmp_path / "deep", layers=3)
    minift.save_adapter(adapted(tmp_path / "deep"), tmp_path / "saved")
    message = refusal(tmp_path / "saved", tiny)
    assert "for another model" in message and "model.layers.2." in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KEY), ["layers.0.self_attn.q_proj", "lacks lora_A"]),
        (lambda t: t.pop(KEY.replace("lora_A", "lora_B")), ["layers.0.self_attn.q_proj", "lacks lora_B"]),
        (lambda t: t.update({KEY.replace("q_proj", "query"): t[KEY].clone()}), ["query"]),
        (lambda t: t.update(surprise=torch.ones(1)), ["surprise"]),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3)}), ["base_model.model.lm_head.weight"]),
        (lambda t: t.update({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}), ["magnitude"]),
        (lambda t: t.update({KEY.replace("lora_A.weight", "lora_B.bias"): torch.ones(64)}), ["lora_B.bias"]),
        (lambda t: t.update({KEY.replace(".weight", ".default.weight"): t.pop(KEY)}), ["lora_A.default.weight"]),
        (lambda t: t.update({KEY: torch.ones(5, 64)}), ["layers.0.self_attn.q_proj", "(5, 64)", "(4, 64)"]),
        (lambda t: t.update({KEY.replace("base_model.model.", ""): t.pop(KEY)}), ["model.layers.0.self_attn.q_proj"]),
        (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), [KEY, "int8"]),
    ],
    ids=["no A", "no B", "unknown layer", "unknown", "head", "DoRA", "bias", "named", "rank", "no prefix", "int8"],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, tiny: Path, change: Callable, words: list[str]):
    edit_weights(saved, change)
    message = refusal(saved, tiny)
    assert all(word in message for word in words), message


def test_an_adapter_without_tensors(saved: Path, tiny: Path):
    edit_weights(saved, lambda tensors: tensors.clear())
    assert WEIGHTS in refusal(saved, tiny)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "VERA"}, "peft_type 'VERA'"),
        ({"peft_type": "LOHA"}, "supported: LORA"),
        ({"peft_type": None}, "peft_type None"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "some"}, "bias 'some'"),
        ({"rank_pattern": 2}, "rank_pattern"),
        ({"rank_pattern": {"(q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha must be positive"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        # These change what the layer computes, or the base weights that the adapter belongs to.
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}, "loftq_bits=8"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    ],
    ids=str,
)
def test_settings_that_are_not_computed_here_are_refused_by_name(saved: Path, tiny: Path, changes: dict, word: str):
    edit_config(saved, **changes)
    message = refusal(saved, tiny)
    assert word in message and CONFIG in message


def test_a_real_adapter_of_a_refused_kind_is_refused(tiny: Path, tmp_path: Path):
    """As PEFT writes it. This initialization puts other numbers in place of the base weights, drawn at random: read as
    plain LoRA over the original ones, its adapter would give other logits without a word."""
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")  # pyright: ignore
    theirs_with(tiny, settings).save_pretrained(tmp_path)
    assert "init_lora_weights='pissa_niter_4'" in refusal(tmp_path, tiny)


def test_settings_that_ask_for_other_tensors_than_there_are(saved: Path, tiny: Path):
    edit_config(saved, use_dora=True)
    assert "lacks lora_magnitude_vector" in refusal(saved, tiny)
    edit_config(saved, use_dora=False, rank_pattern={"q_proj": 2})
    message = refusal(saved, tiny)
    assert "layers.0.self_attn.q_proj" in message and "(2, 64)" in message


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules"])
def test_a_missing_setting_is_named(saved: Path, tiny: Path, key: str):
    content = json.loads((saved / CONFIG).read_text())
    del content[key]
    (saved / CONFIG).write_text(json.dumps(content))
    message = refusal(saved, tiny)
    assert key in message and str(saved / CONFIG) in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", 0), ("r", "4"), ("r", None), ("r", 4.5), ("lora_alpha", "16"), ("lora_alpha", None), ("lora_dropout", 2),
     ("lora_dropout", None), ("target_modules", None), ("target_modules", 5)],
)  # fmt: skip
def test_a_setting_of_the_wrong_kind_names_its_file(saved: Path, tiny: Path, key: str, value: object):
    edit_config(saved, **{key: value})
    assert str(saved / CONFIG) in refusal(saved, tiny)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"LORA"'])
def test_a_broken_config_is_named(saved: Path, tiny: Path, content: str):
    (saved / CONFIG).write_text(content)
    assert str(saved / CONFIG) in refusal(saved, tiny)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(saved: Path, tiny: Path, part: float):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[: int(part * len(whole))])
    assert f"{saved / WEIGHTS} is not a complete safetensors file" in refusal(saved, tiny)


def test_a_pickle_is_refused_and_not_opened(saved: Path, tiny: Path, tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    message = refusal(saved, tiny, FileNotFoundError)
    assert "pickle" in message and str(saved) in message
    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_is_no_adapter(tiny: Path, tmp_path: Path, saved: Path):
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere", tiny, FileNotFoundError)
    assert CONFIG in refusal(tiny, tiny, FileNotFoundError)  # a model's folder
    (saved / WEIGHTS).unlink()
    assert WEIGHTS in refusal(saved, tiny, FileNotFoundError)


def test_a_name_that_is_taken_is_refused_and_nothing_changes(saved: Path, tiny: Path):
    ours = adapted(tiny, LoraConfig(r=2, target_modules=("up_proj",)))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="'default' exists already"):
        minift.load_adapter(ours, saved)
    assert ours.state_dict().keys() == before.keys()
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == trained


# --- writing ----------------------------------------------------------------------------------------------------------


def test_saving_replaces_a_folder_as_a_whole(saved: Path, tiny: Path):
    (saved / "stale.txt").write_text("of the run before")
    minift.save_adapter(adapted(tiny, LoraConfig(r=2, target_modules=("k_proj",))), saved)
    assert {path.name for path in saved.iterdir()} == {WEIGHTS, CONFIG}
    assert {t.shape[0] for key, t in load_file(saved / WEIGHTS).items() if "lora_A" in key} == {2}
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_the_old_adapter_intact(
    saved: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
):
    if not existing:
        shutil.rmtree(saved)
    before = {path.name: path.read_bytes() for path in saved.glob("*")}

    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("minift.adapters.folder.save_file", full)
    with pytest.raises(OSError) as error:
        minift.save_adapter(adapted(tiny), saved)
    assert error.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in saved.glob("*")} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name] * existing  # no half-written folder beside it


def test_rows_of_a_resized_embedding_that_the_file_lacks_are_said(tiny: Path, tmp_path: Path):
    model = minift.load_model(tiny)
    rows = model.config.vocab_size + 8
    minift.resize_embeddings(model, rows)
    minift.add_lora(model, LoraConfig())
    with pytest.warns(UserWarning, match=rf"resized to {rows} rows.*resize_embeddings"):
        minift.save_adapter(model, tmp_path / "without")
    model = minift.load_model(tiny)
    minift.resize_embeddings(model, rows)
    minift.add_lora(model, LoraConfig(modules_to_save=("embed_tokens",), ensure_weight_tying=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minift.save_adapter(model, tmp_path / "with")
