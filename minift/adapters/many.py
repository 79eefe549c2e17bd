"""Several adapters of one model: switch between them, leave them out, delete them, combine them into one.

    add_lora(model, config, "a"); load_adapter(model, folder, "b")     each layer holds the A and B of both
    set_adapter(model, "b")                                            b alone is added to the base's output
    with disabled(model): ...                                          neither is: the original model
    with adapters_of_rows(model, ["a", None, "b"]): ...                one for each row of a batch (serving.py)
    combine(model, ["a", "b"], [0.7, 0.3], "c", "cat")                 a third, of the weighted changes w_k s_k B_k A_k

Ways to combine, of which the first two keep the sum of the changes:

    cat      A = rows of w_k s_k A_k below one another, B = columns of B_k side by side: exact; the ranks add up
    svd      the best approximation of the sum with a given rank (the largest there is among them, if not told)
    linear   A = sum of +-sqrt(|w_k s_k|) A_k, B = sum of sqrt(|w_k s_k|) B_k: cheap and not the sum, since every A_k
             meets every B_j; needs equal ranks

The combined adapter has scaling 1, is frozen, and is not active until `set_adapter` makes it so.

Peers: PEFT `set_adapter`, `disable_adapter`, `delete_adapter`, `add_weighted_adapter` (which keeps use_rslora, and so
scales a combination of rsLoRA adapters by sqrt(r) instead of 1).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from minift.adapters.inject import check_adapter_name, low_rank_layers
from minift.adapters.lora import LowRank
from minift.adapters.switched import check_exclusive, switched

METHODS = ("svd", "linear", "cat")


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, in the order in which they were added."""
    return list(dict.fromkeys(name for place in switched(model).values() for name in place.configs))


