"""What sets the families apart: that it matters, that real configurations have their known sizes, that files of every
family load and save, and that documents of a pack know nothing of each other. Equality with transformers in logits and
gradients, padded, packed and cached, is in test_decoder.py."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import FAMILY_CASES, FAMILY_NAMES, checkpoint, load_theirs, random_ids
from safetensors.torch import load_file, save_file

import minift
from minift.model.attention import eager
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.families import FAMILIES
from minift.model.generate import generate_tokens
from minift.model.layers import SelfAttention
from minift.model.save import save_model
from minift.quant import Linear4bit


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    return {name: checkpoint(tmp_path_factory.mktemp("family"), **case) for name, case in FAMILY_NAMES.items()}


def test_every_family_is_tested():
    assert set(FAMILY_NAMES) == set(FAMILIES) == {"llama"} | {case["model_type"] for case in FAMILY_CASES.values()}


# --- the settings matter on the inputs that the tests use -------------------------------------------------------------

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("case", "without"),
    [
        ("mistral", {"windows": (None, None)}),
        ("qwen2, window in the upper layer", {"windows": (None, None)}),
        ("smollm3", {"rotary": (True,) * 5}),
        ("smollm3, window where it does not turn", {"windows": (None, None)}),
        ("phi3, longrope, within its context", {"rope": PLAIN_ROPE}),
        ("phi3, longrope, beyond its context", {"rope": PLAIN_ROPE}),
        ("gemma2, window, caps", {"windows": (None, None)}),
        ("gemma2, window, caps", {"attention_softcap": 0.0}),
        ("gemma2, window, caps", {"logit_softcap": 0.0}),
        ("gemma2, window, caps", {"attention_scale": 0.25}),
        ("gemma3_text, two bases", {"local_rope": None}),
        ("gemma3_text, two bases", {"windows": (None, None, None)}),
        ("gemma3_text, stretched", {"local_rope": None}),
        ("gpt2, own width, unscaled", {"attention_scale": 0.25}),
    ],
)
def test_what_makes_a_family_matters(tmp_path: Path, case: str, without: dict[str, Any]):
    ours = minift.load_model(checkpoint(tmp_path, **FAMILY_CASES[case]), attention="eager")
    ids = random_ids(ours.config, 2, 53)
    before = ours(ids)
    ours.config = replace(ours.config, **without)
    attentions = [module for module in ours.modules() if isinstance(module, SelfAttention)]
    for attention, rotary in zip(attentions, ours.config.rotary, strict=True):
        attention.rotary = rotary
    assert (ours(ids) - before).abs().max() > 0.01


# --- real configurations ----------------------------------------------------------------------------------------------

# What the config.json of a well-known checkpoint says of its shape, and its number of parameters.
REAL: dict[str, tuple[dict[str, Any], int]] = {
    "SmolLM2-135M": (
        {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        134_515_008,
    ),
    "TinyLlama-1.1B": (
        {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
         "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
        1_100_048_384,
    ),
    "Llama-2-7b": (
        {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
         "num_hidden_layers": 32, "num_attention_heads": 32},
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
         "max_position_embeddings": 131072, "rope_scaling": {
             "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}},
        8_030_261_248,
    ),
    "Mistral-7B": (
        {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096},
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
         "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
        596_049_920,
    ),
    "SmolLM3-3B": (
        {"model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
         "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4},
        3_075_098_624,
    ),
    "Phi-3-mini": (
        {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 2047},
        3_821_079_552,
    ),
    "Phi-4-mini": (
        {"model_type": "phi3", "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
         "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True,
         "partial_rotary_factor": 0.75},
        3_836_021_760,
    ),
    "gemma-2b": (
        {"model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
         "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
         "hidden_act": "gelu"},
        2_506_172_416,
    ),
    "gemma-2-2b": (
        {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
         "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
        2_614_341_888,
    ),
    "gemma-3-1b": (
        {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
         "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
         "sliding_window": 512},
        999_885_952,
    ),
    "opt-350m": (
        {"model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": False},
        331_196_416,
    ),
    "gpt2": (
        {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
        124_439_808,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_configurations_have_their_parameters(name: str):
    """Every parameter under the name, and in the shape, that transformers gives it; in all, the published number."""
    raw, published = REAL[name]
    theirs_config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        ours = CausalLM(ModelConfig.from_dict(raw))
        theirs = transformers.AutoModelForCausalLM.from_config(theirs_config)
    shapes = {key: sorted(p.shape) for key, p in ours.named_parameters()}
    assert shapes == {key: sorted(p.shape) for key, p in theirs.named_parameters()}
    assert sum(p.numel() for p in ours.parameters()) == published


@pytest.mark.parametrize("name", REAL)
def test_real_configurations_mean_what_transformers_reads(name: str):
    """Also after transformers has written the file anew, with its own spelling of everything."""
    raw, _ = REAL[name]
    theirs = transformers.AutoConfig.for_model(**raw)
    written = json.loads(theirs.to_json_string(use_diff=False))
    ours, again = ModelConfig.from_dict(raw), ModelConfig.from_dict(written)
    for key in ("rope", "local_rope"):
        before, after = (getattr(config, key) for config in (ours, again))
        assert (before is None) == (after is None)
        if before is not None:
            assert {k: after.get(k) for k in before} == before
    same = {"rope": {}, "local_rope": None, "eos_token_ids": (), "dtype": ""}
    assert replace(ours, **same) == replace(again, **same)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_saved_model_loads_in_transformers(folders: dict[str, Path], tmp_path: Path, family: str):
    """Trained a little, so that what is compared is not the file it came from."""
    ours = minift.load_model(folders[family], attention="eager")
    ids = random_ids(ours.config, 2, 20)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.05 * torch.randn(p.shape))
        expected = ours(ids)
    save_model(ours, tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert written.keys() == load_file(folders[family] / "model.safetensors").keys()
    theirs = load_theirs(tmp_path / "saved", "eager")(ids).logits
    assert (theirs - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(minift.load_model(tmp_path / "saved", attention="eager")(ids), expected)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_4_bit_layers_multiply_with_their_decoded_weights(folders: dict[str, Path], family: str):
    """In transformers' model with those weights, the same logits to rounding."""
    ours = minift.load_model(folders[family], minift.QuantConfig(blocksize=32), attention="eager")
    theirs = load_theirs(folders[family], "eager")
    quantized = {name: m for name, m in ours.named_modules() if isinstance(m, Linear4bit)}
    assert len(quantized) >= 2 * 4
    with torch.no_grad():
        for name, layer in quantized.items():
            weight = theirs.get_parameter(f"{name}.weight")
            decoded = layer.dequantize()
            weight.copy_(decoded.t() if ours.config.family.transposed else decoded)
        ids = random_ids(ours.config, 2, 20)
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gpt2_and_base_models_are_saved_without_a_prefix(folders: dict[str, Path], tmp_path: Path):
    """The Hub's gpt2 has "wte.weight", not "transformer.wte.weight", and causal masks among its tensors."""
    for family, prefix in (("gpt2", "transformer."), ("llama", "model."), ("opt", "model.")):
        folder = tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text((folders[family] / "config.json").read_text())
        tensors = {k.removeprefix(prefix): v for k, v in load_file(folders[family] / "model.safetensors").items()}
        if family == "gpt2":
            tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        ids = torch.randint(3, 100, (1, 9))
        assert torch.equal(minift.load_model(folder)(ids), minift.load_model(folders[family])(ids))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_copies_are_models_of_their_own(folders: dict[str, Path], family: str):
    ours = minift.load_model(folders[family])
    other = copy.deepcopy(ours)
    ids = random_ids(ours.config, 1, 9)
    before = ours(ids)
    assert torch.equal(other(ids), before)
    with torch.no_grad():
        next(module for module in other.modules() if isinstance(module, SelfAttention)).o_proj.weight.mul_(3)
    assert torch.equal(ours(ids), before)
    assert not torch.equal(other(ids), before)


