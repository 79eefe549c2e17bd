"""What a method will train, said before the training, and what got no gradient, asked after its first step.

    model.layers.*.self_attn.q_proj     30 x   [576, 576]    rank 8       276,480 trained
    ...
    not adapted: lm_head
    276,480 of 134,791,488 parameters are trained (0.205 %)

A row is a layer with its LoRA, or a tensor that is trained itself: what LoRA trains besides (copies of modules, rows of
an embedding, biases), and all that the other methods train (method.py). "Not adapted" are the linear layers in which
nothing is trained.

A wrong name, an adapter that is frozen or a layer that no token reaches all look like training that learns little. The
table shows the first, the sum the second (none trained is refused), and `without_gradient` the third.
"""

import re
from dataclasses import dataclass

from torch import nn

from minift.adapters.inject import count_parameters, linear_layers
from minift.adapters.lora import LowRank
from minift.adapters.method import method_of
from minift.adapters.switched import Switched, switched


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer with an adapter, or a trained tensor.

    Attributes:
        path: of the layer, or name of the tensor.
        shape: of the layer's weight (out, in), or of the tensor.
        r: rank of a LoRA; None of a tensor.
        trained: parameters.
    """

    path: str
    shape: tuple[int, ...]
    r: int | None
    trained: int


@dataclass(frozen=True)
class AdapterReport:
    """What a method trains.

    Attributes:
        matched: the adapted layers or trained tensors, in order.
        unmatched: paths of the linear layers that it leaves alone.
        trained, total: parameters of the whole model; a quantized weight counts as the values it stands for.
        method: its name.
    """

    matched: tuple[AdaptedLayer, ...]
    unmatched: tuple[str, ...]
    trained: int
    total: int
    method: str = "lora"

    @property
    def share(self) -> float:
        """Trained parameters divided by all."""
        return self.trained / self.total

    def format(self) -> str:
        """The table of the module docstring; alike layers of several blocks share a row."""
        rows: dict[tuple[str, tuple[int, ...], int | None], list[int]] = {}
        for layer in self.matched:
            rows.setdefault((_starred(layer.path), layer.shape, layer.r), []).append(layer.trained)
        width = max(len(path) for path, _, _ in rows)
        ranks = any(r is not None for _, _, r in rows)
        lines = [
            f"{path:<{width}}  {len(trained):>4} x  {list(shape)!s:>14}  "
            + (f"{'' if r is None else f'rank {r}':<9} " if ranks else "")
            + f"{sum(trained):>13,} trained"
            for (path, shape, r), trained in rows.items()
        ]
        left = ", ".join(dict.fromkeys(map(_starred, self.unmatched))) or "none"
        share = f"{self.trained:,} of {self.total:,} parameters are trained ({100 * self.share:.4g} %)"
        return "\n".join([*lines, f"not adapted: {left}", share])


def report(model: nn.Module, adapter: str = "default") -> AdapterReport:
    """What an adapter of the model trains, or the model's method if that is none of LoRA.

    Raises:
        ValueError: there is no such adapter, or nothing in the model is trained.
    """
    method = method_of(model)
    places = {path: place for path, place in switched(model).items() if adapter in place.configs}
    if method is None and not places:
        raise ValueError(f"the model has no adapter {adapter!r}; call add_lora or add_adapter first")
    trained, total = count_parameters(model)
    if not trained:
        what = f"adapter {adapter!r}" if method is None else method.name
        raise ValueError(f"nothing to train: {what} is frozen; load it with trainable=True")
    if method is None:
        matched = [row for path, place in places.items() for row in lora_rows(path, place, adapter)]
    else:
        named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        matched = [AdaptedLayer(name, tuple(p.shape), None, p.numel()) for name, p in named]
    name = "lora" if method is None else method.name
    return AdapterReport(tuple(matched), tuple(untrained_linears(model)), trained, total, name)


def lora_rows(path: str, place: Switched, adapter: str) -> list[AdaptedLayer]:
    """What an adapter trains in one place of the model."""
    tensors = place.file_tensors(adapter, path)
    counts = {name: p.numel() if p.requires_grad else 0 for name, p in tensors.items()}
    if isinstance(place, LowRank):
        shape = (place.out_features, place.in_features)
        return [AdaptedLayer(path, shape, place.configs[adapter].r, sum(counts.values()))]
    return [AdaptedLayer(name, tuple(p.shape), None, counts[name]) for name, p in tensors.items()]


def untrained_linears(model: nn.Module) -> list[str]:
    """Paths of the linear layers in which nothing is trained, wherever a method has put them.

    A layer that is wrapped is called `base` in its wrapper, and has the wrapper's path here, as before it was wrapped.
    """
    places = (path.removesuffix(".base") for path in linear_layers(model))
    return [path for path in places if not any(p.requires_grad for p in model.get_submodule(path).parameters())]


def without_gradient(model: nn.Module) -> list[str]:
    """Names of trained parameters that have no gradient; after the first backward pass there should be none."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def _starred(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)
