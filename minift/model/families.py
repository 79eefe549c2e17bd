"""What differs between architectures, as data.

A family says which `model_type` of config.json it answers to and what a missing key of that file means for it. The
decoder (decoder.py) reads only the resulting ModelConfig, so a family is one row here rather than a subclass.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
        architecture: the class name that checkpoints carry in `architectures`.
        defaults: values of config.json keys that a checkpoint may leave out (transformers' own defaults).
        source: where the rules come from.
    """

    architecture: str
    defaults: dict[str, object]
    source: str


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "max_position_embeddings": 2048,
        },
        source="transformers/models/llama; Llama 1 to 3.3, TinyLlama, SmolLM 1 and 2",
    ),
}