# --- 16 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FAMILY_CASES)
def test_16_bit_logits(tmp_path: Path, case: str, dtype: torch.dtype):
    """The same casts in the same order: the same bits in bf16, but for GPT-2, whose activation is rounded after each of
    its eight steps there and once here. In fp16 OPT's queries are scaled before the product, which may push a score
    below the normal numbers, and torch's product on a CPU rounds as the layout of its operands suggests. There, ours is
    as near to the fp32 model as theirs is, up to a factor of 2."""
    folder = checkpoint(tmp_path, **FAMILY_CASES[case])
    ours, theirs = minift.load_model(folder, dtype=dtype, attention="eager"), load_theirs(folder, "eager", dtype)
    ids = random_ids(ours.config, 3, 53)
    with torch.no_grad():
        logits, expected = ours(ids), theirs(ids).logits
        assert logits.dtype == expected.dtype == dtype
        if dtype is torch.bfloat16 and ours.config.model_type != "gpt2":
            assert torch.equal(logits, expected)
        else:
            exact = load_theirs(folder, "eager")(ids).logits
            assert (logits - exact).abs().max() <= 2 * (expected - exact).abs().max()


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_documents_of_a_pack_know_nothing_of_each_other(folders: dict[str, Path], family: str, attention: str):
    """Other tokens in one document: not one bit of the others' logits changes."""
    if attention == "sdpa" and family == "gemma2":
        attention = "eager"
    ours = minift.load_model(folders[family], attention=attention)
    lengths = [9, 1, 14, 6]
    documents = torch.tensor([[number for number, length in enumerate(lengths) for _ in range(length)]])
    positions = torch.tensor([[p for length in lengths for p in range(length)]])
    ids = random_ids(ours.config, *documents.shape)
    before = ours(ids, positions, documents)
    for number in range(len(lengths)):
        changed = torch.where(documents == number, (ids + 1) % 97 + 3, ids)
        after = ours(changed, positions, documents)
        others = documents[0] != number
        assert torch.equal(after[0, others], before[0, others])
        assert not torch.equal(after[0, ~others], before[0, ~others])


