"""A model's shape, read from the config.json of a Hugging Face checkpoint.

Old checkpoints write rotary settings as `rope_theta` and `rope_scaling`, transformers 5 as `rope_parameters`; both are
read. What this library does not compute is refused by name, because a setting that is silently ignored gives a model
that answers almost right.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minift.model.families import DEFAULTS, FAMILIES, Family
from minift.quant.config import QuantConfig

# Rotary types, and the numbers that each needs (see rope.py).
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings"),
}
# Activations by their names in config.json (see layers.py). "gelu_new" and "gelu_pytorch_tanh" are the same formula.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that fix a decoder's shape and arithmetic. Names as in config.json where it has one.

    What the architecture decides is in `family` (families.py); what the file decides is here.

    Attributes:
        rope: `rope_type`, `rope_theta` and whatever the type needs (see rope.py).
        local_rope: the same for layers with a window, where they have their own (Gemma 3).
        windows: for each layer, how many tokens back it sees, itself included; None is all.
        rotary: for each layer, whether it turns queries and keys by position.
        embedding_size: width of embeddings and head; opt-350m's are narrower than its blocks.
        attention_scale: what scores are multiplied by.
        attention_softcap, logit_softcap: what scores and logits cannot exceed; 0 is no limit.
        norm_eps, norm_affine: of all norms; without affine a LayerNorm has no parameters (Galactica).
        norm_sum: norms come after each addition (opt-350m), and there is none at the end.
        quantization: the format of a checkpoint that is quantized already.
        generation: the content of generation_config.json (see generate.py).
        raw: the whole config.json, for writing it again (save.py).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: dict[str, Any]
    local_rope: dict[str, Any] | None
    windows: tuple[int | None, ...]
    rotary: tuple[bool, ...]
    embedding_size: int
    activation: str
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    norm_affine: bool
    norm_sum: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str
    quantization: QuantConfig | None = None
    generation: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `config.json`, and the end-of-text ids of `generation_config.json` where there is one.

        Raises:
            FileNotFoundError: no config.json.
            ValueError: malformed, or an architecture or setting that is not supported; names file and key.
        """
        path = Path(folder) / "config.json"
        raw = _read_json(path)
        companion = Path(folder) / "generation_config.json"
        generation = _read_json(companion) if companion.is_file() else {}
        eos = generation.get("eos_token_id", raw.get("eos_token_id"))
        return replace(cls.from_dict(raw | {"eos_token_id": eos}, str(path)), raw=raw, generation=generation)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config") -> "ModelConfig":
        """Build from the content of a config.json; `where` names it in errors."""
        model_type = raw.get("model_type")
        if model_type not in FAMILIES:
            known = ", ".join(f"{name} ({family.source})" for name, family in FAMILIES.items())
            raise ValueError(f"{where}: model_type {model_type!r} is not supported; supported: {known}")
        family, content = FAMILIES[model_type], raw
        for key in family.refused:
            if raw.get(key):
                raise ValueError(f"{where}: {key} is set, and what it asks for is not computed here")
        ours = {ours: raw[theirs] for ours, theirs in family.keys.items() if theirs in raw}
        raw = DEFAULTS | family.defaults | {key: v for key, v in (raw | ours).items() if v is not None}

        def need(key: str) -> int:
            if not isinstance(raw.get(key), int) or raw[key] <= 0:
                name = family.keys.get(key, key)
                raise ValueError(f"{where}: {name} must be a positive integer, got {raw.get(key)!r}")
            return raw[key]

        hidden, heads = need("hidden_size"), need("num_attention_heads")
        if family.learned is not None:  # older than grouped heads: what such a file says of them means nothing
            raw = raw | {"num_key_value_heads": heads, "head_dim": None}
        raw.setdefault("num_key_value_heads", heads)
        if raw.get("head_dim") is None:
            raw["head_dim"] = hidden // heads
            if hidden % heads:
                raise ValueError(f"{where}: a width of {hidden} cannot be split into {heads} heads; give a head_dim")
        raw.setdefault("embedding_size", hidden)
        if model_type == "gpt2":
            raw.setdefault("intermediate_size", 4 * hidden)  # n_inner may be null
        groups = need("num_key_value_heads")
        if heads % groups:
            raise ValueError(f"{where}: {heads} query heads cannot share {groups} key/value heads evenly")
        if raw["hidden_act"] not in ACTIVATIONS:
            raise ValueError(
                f"{where}: activation {raw['hidden_act']!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        activation = ACTIVATIONS[raw["hidden_act"]]
        if model_type == "gemma" and activation == "gelu":  # the first Gemma files say so and mean the other
            activation = "gelu_tanh"
        eos = raw.get("eos_token_id")
        rotary = _rotary(raw, family, where)
        # Here null is a value: no window, no cap.
        window, score_cap, logit_cap = (
            content.get(key, raw.get(key))
            for key in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
        )
        rope, local_rope = _ropes(raw, family, where)
        quantization = raw.get("quantization_config")
        return cls(
            model_type=model_type,
            vocab_size=need("vocab_size"),
            hidden_size=hidden,
            intermediate_size=need("intermediate_size"),
            num_hidden_layers=need("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=need("head_dim"),
            max_position_embeddings=need("max_position_embeddings"),
            norm_eps=float(raw["rms_norm_eps"]),
            rope=rope,
            local_rope=local_rope,
            windows=_windows(raw, family, window, rotary, where),
            rotary=rotary,
            embedding_size=need("embedding_size"),
            activation=activation,
            attention_scale=_attention_scale(raw),
            attention_softcap=float(score_cap or 0.0),
            logit_softcap=float(logit_cap or 0.0),
            qkv_bias=raw["attention_bias"] if family.qkv_bias is None else family.qkv_bias,
            o_bias=raw["attention_bias"] if family.o_bias is None else family.o_bias,
            mlp_bias=raw["mlp_bias"],
            norm_affine=raw.get("layer_norm_elementwise_affine", True),
            norm_sum=not raw.get("do_layer_norm_before", True),
            tie_word_embeddings=raw["tie_word_embeddings"],
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            dtype=str(raw.get("dtype", raw.get("torch_dtype", "float32"))),
            quantization=QuantConfig.from_json(quantization, where) if quantization else None,
            raw=content,
        )


def _attention_scale(raw: dict[str, Any]) -> float:
    if not raw.get("scale_attn_weights", True):
        return 1.0
    return raw.get("query_pre_attn_scalar", raw["head_dim"]) ** -0.5


def _rotary(raw: dict[str, Any], family: Family, where: str) -> tuple[bool, ...]:
    """Which layers turn queries and keys."""
    layers = raw["num_hidden_layers"]
    if not family.nope:
        return (family.learned is None,) * layers
    listed = raw.get("no_rope_layers")
    if listed is None:
        interval = raw["no_rope_layer_interval"]
        listed = [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(listed) != layers:
        raise ValueError(f"{where}: no_rope_layers lists {len(listed)} layers, the model has {layers}")
    return tuple(map(bool, listed))


def _windows(
    raw: dict[str, Any], family: Family, window: Any, rotary: tuple[bool, ...], where: str
) -> tuple[int | None, ...]:
    """How many tokens each layer sees."""
    layers = raw["num_hidden_layers"]
    off = not family.windowed or window is None or not raw.get("use_sliding_window", True)
    if off:
        return (None,) * layers
    if not isinstance(window, int) or window <= 0:
        raise ValueError(f"{where}: sliding_window must be a positive integer or null, got {window!r}")
    if family.windowed == "all":
        return (window,) * layers
    listed = raw.get("layer_types")
    if listed is None:
        chosen = [layer >= raw.get("max_window_layers", layers) for layer in range(layers)]
        if family.nope:
            chosen = [not turns for turns in rotary]
        if "sliding_window_pattern" in raw:  # Gemma: every n-th layer sees everything
            chosen = [(layer + 1) % raw["sliding_window_pattern"] != 0 for layer in range(layers)]
        listed = ["sliding_attention" if has_window else "full_attention" for has_window in chosen]
    unknown = set(listed) - {"sliding_attention", "full_attention"}
    if len(listed) != layers or unknown:
        found = f"unknown {min(unknown)!r}" if unknown else f"{len(listed)} layers, the model has {layers}"
        raise ValueError(f"{where}: layer_types lists {found}")
    return tuple(window if kind == "sliding_attention" else None for kind in listed)


def _ropes(raw: dict[str, Any], family: Family, where: str = "config") -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rotary settings, and those of layers with a window where they differ.

    Three spellings: `rope_theta` and `rope_scaling` (before transformers 5), `rope_parameters` with everything in it,
    and `rope_parameters` for each kind of layer (Gemma 3, whose older files have `rope_local_base_freq`).

    Raises:
        ValueError: a type that is not known, or a number that it lacks.
    """
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    local_theta = raw.get("rope_local_base_freq")
    if local_theta is None:
        return _rope(raw, given, family, where), None
    local: dict[str, Any] = {}
    if "full_attention" in given or "sliding_attention" in given:
        given, local = given.get("full_attention") or {}, given.get("sliding_attention") or {}
    return _rope(raw, given, family, where), _rope(raw | {"rope_theta": local_theta}, local, family, where)


def _rope(raw: dict[str, Any], given: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(raw["rope_theta"])} | given
    rope["rope_type"] = given.get("rope_type", given.get("type", "default"))
    if rope["rope_type"] in ("su", "yarn") and family is FAMILIES["phi3"]:
        rope["rope_type"] = "longrope"  # what the first Phi-3 files called it
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"{where}: rope type {rope['rope_type']!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    longest = raw["max_position_embeddings"]
    trained = raw.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", longest))
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = trained
    if rope["rope_type"] in ("yarn", "longrope") and rope.get("factor") is None:
        rope["factor"] = longest / trained
    for key in ("rope_theta", *ROPE_TYPES[rope["rope_type"]]):
        if not isinstance(rope.get(key), int | float) or not rope[key] > 0:
            raise ValueError(f"{where}: rope type {rope['rope_type']!r} needs a positive {key}, got {rope.get(key)!r}")
    rope.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    pairs = int(raw["head_dim"] * rope["partial_rotary_factor"]) // 2
    for key in ("short_factor", "long_factor") if rope["rope_type"] == "longrope" else ():
        if not isinstance(rope.get(key), list) or len(rope[key]) != pairs:
            raise ValueError(f"{where}: rope type 'longrope' needs a {key} of {pairs} numbers, got {rope.get(key)!r}")
    return rope


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a model folder needs config.json, tokenizer.json and *.safetensors"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content
