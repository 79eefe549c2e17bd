"""The kinds of things that a LoRA trains besides linear layers, on tiny models, here and in PEFT."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
import transformers
from torch import Tensor, nn

import minift
from minift.adapters.lora import LoraConfig
from minift.adapters.switched import switched

VOCAB = 50


def maker(parent: Path) -> Callable[[str], Path]:
    """Makes tiny random checkpoints by name, each once, under `parent`.

    Biases are random, too: among zeros an exchange would not be seen.
    """
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB}
    llama: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }  # fmt: skip
    configs = {
        "llama": lambda: transformers.LlamaConfig(**llama, **ends, tie_word_embeddings=True),
        "untied": lambda: transformers.LlamaConfig(**llama, **ends, tie_word_embeddings=False),
        "gemma": lambda: transformers.Gemma3TextConfig(**llama, **ends, head_dim=32, sliding_window=8),
        "opt": lambda: transformers.OPTConfig(
            hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=64,
            do_layer_norm_before=False, max_position_embeddings=40, dropout=0.0, **ends,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=2, n_positions=40, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **ends
        ),
    }  # fmt: skip
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = parent / name
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = transformers.AutoModelForCausalLM.from_config(configs[name]())
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.1 * torch.randn(parameter.shape))
                model.save_pretrained(made[name])
        return made[name]

    return make


TOKENS = (7, 3, 41)
# model, settings: each kind on the architectures where something about it is special.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("untied", {"target_modules": ("embed_tokens", "q_proj")}),
    "embedding, tied": ("llama", {"target_modules": ("embed_tokens",)}),
    "embedding, narrow": ("opt", {"target_modules": ("embed_tokens", "q_proj")}),
    "embedding, scaled": ("gemma", {"target_modules": ("embed_tokens", "v_proj")}),
    "embedding, pattern": ("untied", {"target_modules": r".*(embed_tokens|o_proj)", "rank_pattern": {"o_proj": 2}}),
    "embedding, DoRA": ("untied", {"target_modules": ("embed_tokens", "q_proj"), "use_dora": True}),
    "embedding, rsLoRA": ("untied", {"target_modules": ("embed_tokens", "q_proj"), "use_rslora": True}),
    "positions": ("gpt2", {"target_modules": ("wpe", "wte", "c_attn")}),
    "norms": ("llama", {"target_modules": ("q_proj",), "modules_to_save": ("norm",)}),
    "norms of OPT": ("opt", {"target_modules": ("q_proj",), "modules_to_save": ("layer_norm",)}),
    "whole head": ("untied", {"modules_to_save": ("lm_head",)}),
    "whole embedding": ("untied", {"target_modules": "all-linear", "modules_to_save": ("embed_tokens", "lm_head")}),
    "whole, shared": (
        "llama", {"target_modules": ("q_proj",), "modules_to_save": ("embed_tokens",), "ensure_weight_tying": True},
    ),
    "whole head, shared": (
        "opt", {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",), "ensure_weight_tying": True},
    ),
    "whole attention": ("llama", {"target_modules": ("q_proj", "up_proj"), "modules_to_save": ("self_attn",)}),
    "tokens, tied": ("llama", {"target_modules": ("q_proj",), "trainable_token_indices": TOKENS}),
    "tokens, untied": ("untied", {"target_modules": ("q_proj",), "trainable_token_indices": TOKENS}),
    "tokens of both": (
        "untied",
        {"target_modules": ("q_proj",), "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": (5, 3)}},
    ),
    "tokens of both, tied": (
        "llama",
        {"target_modules": ("q_proj",), "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    ),
    "tokens, narrow": ("opt", {"target_modules": ("q_proj",), "trainable_token_indices": TOKENS}),
    "tokens, scaled": ("gemma", {"target_modules": ("q_proj",), "trainable_token_indices": TOKENS}),
    "tokens of GPT-2": ("gpt2", {"target_modules": ("c_attn",), "trainable_token_indices": {"wte": TOKENS}}),
    "all biases": ("opt", {"target_modules": ("q_proj", "fc1"), "bias": "all"}),
    "all biases of GPT-2": ("gpt2", {"target_modules": ("c_attn",), "bias": "all"}),
    "biases of LoRA": ("opt", {"target_modules": ("q_proj", "fc1"), "bias": "lora_only"}),
    "everything": (
        "opt",
        {"target_modules": ("q_proj", "embed_positions"), "exclude_modules": ("embed_positions",), "bias": "lora_only",
         "modules_to_save": ("layer_norm",), "trainable_token_indices": TOKENS},
    ),
}  # fmt: skip


def config_of(kind: str) -> LoraConfig:
    return LoraConfig(r=3, alpha=5, **KINDS[kind][1])


def add_theirs(base: nn.Module, config: LoraConfig) -> Any:
    import peft

    def listed(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    tokens = config.trainable_token_indices
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=listed(config.target_modules),
        exclude_modules=listed(config.exclude_modules) or None,
        rank_pattern=dict(config.rank_pattern),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias=config.bias,  # pyright: ignore[reportArgumentType]
        modules_to_save=listed(config.modules_to_save) or None,
        trainable_token_indices={k: list(v) for k, v in tokens.items()} if isinstance(tokens, dict) else listed(tokens),
        ensure_weight_tying=config.ensure_weight_tying,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights
        return peft.get_peft_model(base, settings)


def our_tensors(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """What is trained, by its name in files; what PEFT writes twice, once."""
    found: dict[str, nn.Parameter] = {}
    for path, place in switched(model).items():
        if adapter in place.configs:
            for name, tensor in place.file_tensors(adapter, path).items():
                if not any(tensor is other for other in found.values()):
                    found[name] = tensor
    return found


def their_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    def name(key: str) -> str:
        key = key.removeprefix("base_model.model.").replace("modules_to_save.default.", "").replace(".default", "")
        return key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")

    return {name(key): value for key, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def randomize(ours: nn.Module, *theirs: nn.Module) -> None:
    """Other values than the initial ones (zeros hide mistakes), the same in all models."""
    for name, value in our_tensors(ours).items():
        value.add_(0.2 * torch.randn(value.shape))
        for model in theirs:
            their_tensors(model)[name].copy_(value)


def some_ids() -> Tensor:
    """Each trained token, twice in one row, and others."""
    ids = torch.randint(3, VOCAB, (2, 17))
    ids[0, 2:5] = torch.tensor(TOKENS)
    ids[0, 9] = TOKENS[0]
    return ids


def base_of(folder: Path, dtype: str = "float32") -> nn.Module:
    return peers.peer_base(folder, nf4=False, dtype=dtype)


def adapted(models: Any, kind: str, quantize: str | None = None) -> minift.CausalLM:
    ours = minift.load_model(models(KINDS[kind][0]), quantize)
    minift.add_lora(ours, config_of(kind))
    randomize(ours)
    return ours
