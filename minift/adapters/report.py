"""What an adapter will train, said before the training, and what got no gradient, asked after its first step.

    model.layers.*.self_attn.q_proj     30 x   [576, 576]    rank 8       276,480 trained
    ...
    not adapted: lm_head
    276,480 of 134,791,488 parameters are trained (0.205 %)

A wrong name, an adapter that is frozen or a layer that no token reaches all look like training that learns little. The
table shows the first, the sum the second (none trained is refused), and `without_gradient` the third.
"""

import re
from dataclasses import dataclass

from torch import nn

from minift.adapters.inject import count_parameters, linear_layers, lora_layers


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer with an adapter: its path, weight shape (out, in), rank and trained parameters."""

    path: str
    shape: tuple[int, int]
    r: int
    trained: int


@dataclass(frozen=True)
class AdapterReport:
    """Which layers an adapter changes.

    Attributes:
        matched: the adapted layers, in order.
        unmatched: paths of the linear layers that it leaves alone.
        trained, total: parameters of the whole model; a quantized weight counts as the values it stands for.
    """

    matched: tuple[AdaptedLayer, ...]
    unmatched: tuple[str, ...]
    trained: int
    total: int

    @property
    def share(self) -> float:
        """Trained parameters divided by all."""
        return self.trained / self.total

    def format(self) -> str:
        """The table of the module docstring; alike layers of several blocks share a row."""
        rows: dict[tuple[str, tuple[int, int], int], list[int]] = {}
        for layer in self.matched:
            rows.setdefault((_starred(layer.path), layer.shape, layer.r), []).append(layer.trained)
        width = max(len(path) for path, _, _ in rows)
        lines = [
            f"{path:<{width}}  {len(trained):>4} x  {list(shape)!s:>14}  rank {r:<4} {sum(trained):>13,} trained"
            for (path, shape, r), trained in rows.items()
        ]
        left = ", ".join(dict.fromkeys(map(_starred, self.unmatched))) or "none"
        share = f"{self.trained:,} of {self.total:,} parameters are trained ({100 * self.share:.4g} %)"
        return "\n".join([*lines, f"not adapted: {left}", share])


def report(model: nn.Module, adapter: str = "default") -> AdapterReport:
    """What an adapter of the model trains.

    Raises:
        ValueError: there is no such adapter, or nothing in the model is trained.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if adapter in layer.configs}
    if not layers:
        raise ValueError(f"the model has no adapter {adapter!r}; call add_lora first")
    trained, total = count_parameters(model)
    if not trained:
        raise ValueError(f"nothing to train: adapter {adapter!r} is frozen; load it with trainable=True")
    matched = tuple(
        AdaptedLayer(
            path,
            (layer.out_features, layer.in_features),
            layer.configs[adapter].r,
            sum(p.numel() for p in layer.tensors(adapter).values() if p.requires_grad),
        )
        for path, layer in layers.items()
    )
    return AdapterReport(matched, tuple(path for path in linear_layers(model) if path not in layers), trained, total)


def without_gradient(model: nn.Module) -> list[str]:
    """Names of trained parameters that have no gradient; after the first backward pass there should be none."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def _starred(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)
