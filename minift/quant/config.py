"""How a model's linear layers are quantized: one small record, and its spelling in a checkpoint's config.json.

transformers writes the settings of bitsandbytes into `config.json`:

    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4",
                            "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "bfloat16", ...}

Its defaults are not the ones people expect: fp4, no double quantization, computing in float32. Here "nf4" means what
the QLoRA paper means by it. The block size of 4-bit weights is not written there; each weight's own record holds it
(checkpoint.py), and its default is 64.

Source: transformers `utils/quantization_config.py` (BitsAndBytesConfig).
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from minift.numerics.dtypes import DTYPES
from minift.quant.fourbit import check_format

INT8 = "int8"
FORMATS = ("nf4", "fp4", INT8)
METHOD = "bitsandbytes"
# The types that a packed weight may be stored as: bitsandbytes' choice for FSDP, which shards floating-point tensors.
STORAGE = DTYPES | {"uint8": torch.uint8}


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize a model's linear layers.

    Attributes:
        quant_type: "nf4", "fp4" or "int8" (LLM.int8()).
        blocksize: 4 bit: values per scale.
        double_quant: 4 bit: store the scales in 8 bits.
        compute_dtype: 4 bit: what weights are decoded to and inputs cast to; None is the dtype of the model.
        quant_storage: 4 bit: dtype that the packed bytes are viewed as.
        threshold: int8: input columns with a value of at least this magnitude are multiplied in 16 or 32 bits; 0 turns
            that off.
        skip: modules that stay as they are: whole paths or beginnings, ends, or regular expressions, matched as
            transformers does. Embeddings, and a head that shares an embedding's weight, are never quantized.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None
    quant_storage: torch.dtype = torch.uint8
    threshold: float = 6.0
    skip: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        if self.quant_type not in FORMATS:
            raise ValueError(f"unknown format {self.quant_type!r}: choose one of {', '.join(FORMATS)}")
        if self.quant_type != INT8:
            check_format(self.quant_type, self.blocksize)
        if self.compute_dtype not in (None, *DTYPES.values()):
            raise ValueError(f"compute_dtype {self.compute_dtype}: choose one of {', '.join(DTYPES)}")
        if self.quant_storage not in STORAGE.values():
            raise ValueError(f"quant_storage {self.quant_storage}: choose one of {', '.join(STORAGE)}")
        if not isinstance(self.threshold, int | float) or not 0 <= self.threshold < float("inf"):
            raise ValueError(f"threshold must be 0 (off) or a positive number, got {self.threshold!r}")
        if isinstance(self.skip, str):
            raise ValueError(f"skip must be a list of names, got the string {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"skip {pattern!r} is neither a name nor a regular expression: {error}") from None

    @classmethod
    def named(cls, quantize: "str | QuantConfig | None") -> "QuantConfig | None":
        """None | "nf4" | "fp4" | "int8" | QuantConfig -> QuantConfig | None."""
        return cls(quant_type=quantize) if isinstance(quantize, str) else quantize

    @property
    def label(self) -> str:
        """A few words for tables: "nf4 + double quant"."""
        return self.quant_type + (" + double quant" if self.quant_type != INT8 and self.double_quant else "")

    def skips(self, path: str) -> bool:
        """Whether the module at `path` is named by `skip`."""
        # transformers' rule (quantizers_utils.should_convert_module): a beginning or a regular expression that ends at
        # a dot or at the end of the path, or an end of any length.
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        return any(re.match(f"(?:{pattern}){boundary}", path) or path.endswith(pattern) for pattern in self.skip)

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of a config.json."""
        four_bit = self.quant_type != INT8
        return {
            "quant_method": METHOD,
            "load_in_4bit": four_bit,
            "load_in_8bit": not four_bit,
            "bnb_4bit_quant_type": self.quant_type if four_bit else "fp4",
            "bnb_4bit_use_double_quant": four_bit and self.double_quant,
            "bnb_4bit_compute_dtype": _name(self.compute_dtype or torch.float32),
            "bnb_4bit_quant_storage": _name(self.quant_storage),
            "llm_int8_threshold": float(self.threshold),
            "llm_int8_skip_modules": list(self.skip),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> "QuantConfig":
        """Read a `quantization_config`; `where` names the file in errors.

        Raises:
            ValueError: another method, or a setting that is not supported; names the key.
        """
        if not isinstance(raw, dict) or raw.get("quant_method") != METHOD:
            method = raw.get("quant_method") if isinstance(raw, dict) else raw
            raise ValueError(f"{where}: quantization method {method!r} is not supported; supported: {METHOD}")
        bits = {name: raw.get(f"load_in_{name}") or raw.get(f"_load_in_{name}") for name in ("4bit", "8bit")}
        if bool(bits["4bit"]) == bool(bits["8bit"]):
            raise ValueError(f"{where}: exactly one of load_in_4bit and load_in_8bit must be true")
        if raw.get("llm_int8_has_fp16_weight"):
            raise ValueError(f"{where}: llm_int8_has_fp16_weight keeps 16-bit weights, which is not supported")
        skip = raw.get("llm_int8_skip_modules")
        try:
            return cls(
                quant_type=raw.get("bnb_4bit_quant_type", "fp4") if bits["4bit"] else INT8,
                double_quant=bool(raw.get("bnb_4bit_use_double_quant", False)),
                compute_dtype=_dtype(raw, "bnb_4bit_compute_dtype", "float32", DTYPES) if bits["4bit"] else None,
                quant_storage=_dtype(raw, "bnb_4bit_quant_storage", "uint8", STORAGE),
                threshold=raw.get("llm_int8_threshold", 6.0),
                skip=("lm_head",) if skip is None else tuple(skip),
            )
        except ValueError as error:
            raise ValueError(f"{where}: quantization_config: {error}") from None


def _dtype(raw: dict[str, Any], key: str, default: str, choices: dict[str, torch.dtype]) -> torch.dtype:
    name = str(raw.get(key) or default).removeprefix("torch.")
    if name not in choices:
        raise ValueError(f"{key} {name!r}: choose one of {', '.join(choices)}")
    return choices[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