def set_adapter(model: nn.Module, adapters: str | Sequence[str], trainable: bool = True) -> None:
    """Let exactly these adapters take part; the others are frozen, too.

    Args:
        adapters: one name, or several whose changes are added up.
        trainable: whether those that take part are trained.

    Raises:
        ValueError: there is no adapter of that name, or two of them each have their own copy of a module.
    """
    chosen = [adapters] if isinstance(adapters, str) else list(adapters)
    check_names(model, chosen)
    check_exclusive(model, chosen)
    for place in switched(model).values():
        place.active = [name for name in chosen if name in place.configs]
        for name in place.configs:
            for parameter in place.tensors(name).values():
                parameter.requires_grad_(trainable and name in chosen)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model computes as if it had no adapters (a "pissa" or "loftq" base stays what these made of it)."""
    places = list(switched(model).values())
    before = [(place.active, place.route) for place in places]
    try:
        for place in places:
            place.active, place.route = [], None
        yield
    finally:
        for place, (active, route) in zip(places, before, strict=True):
            place.active, place.route = active, route


def delete_adapter(model: nn.Module, adapter: str) -> None:
    """Remove an adapter; a layer that has none left is the plain layer again.

    Raises:
        ValueError: there is no adapter of that name, or the base weights were changed for it.
    """
    check_names(model, [adapter])
    places = {path: place for path, place in switched(model).items() if adapter in place.configs}
    init = next(iter(places.values())).given[adapter].init
    if init.startswith("pissa") or init == "loftq":
        raise ValueError(f"adapter {adapter!r} began as {init!r} and holds a part of the base weights; load them again")
    for path, place in places.items():
        place.remove(adapter)
        if not place.configs:
            place.put_back(model, path)


@torch.no_grad()
def combine(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter: str,
    method: str = "svd",
    rank: int | None = None,
) -> list[str]:
    """Make a new adapter of a weighted sum of others.

    Args:
        adapters, weights: names, and a factor for each (negative ones subtract).
        adapter: name of the new one.
        method: "svd", "linear" or "cat".
        rank: of the new one, for "svd".

    Returns:
        paths of its layers: those in which any of the others has a part.

    Raises:
        ValueError: an unknown name or method, another number of weights, DoRA (whose change is not of low rank),
            trained copies of modules, or ranks that "linear" cannot add.
    """
    _check_combination(model, adapters, weights, adapter, method, rank)
    layers = {p: layer for p, layer in low_rank_layers(model).items() if any(n in layer.configs for n in adapters)}
    largest = {name: max(layer.configs[name].r for layer in layers.values() if name in layer.configs)
               for name in adapters}  # fmt: skip
    r = sum(largest.values()) if method == "cat" else rank or max(largest.values())
    first = next(layer.given[adapters[0]] for layer in layers.values() if adapters[0] in layer.given)
    config = replace(
        first, r=r, alpha=r, rank_pattern={}, alpha_pattern={}, use_rslora=False, init="default",
        target_modules=tuple(layers), exclude_modules=(), layers_to_transform=None, layers_pattern=(),
    )  # fmt: skip
    for layer in layers.values():
        parts = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.configs]
        a_ri, b_or = {"svd": _svd, "linear": _linear, "cat": _cat}[method](layer, parts, r)
        layer.add(adapter, config)
        layer.active.remove(adapter)
        for matrix, value in zip(layer.matrices(adapter), (a_ri, b_or), strict=True):
            matrix.zero_()[: value.shape[0], : value.shape[1]] = value  # smaller where not all have a part
            matrix.requires_grad_(False)
    return list(layers)


def _check_combination(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter: str, method: str, rank: int | None
) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown way to combine adapters {method!r}; choose one of {', '.join(METHODS)}")
    if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters ({', '.join(adapters)}) and {len(weights)} weights; give one each")
    if rank is not None and (method != "svd" or rank < 1):
        raise ValueError(f"rank {rank!r}: only 'svd' takes one, and at least 1; this is {method!r}")
    check_names(model, adapters)
    check_adapter_name(model, adapter)
    for path, place in switched(model).items():
        both = [name for name in adapters if name in place.configs]
        if both and not isinstance(place, LowRank):
            raise ValueError(f"adapter {both[0]!r} has its own {path}, and only low-rank changes can be combined")
    for path, layer in low_rank_layers(model).items():
        configs = [layer.configs[name] for name in adapters if name in layer.configs]
        if any(config.use_dora for config in configs):
            raise ValueError("DoRA adapters cannot be combined: their changes are not of low rank")
        if method == "linear" and len({config.r for config in configs}) > 1:
            raise ValueError(f"'linear' adds matrices of one rank, and {path} has several; use 'svd' or 'cat'")


def check_names(model: nn.Module, adapters: Sequence[str]) -> None:
    """Refuse names that no adapter of the model has."""
    known = adapter_names(model)
    for name in adapters:
        if name not in known:
            raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(known) or 'none'}")


Parts = list[tuple[str, float]]


def _cat(layer: LowRank, parts: Parts, r: int) -> tuple[Tensor, Tensor]:
    matrices = [(*layer.matrices(name), weight * layer.configs[name].scaling) for name, weight in parts]
    return torch.cat([a_ri * factor for a_ri, _, factor in matrices]), torch.cat([b for _, b, _ in matrices], dim=1)


def _svd(layer: LowRank, parts: Parts, r: int) -> tuple[Tensor, Tensor]:
    change_oi = torch.stack([weight * layer.delta(name) for name, weight in parts]).sum(0)
    u_or, s_r, vh_ri = torch.linalg.svd(change_oi, full_matrices=False)
    return vh_ri[:r], u_or[:, :r] * s_r[:r]


def _linear(layer: LowRank, parts: Parts, r: int) -> tuple[Tensor, Tensor]:
    total_a, total_b = (torch.zeros_like(matrix) for matrix in layer.matrices(parts[0][0]))
    for name, weight in parts:
        a_ri, b_or = layer.matrices(name)
        factor = weight * layer.configs[name].scaling
        root = abs(factor) ** 0.5
        total_a += (root if factor >= 0 else -root) * a_ri  # the sign once, or it would cancel
        total_b += root * b_or
    return total_a, total_b
