"""What a LoRA is asked to train besides linear layers and cannot: refused by name, and the model stays as it was.

And the numbers of parameters in Godoy's book (chapter 3), from the real configurations on the meta device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from book_models import OPT, PHI3, on_meta
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minift
from minift.adapters.inject import count_parameters
from minift.adapters.lora import LoraConfig
from minift.adapters.many import combine, set_adapter
from minift.adapters.switched import switched
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.quant import QuantConfig, quantize_model, swap_linears

ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 50}
LLAMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def model_of(name: str) -> CausalLM:
    """A random model: tied or untied Llama, OPT, GPT-2."""
    config = {
        "tied": lambda: transformers.LlamaConfig(**LLAMA, **ENDS, tie_word_embeddings=True),
        "untied": lambda: transformers.LlamaConfig(**LLAMA, **ENDS, tie_word_embeddings=False),
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=40, **ENDS),
        "opt": lambda: transformers.OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32, **ENDS
        ),
    }[name.removesuffix(", nf4").removesuffix(", all of it")]()
    model = CausalLM(ModelConfig.from_dict(config.to_dict()))
    if name.endswith("nf4"):
        quantize_model(model)
    if name.endswith("all of it"):
        quantize_model(model, QuantConfig(skip=()))
    return model


def assert_refused(model: nn.Module, words: list[str], act: Callable[[], object]) -> None:
    """One line that holds the words, and not a tensor, a module or a flag has changed."""

    def state() -> list:
        tensors = [(name, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
        return [*tensors, [(name, type(m)) for name, m in model.named_modules()]]

    before = state()
    with pytest.raises(ValueError) as error:
        act()
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message
    after = state()
    assert after[-1] == before[-1]
    for (name, flag, tensor), (other, other_flag, value) in zip(before[:-1], after[:-1], strict=True):
        assert (name, flag) == (other, other_flag) and torch.equal(tensor, value)


Q: dict[str, Any] = {"target_modules": ("q_proj",)}
REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("tied", Q | {"bias": "all"}, ["bias='all'", "this model has no biases"]),
    ("tied", Q | {"bias": "lora_only"}, ["bias='lora_only'", "adapted layers have no biases"]),
    ("tied", Q | {"modules_to_save": ("nothing", "norm")}, ["no module is called nothing", "embed_tokens", "q_proj"]),
    ("tied", Q | {"modules_to_save": ("layers",)}, ["model.layers is only a list"]),
    ("tied", Q | {"modules_to_save": ("mlp", "gate_proj")}, ["gate_proj is a part of model.layers.0.mlp"]),
    ("tied", Q | {"modules_to_save": ("embed_tokens",)}, ["model.embed_tokens shares its matrix with lm_head",
                                                          "ensure_weight_tying=True"]),
    ("tied", Q | {"modules_to_save": ("lm_head",)}, ["lm_head shares its matrix with model.embed_tokens"]),
    ("tied", {"modules_to_save": ("q_proj",), "target_modules": ("q_proj",)}, ["modules_to_save=('q_proj',)"]),
    ("tied", {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True, "target_modules": ("lm_head",)},
     ["one LoRA for both"]),
    ("tied", {"ensure_weight_tying": True, "target_modules": ("embed_tokens",)}, ["one LoRA for both"]),
    ("untied", Q | {"ensure_weight_tying": True}, ["ensure_weight_tying", "a matrix of its own"]),
    ("untied, nf4", Q | {"modules_to_save": ("mlp",)}, ["model.layers.0.mlp is quantized"]),
    ("untied, all of it", Q | {"modules_to_save": ("lm_head",)}, ["lm_head is quantized"]),
    ("gpt2", {"target_modules": ("c_attn",), "modules_to_save": ("mlp",)}, ["transposed"]),
    ("tied", Q | {"trainable_token_indices": (3, 50)}, ["model.embed_tokens has 50 rows", "no 50"]),
    ("tied", Q | {"trainable_token_indices": {"wte": (3,)}}, ["no module is called wte"]),
    ("tied", Q | {"trainable_token_indices": {"norm": (3,)}}, ["model.norm is a RMSNorm"]),
    ("tied", Q | {"trainable_token_indices": {"lm_head": (3,)}}, ["lm_head and model.embed_tokens share one matrix"]),
    ("tied", Q | {"trainable_token_indices": {"lm_head": (3,), "embed_tokens": (4,)}}, ["need the same rows"]),
    ("untied, all of it", Q | {"trainable_token_indices": {"lm_head": (3,)}}, ["lm_head is quantized"]),
    ("untied", {"target_modules": ("embed_tokens",), "trainable_token_indices": (3,)}, ["embed_tokens is adapted"]),
    ("untied", Q | {"modules_to_save": ("embed_tokens",), "trainable_token_indices": (3,)}, ["saved whole already"]),
    ("tied", {"target_modules": ("lm_head",), "trainable_token_indices": (3,)}, ["lm_head shares what is trained"]),
    ("tied", {"target_modules": ("embed_tokens",), "init": "loftq"}, ["'loftq'", "model.embed_tokens is an embedding"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "words"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused(name: str, options: dict[str, Any], words: list[str]):
    model = model_of(name)
    assert_refused(model, words, lambda: minift.add_lora(model, LoraConfig(r=2, **options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "some"}, "'some': choose one of none, all, lora_only"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, got 'lm_head'"),
        ({"modules_to_save": [3]}, "modules_to_save must be a list"),
        ({"modules_to_save": [""]}, "modules_to_save must be a list"),
        ({"trainable_token_indices": []}, "must be token ids"),
        ({"trainable_token_indices": [-1]}, "must be token ids"),
        ({"trainable_token_indices": ["a"]}, "must be token ids"),
        ({"trainable_token_indices": [True]}, "must be token ids"),
        ({"trainable_token_indices": 3}, "must be token ids, got 3"),
        ({"trainable_token_indices": {"embed_tokens": []}}, "must be token ids"),
        ({"trainable_token_indices": [3, 4, 3]}, "a token twice"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_a_module_without_parameters_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    config = LoraConfig(r=1, target_modules=("0",), modules_to_save=("1",))
    assert_refused(model, ["1 has no parameters"], lambda: minift.add_lora(model, config))
    config = LoraConfig(r=1, target_modules=("0",), trainable_token_indices=(1,))
    assert_refused(model, ["name the embedding"], lambda: minift.add_lora(model, config))


def test_what_another_adapter_has_changed_in_another_way_is_refused():
    model = model_of("untied")
    minift.add_lora(model, LoraConfig(r=1, target_modules=("embed_tokens", "lm_head")), "one")
    set_adapter(model, [])
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"modules_to_save": ("lm_head",)}, ["another adapter has changed lm_head"]),
        ({"trainable_token_indices": (3,)}, ["model.embed_tokens is a LoraEmbedding"]),
    ]
    for options, words in cases:
        config = LoraConfig(r=1, target_modules=("q_proj",), **options)
        assert_refused(model, words, lambda config=config: minift.add_lora(model, config, "two"))
    model = model_of("untied")
    minift.add_lora(model, LoraConfig(r=1, target_modules=("q_proj",), modules_to_save=("lm_head", "norm")), "one")
    config = LoraConfig(r=1, target_modules=("lm_head",))
    assert_refused(model, ["lm_head"], lambda: minift.add_lora(model, config, "two"))
    with pytest.raises(ValueError, match=r"its own .*only low-rank changes can be combined"):
        combine(model, ["one"], [1.0], "sum", "cat")


# --- files ------------------------------------------------------------------------------------------------------------

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
WHOLE = {"modules_to_save": ("norm",)}
TOKENS = {"trainable_token_indices": (3, 4)}
SHARED = {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True}
ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("name", "options", "change", "words"),
    [
        ("tied", WHOLE, lambda t: t.pop("model.norm.weight"), ["lacks", "model.norm.weight"]),
        ("tied", WHOLE, lambda t: t.update({"model.norm.weight": torch.ones(31)}), ["model.norm", "(31,)", "(32,)"]),
        ("tied", TOKENS, lambda t: t.pop(ROWS), ["lacks", ROWS]),
        ("tied", TOKENS, lambda t: t.update({ROWS: torch.ones(1, 32)}), ["(1, 32)", "(2, 32)"]),
        ("tied", SHARED, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}), ["lm_head.weight differ"]),
        ("opt", {"bias": "all"}, lambda t: t.pop("model.decoder.layers.0.fc1.bias"), ["lacks", "layers.0.fc1.bias"]),
        (
            "untied",
            {"target_modules": ("embed_tokens",)},
            lambda t: t.update({"model.embed_tokens.base_layer.weight": torch.ones(50, 32)}),
            ["model.embed_tokens.base_layer.weight", "is not the model.embed_tokens (50, 32) of this model"],
        ),
        ("untied", {}, lambda t: t.update({"model.embed_tokens.weight": torch.ones(51, 32)}), ["(51, 32)", "(50, 32)"]),
        ("untied", {}, lambda t: t.update({"model.norm.weight": torch.ones(32)}), ["model.norm.weight is not a LoRA"]),
        ("untied", {"target_modules": ("embed_tokens",)}, lambda t: t.pop("model.embed_tokens.lora_embedding_A"),
         ["model.embed_tokens lacks lora_embedding_A"]),
        (
            "untied",
            {"target_modules": ("embed_tokens",)},
            lambda t: t.update({"model.embed_tokens.lora_embedding_A": torch.ones(2, 49)}),
            ["(2, 49)", "(2, 50)"],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, options: dict[str, Any], change: Callable[[dict[str, Tensor]], object], words: list[str]
):
    model = model_of(name)
    minift.add_lora(model, LoraConfig(r=2, **(Q | options)))
    minift.save_adapter(model, tmp_path)
    tensors = {key.removeprefix(PREFIX): value for key, value in load_file(tmp_path / WEIGHTS).items()}
    change(tensors)
    save_file({PREFIX + key: value for key, value in tensors.items()}, tmp_path / WEIGHTS)
    fresh = model_of(name)
    assert_refused(fresh, words, lambda: minift.load_adapter(fresh, tmp_path))


@pytest.mark.parametrize("table", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_table_that_the_model_has_already_is_accepted(tmp_path: Path, table: str):
    """PEFT saves tables of other sizes than in its checkpoint; a model that was resized in the same way has them."""
    model = model_of("untied")
    minift.add_lora(model, LoraConfig(r=2, **Q))
    minift.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS) | {PREFIX + table: model.get_parameter(table).detach().bfloat16()}
    save_file(tensors, tmp_path / WEIGHTS)
    base = {name: p for name, p in model.state_dict().items() if "lora" not in name}
    fresh = model_of("untied")
    fresh.load_state_dict({name.replace(".base.", "."): p for name, p in base.items()})
    assert_refused(fresh, [table], lambda: minift.load_adapter(fresh, tmp_path))  # bf16 has lost digits
    fresh.to(torch.bfloat16)
    minift.load_adapter(fresh, tmp_path)
    assert not [path for path in switched(fresh) if path in table]


def test_half_of_a_tied_pair_is_read_from_a_file_as_it_was_trained(tmp_path: Path):
    """PEFT trains it so unless told otherwise; the head keeps the original then."""
    model = model_of("untied")
    minift.add_lora(model, LoraConfig(r=2, **Q, modules_to_save=("embed_tokens",)))
    with torch.no_grad():
        model.decoder.embed_tokens.weight.add_(1)
    minift.save_adapter(model, tmp_path)
    tied = model_of("tied")
    head = tied.lm_head.weight.detach().clone()
    minift.load_adapter(tied, tmp_path)
    assert torch.equal(tied.decoder.embed_tokens.weight, model.decoder.embed_tokens.weight)
    assert torch.equal(tied.lm_head.weight, head) and type(tied.lm_head) is nn.Linear
    minift.merge_lora(tied)
    assert not tied.config.tie_word_embeddings
    assert torch.equal(tied.lm_head.weight, head)


# --- counts -----------------------------------------------------------------------------------------------------------

QV = ("q_proj", "v_proj")
PHI3_TARGETS = ("o_proj", "qkv_proj", "gate_up_proj", "down_proj")


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    ("base", "options", "trained", "total", "percent"),
    [
        (OPT, {"target_modules": QV}, 786_432, 331_982_848, 0.2369),
        (OPT, {"target_modules": QV, "modules_to_save": ("layer_norm",)}, 884_736, 332_081_152, 0.2664),
        (
            OPT,
            {"target_modules": QV, "modules_to_save": ("layer_norm", "embed_tokens"), "ensure_weight_tying": True},
            26_624_000,
            357_820_416,
            7.4406,
        ),
        # In the book's PEFT, the head is untied then, and its 50272 * 512 numbers count again: 358,128,384 (0.3330 %).
        (OPT, {"target_modules": (*QV, "embed_tokens")}, 1_192_704, 358_128_384 - 50_272 * 512, 0.3588),
        (PHI3, {"target_modules": PHI3_TARGETS}, 12_582_912, 3_833_662_464, 0.3282),
    ],
    ids=["opt", "opt + norms", "opt + norms + embedding", "opt, LoRA on the embedding", "phi3"],
)
def test_the_counts_of_the_book(
    base: transformers.PretrainedConfig,
    options: dict[str, Any],
    trained: int,
    total: int,
    percent: float,
    quantize: bool,
):
    model = on_meta(base)
    if quantize:
        swap_linears(model, QuantConfig())
    minift.add_lora(model, LoraConfig(r=8, **options))
    assert count_parameters(model) == (trained, total)
    assert round(100 * trained / total, 4) == percent
