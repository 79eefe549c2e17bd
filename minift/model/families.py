"""What differs between architectures, as data.

A family says which `model_type` of config.json it answers to, what its checkpoints call their parts, what a missing
key of config.json means, and the few things that no key tells. One decoder (decoder.py, layers.py) reads the resulting
ModelConfig, so a family is one row here rather than a subclass:

    llama        the reference: RMS norms, rotary positions, gated SiLU, no biases unless the file says so
    mistral      every layer sees only the last `sliding_window` tokens (newer checkpoints: null, everything)
    qwen2        biases on q, k and v but not on o; upper layers may have a window
    qwen3        q and k of each head are normalized before they are turned; no biases
    smollm3      every fourth layer is not rotary (NoPE): it sees what was said, but not where
    phi3         q, k, v in one matrix, gate and up in another; longrope stretches the rotation; part of a head may turn
    gemma        norms multiply by 1 + weight; embeddings times sqrt(width); gated GELU
    gemma2       as gemma; norms around each part; tanh caps scores and logits; every other layer has a window
    gemma3_text  as gemma2 with q and k norms instead of caps; windowed layers turn with a base of their own
    opt          learned positions, LayerNorm, plain ReLU MLP; opt-350m: narrow embeddings, norms after each part
    gpt2         learned positions, LayerNorm, q, k, v in one matrix; linears stored transposed (Conv1D)

A model's attributes have the names of its family's checkpoints, so that files need no translation, and an adapter finds
its targets under the names that everybody knows ("q_proj" in Llama, "c_attn" in GPT-2). The code in this folder speaks
of roles; `names` says what a role is called:

    decoder      the blocks and what is around them      norms of a block    before attention, before the MLP,
    embed_*      tokens and positions                                        and after each, where there are any
"""

from dataclasses import dataclass, field
from typing import Any

# Roles and their names in Llama's checkpoints; a role that is not listed in a family's `names` is called so there, too.
NAMES = {
    "decoder": "model",
    "embed_tokens": "embed_tokens",
    "embed_positions": "embed_positions",
    "layers": "layers",
    "final_norm": "norm",
    "attention": "self_attn",
    "mlp": "mlp",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
        architecture: the class name that checkpoints carry in `architectures`.
        source: where the rules come from, and which models follow them.
        names: role -> name in checkpoints, where it is not Llama's. A dot means a module within a module; an empty
            `mlp`: its two linears belong to the block itself.
        keys: our key -> what config.json calls it.
        defaults: values of config.json keys (ours) that a checkpoint may leave out (transformers' own defaults).
        qkv_bias, o_bias: whether these projections have biases; None: as the key `attention_bias` says.
        qk_norm: queries and keys are RMS-normalized over each head's width, before the rotation.
        fused: q, k and v are one matrix, and so are gate and up where the MLP is gated.
        gated: the MLP multiplies two projections, one through the activation; else it is two linears and an activation.
        transposed: linear weights are stored [in, out], except the head's.
        norm: "rms", "rms + 1" (the weight is what to add to 1) or "layer" (LayerNorm, with biases).
        norms_after: the outputs of attention and MLP are normalized, too, before they are added.
        learned: positions are looked up in a table, this many rows further down; None: they are rotary.
        scaled_embedding: embeddings are multiplied by sqrt(hidden_size), rounded to their dtype.
        windowed: layers may see a limited number of tokens: "all" of them, or those that the file "lists".
        nope: some layers leave out the rotation, those where `no_rope_layers` is 0.
        refused: keys of config.json that must be false or missing, because their meaning is not computed here.
    """

    architecture: str
    source: str
    names: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    fused: bool = False
    gated: bool = True
    transposed: bool = False
    norm: str = "rms"
    norms_after: bool = False
    learned: int | None = None
    scaled_embedding: bool = False
    windowed: str = ""
    nope: bool = False
    refused: tuple[str, ...] = ()

    def name(self, role: str) -> str:
        """What this family's checkpoints call a part."""
        return self.names.get(role, NAMES.get(role, role))


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
GEMMA = {
    "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
GEMMA_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
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
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        source="transformers/models/phi3; Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        defaults={
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        qkv_bias=False,
        o_bias=False,
        fused=True,
        windowed="all",
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        source="transformers/models/gemma; Gemma 1",
        defaults=GEMMA | {"num_key_value_heads": 16},
        norm="rms + 1",
        scaled_embedding=True,
        refused=("use_bidirectional_attention",),
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        source="transformers/models/gemma2; Gemma 2",
        names=GEMMA_NORMS,
        keys={"hidden_act": "hidden_activation"},
        defaults=GEMMA | {
            "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 2, "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        norm="rms + 1",
        norms_after=True,
        scaled_embedding=True,
        windowed="lists",
        refused=("use_bidirectional_attention",),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        source="transformers/models/gemma3; Gemma 3 without pictures",
        names=GEMMA_NORMS,
        keys={"hidden_act": "hidden_activation"},
        defaults=GEMMA | {
            "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
            "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        },
        qk_norm=True,
        norm="rms + 1",
        norms_after=True,
        scaled_embedding=True,
        windowed="lists",
        refused=("use_bidirectional_attention",),
    ),
    "opt": Family(
        architecture="OPTForCausalLM",
        source="transformers/models/opt; OPT-125m to 66b",
        names={
            "decoder": "model.decoder", "final_norm": "final_layer_norm", "o_proj": "out_proj", "mlp": "",
            "attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm",
            "up_proj": "fc1", "down_proj": "fc2",
        },
        keys={
            "intermediate_size": "ffn_dim", "hidden_act": "activation_function", "attention_bias": "enable_bias",
            "mlp_bias": "enable_bias", "embedding_size": "word_embed_proj_dim",
        },
        defaults={
            "hidden_act": "relu", "rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True,
            "tie_word_embeddings": True, "do_layer_norm_before": True, "layer_norm_elementwise_affine": True,
        },
        gated=False,
        norm="layer",
        learned=2,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        source="transformers/models/gpt2; GPT-2, DistilGPT-2",
        names={
            "decoder": "transformer", "embed_tokens": "wte", "embed_positions": "wpe", "layers": "h",
            "final_norm": "ln_f", "attention": "attn", "attention_norm": "ln_1", "mlp_norm": "ln_2",
            "qkv_proj": "c_attn", "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj",
        },
        keys={
            "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head", "max_position_embeddings": "n_positions", "rms_norm_eps":
            "layer_norm_epsilon", "hidden_act": "activation_function",
        },
        defaults={
            "hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "max_position_embeddings": 1024, "mlp_bias": True,
            "tie_word_embeddings": True, "scale_attn_weights": True,
        },
        qkv_bias=True,
        o_bias=True,
        fused=True,
        gated=False,
        transposed=True,
        norm="layer",
        learned=0,
        refused=("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"),
    ),
}  # fmt: skip
