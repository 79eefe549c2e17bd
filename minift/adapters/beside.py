"""What a LoRA trains besides its low-rank changes: where that is in a model, and putting it there.

    modules_to_save           ends of paths                          -> a WholeCopy      whole.py
    trainable_token_indices   the embedding, or modules by name      -> TokenRows        tokens.py
    bias                      all, or those of the adapted layers    -> OwnBiases        biases.py

Everything is looked up and checked before anything is changed. What is not silently accepted: a name that no module
has, biases of a model that has none (PEFT trains nothing then), one half of a tied pair (tied.py), a module that
another adapter has changed in another way, and a second active adapter with a copy of the same module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from minift.adapters.biases import PLACE, OwnBiases
from minift.adapters.config import LoraConfig
from minift.adapters.lora import LowRank
from minift.adapters.switched import Exclusive, Switched
from minift.adapters.targets import HEAD
from minift.adapters.tied import TiedHead, embedding_path, follow, is_tied, plain
from minift.adapters.tokens import DELTA, TokenRows
from minift.adapters.whole import WholeCopy
from minift.model.decoder import CausalLM
from minift.quant.linear import QuantizedLinear


@dataclass(frozen=True)
class Beside:
    """Where an adapter has something besides low-rank changes.

    Attributes:
        whole: paths of modules to copy.
        tokens: per path of an embedding or head, ids of the rows.
        biases: paths of layers whose bias is trained.
        shared: whether a tied head follows the embedding.
    """

    whole: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    shared: bool = False


def find_whole(model: nn.Module, config: LoraConfig, loading: bool = False) -> tuple[str, ...]:
    """Paths of the modules to save, in order.

    Args:
        loading: a file was trained as its settings say, so half of a tied pair is accepted.

    Raises:
        ValueError: a name that no module has, modules that cannot be copied, or half of a tied pair.
    """
    paths = [path for path, _ in places(model) if path]
    unmatched = [name for name in config.modules_to_save if not any(path.endswith(name) for path in paths)]
    if unmatched:
        known = ", ".join(sorted({path.rpartition(".")[2] for path in paths} - {str(n) for n in range(len(paths))}))
        raise ValueError(f"modules_to_save: no module is called {', '.join(unmatched)}; modules here: {known}")
    found = [path for path in paths if path.endswith(config.modules_to_save)]
    if config.ensure_weight_tying and not is_tied(model) and not loading:
        raise ValueError("ensure_weight_tying: this model's head has a matrix of its own; leave the setting out")
    pair = [path for path in (embedding_path(model), HEAD) if path is not None] if is_tied(model) else []
    half = [path for path in found if path in pair]
    if half and config.ensure_weight_tying:
        found = [path for path in paths if path == pair[0] or (path in found and path != HEAD)]
    elif half and not loading:
        raise ValueError(
            f"modules_to_save: {half[0]} shares its matrix with {pair[0] if half[0] == HEAD else HEAD}, and a copy of "
            "one would drift away from the other; set ensure_weight_tying=True to train one copy for both"
        )
    for path in found:
        _check_whole(model, path, found)
    return tuple(found)


def _check_whole(model: nn.Module, path: str, found: Sequence[str]) -> None:
    module = model.get_submodule(path)
    around = next((other for other in found if path.startswith(f"{other}.")), None)
    if around:
        raise ValueError(f"modules_to_save: {path} is a part of {around}, which is saved whole; name one of them")
    if isinstance(module, WholeCopy):
        return
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"modules_to_save: {path} is only a list of modules; name the modules in it")
    if any(isinstance(part, QuantizedLinear) for part in module.modules()):
        raise ValueError(f"modules_to_save: {path} is quantized and cannot be trained; leave it out of quantization")
    if any(isinstance(part, Switched | TiedHead) for part in module.modules()):
        raise ValueError(f"modules_to_save: another adapter has changed {path} in another way")
    if not any(True for _ in module.parameters()):
        raise ValueError(f"modules_to_save: {path} has no parameters")
    transposed = isinstance(model, CausalLM) and model.config.family.transposed and path != HEAD
    if transposed and any(isinstance(part, nn.Linear) for part in module.modules()):
        raise ValueError(f"modules_to_save: {path} holds a linear layer, which this family's files have transposed")


def find_beside(
    model: nn.Module, config: LoraConfig, targets: Sequence[str], whole: tuple[str, ...], loading: bool = False
) -> Beside:
    """Everything that an adapter has besides low-rank changes.

    Args:
        targets: paths of the layers that are to get low-rank changes.
        whole: from `find_whole`.

    Raises:
        ValueError: something does not fit; see the module docstring.
    """
    tokens, shared = _find_tokens(model, config, targets, whole)
    embedding = embedding_path(model)
    copied = config.ensure_weight_tying and embedding in whole and is_tied(model)
    if config.ensure_weight_tying and is_tied(model) and {embedding, HEAD} & set(targets):
        raise ValueError(f"ensure_weight_tying: one LoRA for both {embedding} and {HEAD} is not supported")
    if (shared or copied) and HEAD in (*targets, *whole):
        raise ValueError(f"{HEAD} shares what is trained of {embedding}, so it cannot be adapted by itself")
    if (shared or copied) and not isinstance(model.get_submodule(HEAD), nn.Linear | TiedHead):
        raise ValueError(f"another adapter has changed {HEAD}, which shares what is trained of {embedding}")
    biases = _find_biases(model, config, targets, whole)
    beside = Beside(whole, tokens, biases, shared or copied)
    for path in (*whole, *tokens, *([PLACE] if biases else [])):
        place = dict(model.named_modules()).get(path)
        if isinstance(place, Exclusive) and place.active:
            raise ValueError(
                f"adapter {place.active[0]!r} is active and has its own {path}, and two cannot be added up; "
                "call set_adapter(model, []) first"
            )
    return beside


def _find_tokens(
    model: nn.Module, config: LoraConfig, targets: Sequence[str], whole: Sequence[str]
) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Ids of the rows by path, and whether a tied head follows."""
    given, embedding = config.trainable_token_indices, embedding_path(model)
    if given is None:
        return {}, False
    if not isinstance(given, Mapping):
        if embedding is None:
            raise ValueError("trainable_token_indices: name the embedding, {'name': [ids]}")
        given = {embedding: given}
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in given.items():
        paths = [path for path, _ in places(model) if path == name or path.endswith(f".{name}")]
        if not paths:
            raise ValueError(f"trainable_token_indices: no module is called {name}")
        found |= dict.fromkeys(paths, ids)
    for path, ids in found.items():
        if path in targets or path in whole:
            raise ValueError(
                f"trainable_token_indices: {path} is adapted or saved whole already; choose one of the two"
            )
        module = model.get_submodule(path)
        if isinstance(module, TokenRows | TiedHead):
            module = module.base
        if not isinstance(module, nn.Embedding | nn.Linear):
            what = "quantized" if isinstance(module, QuantizedLinear) else f"a {type(module).__name__}"
            raise ValueError(f"trainable_token_indices: {path} is {what}; only a plain embedding or head has rows")
        if max(ids) >= len(module.weight):
            rows = len(module.weight)
            raise ValueError(f"trainable_token_indices: {path} has {rows} rows, so there is no {max(ids)}")
    if not is_tied(model):
        return found, False
    if HEAD in found and found.get(str(embedding)) != found[HEAD]:
        raise ValueError(
            f"trainable_token_indices: {HEAD} and {embedding} share one matrix, so they need the same rows; name the "
            "ids once, as a list"
        )
    found.pop(HEAD, None)
    return found, embedding in found


