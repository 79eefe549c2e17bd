"""Prompt tuning, P-tuning and prefix tuning against PEFT: initial values, logits, every gradient, files both ways,
generated text, in every family.

Numbers are compared as in test_variants.py: E is the distance of PEFT's fp32 numbers from its own in float64, relative
to the largest number of a tensor, the worst of all tensors counting; ours may be 4 E from PEFT's.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peers
import pytest
import torch
from checkpoints import FAMILY_NAMES, checkpoint, in_fp64, load_theirs
from safetensors.torch import load_file
from torch import Tensor, nn

import minift
from minift.adapters.prefix import PrefixTuningConfig
from minift.adapters.prompt import PromptTuningConfig
from minift.adapters.ptuning import PTuningConfig
from minift.adapters.verbs import add_adapter, load_adapter, save_adapter
from minift.adapters.virtual import VirtualMethod
from minift.data.collate import collate
from minift.data.encode import Example
from minift.model.decoder import CausalLM
from minift.model.generate import generate_tokens
from minift.quant import QuantConfig
from minift.train.step import loss_sum

peft = pytest.importorskip("peft")

N = 5
# Ours, and PEFT's class with the same settings.
CASES: dict[str, tuple[VirtualMethod, str, dict[str, Any]]] = {
    "prompt": (PromptTuningConfig(N), "PromptTuningConfig", {}),
    "sampled": (PromptTuningConfig(N, "sample_vocab"), "PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": (PTuningConfig(N, encoder_hidden_size=12), "PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "lstm": (
        PTuningConfig(N, "lstm", encoder_num_layers=3), "PromptEncoderConfig",
        {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3},
    ),
    "prefix": (PrefixTuningConfig(N, init="random"), "PrefixTuningConfig", {}),
    "projection": (
        PrefixTuningConfig(N, projection=True, encoder_hidden_size=24, init="random"), "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 24},
    ),
}  # fmt: skip
KINDS = ["prompt", "mlp", "prefix", "projection"]


def their_base(folder: Path, attention: str = "eager") -> nn.Module:
    base: Any = load_theirs(folder, attention)
    if base.config.model_type in ("opt", "gpt2"):
        # The tiny checkpoints name a number of key/value heads; these families know none, and PEFT would believe it.
        del base.config.num_key_value_heads
    return base


def add_theirs(base: nn.Module, case: str) -> Any:
    _, name, settings = CASES[case]
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N} | settings
    shape: Any = base.config
    if shape.model_type == "opt" and "Prefix" not in name:
        settings["token_dim"] = shape.word_embed_proj_dim  # PEFT would take that of the blocks, which does not fit
    config = getattr(peft, name)(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """By PEFT's names."""
    table = {"prompt_embeddings": "embedding.weight", "embedding": "embedding.weight"}
    names = {n: n.removeprefix("virtual.encoder.").removeprefix("prompt_encoder.default.") for n, p in
             model.named_parameters() if p.requires_grad}  # fmt: skip
    return {table.get(short, short): model.get_parameter(name) for name, short in names.items()}


def copy_values(ours: CausalLM, *theirs: nn.Module) -> None:
    for name, value in trained(ours).items():
        for model in theirs:
            trained(model)[name].data.copy_(value)


def pair(folder: Path, case: str, attention: str = "eager") -> tuple[CausalLM, Any]:
    """Ours and PEFT's model, with the same seed."""
    ours, theirs = minift.load_model(folder, attention=attention), their_base(folder, attention)
    torch.manual_seed(7)
    add_adapter(ours, CASES[case][0])
    torch.manual_seed(7)
    return ours, add_theirs(theirs, case)


def words(logits: Tensor, count: int) -> Tensor:
    """PEFT returns those of the virtual tokens, too, where they are in the input."""
    return logits[:, -count:]


