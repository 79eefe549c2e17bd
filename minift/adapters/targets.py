"""Which layers an adapter goes to, matched as PEFT matches them (`tuners_utils.check_target_module_exists`).

    exclude_modules      out, whatever else holds                     a list: names or ends of dotted paths
    modules_to_save      out, with all that is in them (whole.py)
    target_modules       in                                           one string: a regular expression for a whole path
    layers_to_transform  of these, only those in the blocks 3, 4, ... the first number in the path

    model.layers.3.self_attn.q_proj          a list holds q_proj, self_attn.q_proj, ... but not proj and no .*q_proj
          ^      ^ number of the block
          layers_pattern

`target_modules=None` means what PEFT adapts in an architecture if not told otherwise, the query and value projections
of the LoRA paper. Adapting every linear layer ("all-linear", the default here) costs more and learns better (QLoRA,
arXiv 2305.14314, figure 2).

Matching nothing is refused, and so is a name of a list that no layer has: a run in which nothing is trained looks like
any other until its end.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from minift.adapters.config import ALL_LINEAR, LoraConfig, check_pattern

Names = str | tuple[str, ...]  # one regular expression, or a list
HEAD = "lm_head"
LIMITS = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
QUERY_VALUE = ("q_proj", "v_proj")
# PEFT's table (TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING) for the architectures that are loaded here; it knows
# nothing of phi3 and smollm3.
USUAL: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt"), QUERY_VALUE
)
USUAL["gpt2"] = ("c_attn",)


def usual_targets(architecture: str | None) -> tuple[str, ...]:
    """What PEFT adapts by default in an architecture (the `model_type` of config.json).

    Raises:
        ValueError: it has no default for this one.
    """
    if architecture not in USUAL:
        raise ValueError(
            f"there are no usual LoRA targets for {architecture!r}, only for {', '.join(USUAL)}; "
            "name target_modules, or use 'all-linear'"
        )
    return USUAL[architecture]


def select(
    paths: Sequence[str], config: LoraConfig, architecture: str | None = None, saved: Sequence[str] = ()
) -> tuple[LoraConfig, list[str]]:
    """The settings with their targets spelled out if they were None, and the paths that they mean, in order.

    Args:
        paths: of all layers that could be adapted.
        architecture: `model_type`, for the usual targets.
        saved: paths of modules that are trained whole; nothing in them is a target.

    Raises:
        ValueError: nothing matched, or a name of a list did not; lists the names there are.
    """
    if config.target_modules is None:
        config = replace(config, target_modules=usual_targets(architecture))
    targets = config.target_modules
    assert targets is not None
    inside = tuple(f"{path}." for path in saved)
    chosen = [path for path in paths if is_chosen(path, config) and not f"{path}.".startswith(inside)]
    unmatched = [] if isinstance(targets, str) else [
        target for target in targets if not any(is_target(path, (target,)) for path in paths)
    ]  # fmt: skip
    if unmatched or not any(is_target(path, targets) for path in paths):
        raise ValueError(f"no layer matches target {unmatched or targets!r}; layers here: {short_names(paths)}")
    if not chosen:
        limits = {name: getattr(config, name) for name in LIMITS}
        given = ", ".join(f"{name}={value!r}" for name, value in limits.items() if value)
        raise ValueError(f"{given} leaves no layer of target {targets!r}; layers here: {short_names(paths)}")
    return config, chosen


def is_chosen(path: str, config: LoraConfig) -> bool:
    """Whether PEFT would adapt the layer at `path`."""
    if config.exclude_modules and _named(path, config.exclude_modules):
        return False
    assert config.target_modules is not None
    return is_target(path, config.target_modules) and _in_layers(path, config)


def is_target(path: str, target_modules: str | Sequence[str]) -> bool:
    """Whether a path is among the targets, before anything is left out."""
    if target_modules == ALL_LINEAR:
        return path.rpartition(".")[2] != HEAD
    return _named(path, target_modules)


def _named(path: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _in_layers(path: str, config: LoraConfig) -> bool:
    targets = config.target_modules
    if config.layers_to_transform is None or (not isinstance(targets, str) and path in (targets or ())):
        return True  # PEFT: a path that is spelled out in full is meant, whatever its number
    patterns = config.layers_pattern or ("[^.]*",)
    # The first number, not the last: an expert's number may follow that of its block.
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path) for pattern in patterns)
    number = next((int(match[1]) for match in found if match), None)
    return number in config.layers_to_transform


def names_or_pattern(what: str, value: object) -> Names | None:
    """A list of names as a tuple, a regular expression as it is.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        check_pattern(what, value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence | set) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError(f"{what} must be a string or a list of names, got {value!r}")


def listed(names: str | Sequence[str] | None) -> str | list[str] | None:
    """For JSON."""
    return names if isinstance(names, str) or names is None else list(names)


def short_names(paths: Iterable[str]) -> str:
    """The last parts of paths, each once."""
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths})) or "none"
