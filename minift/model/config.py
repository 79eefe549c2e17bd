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
}


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that fix a decoder's shape and arithmetic. Names as in config.json.

    `windows` and `rotary` hold a value for each layer: how many tokens back it sees (itself included; None is all), and
    whether it turns queries and keys by position. What the others of one or two words mean: families.py.
    `rope` holds `rope_type`, `rope_theta` and whatever the type needs (see rope.py). `quantization` is the format of a
    checkpoint that is quantized already. `raw` is the whole config.json, for writing it again (save.py).
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
    rms_norm_eps: float
    rope: dict[str, Any]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    windows: tuple[int | None, ...] = ()
    rotary: tuple[bool, ...] = ()
    quantization: QuantConfig | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `config.json`, and the end-of-text ids of `generation_config.json` where there is one.

        Raises:
            FileNotFoundError: no config.json.
            ValueError: malformed, or an architecture or setting that is not supported; names file and key.
        """
        path = Path(folder) / "config.json"
        raw = _read_json(path)
        generation = Path(folder) / "generation_config.json"
        if generation.is_file():
            eos = _read_json(generation).get("eos_token_id", raw.get("eos_token_id"))
        else:
            eos = raw.get("eos_token_id")
        return replace(cls.from_dict(raw | {"eos_token_id": eos}, str(path)), raw=raw)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config") -> "ModelConfig":
        """Build from the content of a config.json; `where` names it in errors."""
        model_type = raw.get("model_type")
        if model_type not in FAMILIES:
            known = ", ".join(f"{name} ({family.source})" for name, family in FAMILIES.items())
            raise ValueError(f"{where}: model_type {model_type!r} is not supported; supported: {known}")
        content, quantization = raw, raw.get("quantization_config")
        family = FAMILIES[model_type]
        raw = DEFAULTS | family.defaults | {key: value for key, value in raw.items() if value is not None}

        def need(key: str) -> int:
            if not isinstance(raw.get(key), int) or raw[key] <= 0:
                raise ValueError(f"{where}: {key} must be a positive integer, got {raw.get(key)!r}")
            return raw[key]

        hidden, heads = need("hidden_size"), need("num_attention_heads")
        raw.setdefault("num_key_value_heads", heads)
        raw.setdefault("head_dim", hidden // heads)
        groups = need("num_key_value_heads")
        if heads % groups:
            raise ValueError(f"{where}: {heads} query heads cannot share {groups} key/value heads evenly")
        if raw["hidden_act"] not in ("silu", "swish"):
            raise ValueError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
        eos = raw.get("eos_token_id")
        rotary = _rotary(raw, family, where)
        window = content.get("sliding_window", raw.get("sliding_window"))  # null is a value: no window
        windows = _windows(raw, family, window, rotary, where)
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
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope=_rope(raw, where),
            qkv_bias=raw["attention_bias"] if family.qkv_bias is None else family.qkv_bias,
            o_bias=raw["attention_bias"] if family.o_bias is None else family.o_bias,
            mlp_bias=raw["mlp_bias"],
            qk_norm=family.qk_norm,
            tie_word_embeddings=raw["tie_word_embeddings"],
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            dtype=str(raw.get("dtype", raw.get("torch_dtype", "float32"))),
            windows=windows,
            rotary=rotary,
            quantization=QuantConfig.from_json(quantization, where) if quantization else None,
            raw=content,
        )


def _rotary(raw: dict[str, Any], family: Family, where: str) -> tuple[bool, ...]:
    """Which layers turn queries and keys."""
    layers = raw["num_hidden_layers"]
    if not family.nope:
        return (True,) * layers
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
    off = not family.windowed or window is None or (family.windowed == "lists" and not raw["use_sliding_window"])
    if off:
        return (None,) * layers
    if not isinstance(window, int) or window <= 0:
        raise ValueError(f"{where}: sliding_window must be a positive integer or null, got {window!r}")
    if family.windowed == "all":
        return (window,) * layers
    listed = raw.get("layer_types")
    if listed is None:
        upper = [layer >= raw.get("max_window_layers", layers) for layer in range(layers)]
        chosen = [not turns for turns in rotary] if family.nope else upper
        listed = ["sliding_attention" if has_window else "full_attention" for has_window in chosen]
    unknown = set(listed) - {"sliding_attention", "full_attention"}
    if len(listed) != layers or unknown:
        found = f"unknown {min(unknown)!r}" if unknown else f"{len(listed)} layers, the model has {layers}"
        raise ValueError(f"{where}: layer_types lists {found}")
    return tuple(window if kind == "sliding_attention" else None for kind in listed)


def _rope(raw: dict[str, Any], where: str) -> dict[str, Any]:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope: dict[str, Any] = {"rope_theta": float(raw["rope_theta"])} | scaling
    rope["rope_type"] = scaling.get("rope_type", scaling.get("type", "default"))
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"{where}: rope type {rope['rope_type']!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    for key in ("rope_theta", *ROPE_TYPES[rope["rope_type"]]):
        if not isinstance(rope.get(key), int | float) or not rope[key] > 0:
            raise ValueError(f"{where}: rope type {rope['rope_type']!r} needs a positive {key}, got {rope.get(key)!r}")
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