def assert_equals_peft(ours: CausalLM, theirs: nn.Module, reference: nn.Module, most: float = 1e-4) -> None:
    """Two rows, the second padded on the right."""
    ids = torch.randint(3, ours.config.vocab_size, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    real = mask.bool()
    names = list(trained(ours))
    assert names == list(trained(theirs)) == list(trained(reference))
    runs = []
    for model, logits in [
        (ours, ours(ids)),
        (theirs, words(theirs(ids, attention_mask=mask).logits, 11)),
        (reference, words(reference(ids, attention_mask=mask).logits, 11)),
    ]:
        gradients = torch.autograd.grad(logits[real].square().mean(), tuple(trained(model).values()))
        runs.append({"logits": logits[real].detach()} | dict(zip(names, gradients, strict=True)))
    mine, other, exact = runs
    largest = {key: value.abs().max().item() for key, value in exact.items()}
    assert min(largest.values()) > 0
    rounding = max((other[key] - exact[key]).abs().max().item() / largest[key] for key in exact)
    assert 0 < rounding < most
    for key, value in mine.items():
        assert value.shape == other[key].shape
        assert (value - other[key]).abs().max().item() <= 4 * rounding * largest[key], key


# --- the beginning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_seed_gives_pefts_values_and_the_same_are_trained(tiny_odd: Path, case: str, dtype: str):
    ours = minift.load_model(tiny_odd, dtype=getattr(torch, dtype))
    base = peers.peer_base(tiny_odd, nf4=False, dtype=dtype)
    torch.manual_seed(7)
    add_adapter(ours, CASES[case][0])
    drawn = torch.rand(3)
    torch.manual_seed(7)
    theirs = add_theirs(base, case)
    assert torch.equal(drawn, torch.rand(3)), "what is drawn later must be the same, too"
    mine, other = trained(ours), trained(theirs)
    assert list(mine) == list(other)
    for name, value in mine.items():
        assert value.dtype == torch.float32 and torch.equal(value, other[name]), name


@pytest.mark.parametrize("count", [2, 5, 9])
@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_a_text_is_repeated_or_cut(tmp_path: Path, family: str, count: int):
    """Against the embeddings that transformers gives: Gemma's are scaled, opt-350m's narrow."""
    folder = checkpoint(tmp_path / "model", **FAMILY_NAMES[family])
    ours, theirs = minift.load_model(folder), cast(Any, load_theirs(folder, "eager"))
    text = (17, 4, 60, 33)
    add_adapter(ours, PromptTuningConfig(count, "text", text))
    expected = theirs.get_input_embeddings()(torch.tensor([text[i % 4] for i in range(count)]))
    assert torch.equal(trained(ours)["embedding.weight"], expected)


def test_peft_starts_from_the_same_text(tiny: Path):
    text = "why is the sky blue"
    ours, base = minift.load_model(tiny), peers.peer_base(tiny, nf4=False)
    ids = tuple(minift.load_tokenizer(tiny).encode(text))
    add_adapter(ours, PromptTuningConfig(30, "text", ids))
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=30, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(tiny),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, config)
    assert torch.equal(trained(ours)["embedding.weight"], trained(theirs)["embedding.weight"])


# --- forward and backward ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return checkpoint(tmp_path_factory.mktemp(request.param) / "model", **FAMILY_NAMES[request.param])


@pytest.mark.parametrize("case", KINDS)
def test_every_family_equals_peft(family: Path, case: str):
    ours, theirs = pair(family, case)
    assert_equals_peft(ours, theirs, in_fp64(theirs))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("case", CASES)
def test_every_attention_equals_peft(tiny_odd: Path, case: str, attention: str):
    ours, theirs = pair(tiny_odd, case, "sdpa" if attention != "eager" else "eager")
    ours.attention = minift.load_model(tiny_odd, attention=attention).attention
    assert_equals_peft(ours, theirs, in_fp64(theirs))


