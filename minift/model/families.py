"""What differs between architectures, as data.

A family says which `model_type` of config.json it answers to, what a missing key of that file means, and the few
things that no key tells. The decoder (decoder.py) reads only the resulting ModelConfig, so a family is one row here
rather than a subclass:

    llama     the reference: no biases unless the file says so, every layer rotary and with all earlier tokens in sight
    mistral   every layer sees only the last `sliding_window` tokens (newer checkpoints: null, everything)
    qwen2     biases on q, k and v but not on o; upper layers may have a window
    qwen3     q and k of each head are normalized before they are turned; no biases
    smollm3   every fourth layer is not rotary (NoPE): it sees what was said, but not where
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
        architecture: the class name that checkpoints carry in `architectures`.
        source: where the rules come from, and which models follow them.
        defaults: values of config.json keys that a checkpoint may leave out (transformers' own defaults).
        qkv_bias, o_bias: whether these projections have biases; None: as the key `attention_bias` says.
        qk_norm: queries and keys are RMS-normalized over each head's width, before the rotation.
        windowed: layers may see a limited number of tokens: "all" of them, or those that the file "lists".
        nope: some layers leave out the rotation, those where `no_rope_layers` is 0.
    """

    architecture: str
    source: str
    defaults: dict[str, Any] = field(default_factory=dict)
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    windowed: str = ""
    nope: bool = False


# What all of them share.
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        source="transformers/models/llama; Llama 1 to 3.3, TinyLlama, SmolLM 1 and 2",
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        source="transformers/models/mistral; Mistral 7B",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        windowed="all",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        source="transformers/models/qwen2; Qwen2, Qwen2.5",
        defaults={
            "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
            "use_sliding_window": False, "max_window_layers": 28,
        },
        qkv_bias=True,
        o_bias=False,
        windowed="lists",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        source="transformers/models/qwen3; Qwen3, dense",
        defaults={
            "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
            "use_sliding_window": False, "max_window_layers": 28, "head_dim": 128,
        },
        qk_norm=True,
        windowed="lists",
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        source="transformers/models/smollm3; SmolLM3",
        defaults={
            "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2000000.0,
            "tie_word_embeddings": True, "use_sliding_window": False, "no_rope_layer_interval": 4,
        },
        windowed="lists",
        nope=True,
    ),
}  # fmt: skip
