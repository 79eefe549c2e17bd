"""LoRA's settings, under the names that the field uses, each checked when it is given.

    where       target_modules, exclude_modules, layers_to_transform, layers_pattern             targets.py
    how much    r, alpha, rank_pattern, alpha_pattern, use_rslora          scaling = alpha / r, or alpha / sqrt(r)
    start       init, loftq_iterations                                                           initialize.py
    form        dropout, use_dora                                                                lora.py, dora.py
    besides     bias, modules_to_save, trainable_token_indices, ensure_weight_tying              beside.py

rsLoRA: the entries of B A x add up r terms, so at alpha / r a larger rank learns more slowly; with alpha / sqrt(r) the
size of the change does not depend on the rank (arXiv 2312.03732).

Peer: PEFT `LoraConfig`, which says lora_alpha, lora_dropout, init_lora_weights (True and False are "default" and
"random" here) and loftq_config.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")
INITS = ("default", "gaussian", "random", "pissa", "loftq")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA's settings.

    Attributes:
        r: rank.
        alpha: the change is scaled by alpha / r.
        dropout: probability of dropping each number of the adapter's input while training.
        target_modules: "all-linear" (every linear layer but the head); a list of names, each the last part or parts of
            a module path; one regular expression that must match a whole path; None: those usual for the architecture.
        exclude_modules: layers to leave out of these: a list of names, or one regular expression.
        layers_to_transform: numbers of the blocks to adapt; None: all.
        layers_pattern: names of the list of blocks ("layers", "h"), if a path holds several numbers.
        rank_pattern, alpha_pattern: other values for some layers; the keys are regular expressions for a whole path or
            for its end after a dot.
        use_rslora: scale by alpha / sqrt(r).
        use_dora: learn direction and size of each row of the weight separately.
        init: "default" (A uniform, B zero), "gaussian" (A normal, B zero), "random" (neither is zero), "pissa" or
            "pissa_niter_<n>" (the largest singular directions of the weight), "loftq" (what NF4 loses).
        loftq_iterations: rounds of quantizing and repairing.
        bias: which of the model's biases are trained, too: "none", "all", or "lora_only" (those of adapted layers).
        modules_to_save: modules that are trained whole, by the ends of their paths (whole.py).
        trainable_token_indices: ids of the tokens whose rows of the embedding are trained (tokens.py), or the ids by
            module: {"embed_tokens": [5], "lm_head": [5]}.
        ensure_weight_tying: a head that shares the embedding's matrix also shares its copy in modules_to_save.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"
    loftq_iterations: int = 1
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = field(default=None, hash=False)
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        check_rank(self.r)
        check_alpha(self.alpha)
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must be at least 0 and below 1, got {self.dropout!r}")
        for name in ("target_modules", "exclude_modules"):
            self._check_names(name)
        for name in ("use_rslora", "use_dora", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"LoRA {name} must be True or False, got {getattr(self, name)!r}")
        self._check_layers()
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            for key, value in _mapping(name, getattr(self, name)).items():
                check_pattern(f"LoRA {name}", key)
                check(value)
        self._check_beside()
        if self.init not in INITS and not re.fullmatch(r"pissa_niter_\d+", self.init):
            raise ValueError(f"LoRA init {self.init!r}: choose one of {', '.join(INITS)} or pissa_niter_<number>")
        if not isinstance(self.loftq_iterations, int) or self.loftq_iterations < 1:
            raise ValueError(f"LoRA loftq_iterations must be at least 1, got {self.loftq_iterations!r}")

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / math.sqrt(self.r) if self.use_rslora else self.alpha / self.r

    def at(self, path: str) -> "LoraConfig":
        """The settings of one layer: rank and alpha as the patterns say."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        r, alpha = _matching(self.rank_pattern, path, self.r), _matching(self.alpha_pattern, path, self.alpha)
        return replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str) and value.lower() == ALL_LINEAR:
            object.__setattr__(self, name, ALL_LINEAR)
        elif isinstance(value, str):
            check_pattern(f"LoRA {name}", value)
        elif isinstance(value, list | tuple | set):
            object.__setattr__(self, name, tuple(value))
        elif value is not None or name != "target_modules":
            raise ValueError(f"LoRA {name} must be a string or a list of names, got {value!r}")

    def _check_layers(self) -> None:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        if isinstance(layers, int):
            layers = (layers,)
        if layers is not None:
            if not isinstance(layers, list | tuple) or not layers or not all(isinstance(n, int) for n in layers):
                raise ValueError(f"LoRA layers_to_transform must be numbers of blocks, got {layers!r}")
            if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:  # PEFT refuses both
                raise ValueError(
                    "LoRA layers_to_transform needs a list of target names; a regular expression can name the blocks"
                )
            object.__setattr__(self, "layers_to_transform", tuple(layers))
        if pattern and layers is None:
            raise ValueError(f"LoRA layers_pattern {pattern!r} needs layers_to_transform")
        object.__setattr__(self, "layers_pattern", (pattern,) if isinstance(pattern, str) else tuple(pattern or ()))

    def _check_beside(self) -> None:
        if self.bias not in BIASES:
            raise ValueError(f"LoRA bias {self.bias!r}: choose one of {', '.join(BIASES)}")
        names, tokens = self.modules_to_save, self.trainable_token_indices
        if isinstance(names, str) or not all(isinstance(name, str) and name for name in names or ()):
            raise ValueError(f"LoRA modules_to_save must be a list of names, got {names!r}")
        object.__setattr__(self, "modules_to_save", tuple(names or ()))
        if isinstance(tokens, Mapping):
            tokens = {name: check_tokens(ids) for name, ids in tokens.items()}
        elif tokens is not None:
            tokens = check_tokens(tokens)
        object.__setattr__(self, "trainable_token_indices", tokens)


def check_tokens(ids: object) -> tuple[int, ...]:
    """Refuse what is no list of different token ids."""
    if not isinstance(ids, list | tuple) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"LoRA trainable_token_indices must be token ids, got {ids!r}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"LoRA trainable_token_indices names a token twice: {ids!r}")
    return tuple(ids)


def check_rank(r: object) -> None:
    """Refuse what is no rank."""
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"LoRA rank must be at least 1, got {r!r}")


def check_alpha(alpha: object) -> None:
    """Refuse what is no alpha."""
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"LoRA alpha must be positive, got {alpha!r}")


def check_pattern(what: str, pattern: str) -> None:
    """Refuse what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} {pattern!r} is not a regular expression: {error}") from None


def _mapping(name: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"LoRA {name} must map patterns to numbers, got {value!r}")
    return value


def _matching(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the path or its end after a dot, as PEFT's `get_pattern_key`."""
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(matching, otherwise)