@pytest.mark.parametrize("case", KINDS)
def test_a_base_in_bf16_equals_peft(tiny: Path, case: str):
    """The reference is PEFT in float64 over the same bf16 weights. E is that of bf16 here, 0.4 % a rounding."""
    ours, theirs = minift.load_model(tiny, dtype=torch.bfloat16), peers.peer_base(tiny, nf4=False, dtype="bfloat16")
    add_adapter(ours, CASES[case][0])
    theirs = add_theirs(theirs, case)
    copy_values(ours, theirs)
    assert_equals_peft(ours, theirs, in_fp64(theirs), most=0.1)


@pytest.mark.parametrize("case", KINDS)
def test_a_base_in_nf4_equals_peft_over_bitsandbytes(tiny: Path, case: str):
    pytest.importorskip("bitsandbytes")
    ours = minift.load_model(tiny, QuantConfig(double_quant=False)).train()
    add_adapter(ours, CASES[case][0])
    theirs = add_theirs(peers.peer_base(tiny, double_quant=False), case)
    weights = peers.peer_nf4_weights(tiny, double_quant=False)
    reference = add_theirs(peers.peer_base(tiny, weights=weights), case)
    copy_values(ours, theirs, reference)
    assert_equals_peft(ours, theirs, in_fp64(reference))


@pytest.mark.parametrize("case", KINDS)
def test_the_loss_is_pefts(tiny: Path, case: str):
    ours, theirs = pair(tiny, case, "sdpa")
    rows = torch.randint(3, 380, (2, 9)).tolist()
    batch = collate([Example(row, [-100, -100, *row[2:]]) for row in rows], pad_id=0)
    with torch.no_grad():
        mine = loss_sum(ours, batch) / batch.trained_tokens
        other, exact = (m(batch.input_ids_bs, labels=batch.labels_bs).loss for m in (theirs, in_fp64(theirs)))
    # Each is a mean of 14 logarithms of about 6, computed from logits with an error of some ulps of 2^-24.
    assert abs(mine.item() - other.item()) <= 4 * max(abs(other.item() - exact.item()), 2**-24 * exact.item())


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_generated_text_is_pefts(tmp_path: Path, name: str, case: str):
    """Row by row: where rows are padded on the left, PEFT's virtual tokens stand in front of the padding."""
    ours, theirs = pair(checkpoint(tmp_path / "model", **FAMILY_NAMES[name]), case)
    texts = []
    for length in (3, 14):
        prompt = torch.randint(3, 101, (1, length))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = theirs.eval().generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        mine = list(generate_tokens(ours, prompt.tolist(), 12))
        texts.append(torch.cat(mine).tolist())
        assert texts[-1] == found[0, -12:].tolist()
    assert texts[0] != texts[1]


# --- files ------------------------------------------------------------------------------------------------------------


def assert_same_logits(ours: CausalLM, theirs: Any) -> None:
    ids = torch.randint(3, ours.config.vocab_size, (2, 15))
    with torch.no_grad():
        expected, exact = (words(m(ids).logits, 15) for m in (theirs, in_fp64(theirs)))
        assert (ours(ids) - expected).abs().max() <= 4 * (expected - exact).abs().max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_peft_reads_what_is_saved_here_and_so_do_we(tmp_path: Path, name: str, case: str):
    folder = checkpoint(tmp_path / "model", **FAMILY_NAMES[name])
    ours = minift.load_model(folder, attention="eager")
    add_adapter(ours, CASES[case][0])
    save_adapter(ours, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(their_base(folder), tmp_path / "saved")
    assert_same_logits(ours, theirs)

    again = minift.load_model(folder, attention="eager")
    state = torch.get_rng_state()
    assert load_adapter(again, tmp_path / "saved") == "default"
    assert torch.equal(torch.get_rng_state(), state)
    assert not trained(again)
    ids = torch.randint(3, 101, (2, 15))
    # What an encoder computes is rounded in another order for one row than for many, by some ulps.
    assert (again(ids) - ours(ids)).abs().max() <= 64 * 2**-24 * ours(ids).abs().max()

    theirs.save_pretrained(tmp_path / "theirs")
    config, expected = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("saved", "theirs"))
    meant = expected.keys() - {"peft_version", "auto_mapping", "runtime_config"}
    assert {key: config[key] for key in meant} == {key: expected[key] for key in meant}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_what_peft_saves_is_read_and_trained_further(tmp_path: Path, name: str, case: str):
    folder = checkpoint(tmp_path / "model", **FAMILY_NAMES[name])
    theirs = add_theirs(their_base(folder), case)
    theirs.save_pretrained(tmp_path / "saved")
    ours = minift.load_model(folder, attention="eager")
    load_adapter(ours, tmp_path / "saved", trainable=True)
    assert_same_logits(ours, theirs)
    (value,) = trained(ours).values()
    assert torch.equal(value, load_file(tmp_path / "saved" / "adapter_model.safetensors")["prompt_embeddings"])
    ours(torch.randint(3, 101, (2, 6))).square().mean().backward()
    assert value.grad is not None and value.grad.abs().max() > 0