def _find_biases(model: nn.Module, config: LoraConfig, targets: Sequence[str], whole: Sequence[str]) -> tuple[str, ...]:
    if config.bias == "none":
        return ()
    inside = tuple(f"{path}." for path in whole)
    paths = [
        path for path, module in places(model)
        if isinstance(getattr(plain(module), "bias", None), nn.Parameter)
        and not isinstance(module, WholeCopy) and not f"{path}.".startswith(inside)
        and (config.bias == "all" or path in targets)
    ]  # fmt: skip
    if not paths:
        where = "this model has" if config.bias == "all" else "the adapted layers have"
        raise ValueError(f"bias={config.bias!r}: {where} no biases to train; use bias='none'")
    return tuple(paths)


def places(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of the model as it was before adapters came, at its old path; an adapted one as it is now."""
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = (f"{PLACE}.",)
    for path, module in model.named_modules():
        if f"{path}.".startswith(inside):
            continue
        found.append((path, module))
        if isinstance(module, Switched | TiedHead):
            inside = (*inside, f"{path}.")
    return found


def add_beside(model: nn.Module, beside: Beside, adapter: str, config: LoraConfig) -> None:
    """Create and activate all of it, after the low-rank changes."""
    embedding = embedding_path(model) if beside.shared else None
    for path in beside.whole:
        module = model.get_submodule(path)
        place = module if isinstance(module, WholeCopy) else WholeCopy(module).train(module.training)
        model.set_submodule(path, place)
        place.add(adapter, config, shared=path == embedding)
        if path == embedding:
            follow(model, place)
    for path, ids in beside.tokens.items():
        module = model.get_submodule(path)
        place = module if isinstance(module, TokenRows) else TokenRows(module).train(module.training)
        model.set_submodule(path, place)
        place.add(adapter, config, ids)
        if path == embedding:
            follow(model, place)
    if beside.biases:
        if PLACE not in dict(model.named_children()):
            model.add_module(PLACE, OwnBiases())
        own = model.get_submodule(PLACE)
        assert isinstance(own, OwnBiases)
        own.add(adapter, config, {_bias_key(model, path): plain(model.get_submodule(path)) for path in beside.biases})


def _bias_key(model: nn.Module, path: str) -> str:
    return f"{path}.base_layer" if isinstance(model.get_submodule(path), LowRank) else path


def shapes(model: nn.Module, beside: Beside, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The tensors that a file has to hold for all of it, by name, before it is added."""
    found: dict[str, tuple[int, ...]] = {}
    for path in beside.whole:
        module = model.get_submodule(path)
        module = module.base if isinstance(module, WholeCopy) else module
        found |= {f"{path}.{name}": tuple(p.shape) for name, p in module.named_parameters()}
        if beside.shared and path == embedding_path(model):
            found[f"{HEAD}.weight"] = found[f"{path}.weight"]
    for path, ids in beside.tokens.items():
        found[f"{path}.{DELTA}"] = (len(ids), plain(model.get_submodule(path)).get_parameter("weight").shape[1])
    for path in beside.biases:
        key = f"{path}.base_layer" if path in targets else path
        found[f"{key}.bias"] = tuple(plain(model.get_submodule(path)).get_parameter("bias").shape)
    return found