# --- longrope while generating ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [15, 19, 20, 30])
def test_generation_across_the_context_that_longrope_was_trained_on(tmp_path: Path, length: int):
    """The 21st token switches all positions to the long divisors, those in the cache, too."""
    folder = checkpoint(tmp_path, **FAMILY_CASES["phi3, longrope, beyond its context"])
    ours, theirs = minift.load_model(folder), load_theirs(folder, "sdpa")
    prompt = random_ids(ours.config, length).tolist()
    generated = torch.cat(list(generate_tokens(ours, [prompt], 12, stop_ids=()))).tolist()
    row = list(prompt)
    for _ in range(12):  # without a cache
        row.append(int(theirs(torch.tensor([row])).logits[0, -1].argmax()))
    assert generated == row[length:]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported; supported: llama"),
        ({"model_type": "gpt2", "n_embd": 64, "n_head": 5}, "a width of 64 cannot be split into 5 heads"),
        ({"model_type": "gpt2", "n_embd": None}, "n_embd must be a positive integer, got None"),
        ({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "add_cross_attention": True}, "add_cross_attention is set"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
        ({"model_type": "llama", "hidden_act": "mish"}, "activation 'mish' is not supported; supported: silu"),
        ({"model_type": "llama", "num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads evenly"),
        ({"model_type": "opt", "ffn_dim": None}, "ffn_dim must be a positive integer, got None"),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; supported: default, linear, llama3, yarn, longrope",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
            "rope type 'longrope' needs a long_factor of 8 numbers",
        ),
    ],
)
def test_what_cannot_be_computed_is_named(changes: dict[str, Any], words: str):
    raw = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
           "vocab_size": 99, "n_layer": 2, "n_head": 4}  # fmt: skip
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dict(raw | changes, "here/config.json")
    assert str(error.value).startswith("here/config.json: ") and words in str(error.value)


def test_sdpa_is_refused_where_scores_are_capped(folders: dict[str, Path]):
    with pytest.raises(ValueError, match="gemma2 caps its scores, which sdpa cannot; choose 'eager' or 'flash'"):
        minift.load_model(folders["gemma2"], attention="sdpa")
    assert minift.load_model(folders["gemma2"]).attention is eager


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_more_tokens_than_learned_positions_are_refused(tmp_path: Path, family: str):
    case = FAMILY_NAMES[family] | {"max_position_embeddings": 30, "n_positions": 30}
    ours = minift.load_model(checkpoint(tmp_path, **case))
    ours(random_ids(ours.config, 1, 30))
    with pytest.raises(ValueError, match="position 30 is beyond the 30 positions"):
        ours(random_ids(ours.config, 1, 31))


@pytest.mark.parametrize(
    ("device", "words"), [("cuda:99", "device 'cuda:99' cannot compute"), ("toaster", "device 'toaster' cannot")]
)
def test_a_device_that_cannot_is_named_before_loading(tiny: Path, device: str, words: str):
    with pytest.raises(ValueError, match=words):
        minift.load_model(tiny, device=device)