def test_dropout_is_on_in_training_only_and_not_in_files(tiny: Path, tmp_path: Path):
    """PEFT saves a prompt with some of its numbers dropped, if the model is in training."""
    ours = minift.load_model(tiny).train()
    add_adapter(ours, replace(PTuningConfig(3, "lstm"), encoder_dropout=0.5))
    ids = torch.randint(3, 380, (1, 6))
    assert not torch.equal(ours(ids), ours(ids))
    for name in ("a", "b"):
        save_adapter(ours, tmp_path / name)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert torch.equal(a["prompt_embeddings"], b["prompt_embeddings"])
    assert not torch.equal(ours(ids), ours(ids)), "saving must not end the training"
    ours.eval()
    expected = ours(ids)
    assert torch.equal(ours(ids), expected)
    again = minift.load_model(tiny)
    load_adapter(again, tmp_path / "a")
    assert (again(ids) - expected).abs().max() <= 64 * 2**-24 * expected.abs().max()


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PromptTuningConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1, got 0"),
        (PrefixTuningConfig, {"num_virtual_tokens": -2}, "num_virtual_tokens"),
        (PTuningConfig, {"num_virtual_tokens": 2.5}, "num_virtual_tokens"),
        (PromptTuningConfig, {"init": "TEXT"}, "init 'TEXT': choose one of random, sample_vocab, text"),
        (PromptTuningConfig, {"init": "text"}, "init_ids"),
        (PromptTuningConfig, {"init_ids": (3,)}, "init_ids"),
        (PTuningConfig, {"encoder_type": "gru"}, "encoder_type 'gru'"),
        (PTuningConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size"),
        (PTuningConfig, {"encoder_num_layers": 0}, "encoder_num_layers"),
        (PTuningConfig, {"encoder_dropout": 1.0}, "encoder_dropout"),
        (PrefixTuningConfig, {"init": "ones"}, "init 'ones'"),
        (PrefixTuningConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size"),
    ],
)
def test_settings_that_mean_nothing_are_refused(kind: type[VirtualMethod], options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ("prefix", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("mlp", {"invented": 3}, "invented"),
        ("mlp", {"encoder_reparameterization_type": "GRU"}, "gru"),
        ("prefix", {"init_weights": "ones"}, "init 'ones'"),
        ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens"),
        ("prefix", {"num_virtual_tokens": N + 1}, "prompt_embeddings has shape"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_nothing_changes(
    tiny: Path, tmp_path: Path, case: str, changes: dict[str, Any], message: str
):
    ours = minift.load_model(tiny)
    add_adapter(ours, CASES[case][0])
    path = save_adapter(ours, tmp_path / "saved") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    fresh = minift.load_model(tiny)
    before = [name for name, _ in fresh.named_parameters()]
    with pytest.raises(ValueError, match=message):
        load_adapter(fresh, tmp_path / "saved")
    assert [name for name, _ in fresh.named_parameters()] == before and fresh.virtual is None
    assert all(p.requires_grad for p in fresh.parameters())
