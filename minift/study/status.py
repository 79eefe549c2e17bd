"""What state each adapted place of a model is in: which adapters it holds, which take part, which are merged.

    layer                       adapters    active    merged    trained
    2 x self_attn.q_proj        ada, bob    ada       -         2,048

Peer: PEFT's `get_layer_status` and `get_model_status`.
"""

import re
from dataclasses import dataclass

from torch import nn

from minift.adapters.inject import adapter_parameters
from minift.adapters.switched import Switched, switched


@dataclass(frozen=True)
class PlaceStatus:
    """One adapted place.

    Attributes:
        path: of the layer.
        adapters: names of those that it holds, also of those that a merge with keep=True has put aside.
        active: names of those that change its output now.
        merged: names of those that are folded into its weight and can be taken out again.
        trained: parameters of its adapters that require a gradient.
    """

    path: str
    adapters: tuple[str, ...]
    active: tuple[str, ...]
    merged: tuple[str, ...]
    trained: int


def layer_status(model: nn.Module) -> list[PlaceStatus]:
    """Every adapted place, in order; none in a model without adapters."""
    kept, _ = getattr(model, "merged", None) or ([], None)
    places = [(path, place, False) for path, place in switched(model).items()]
    places += [(path, place, True) for path, place, _ in kept]
    return [_status(path, place, merged) for path, place, merged in places]


def _status(path: str, place: Switched, merged: bool) -> PlaceStatus:
    trained = 0 if merged else sum(p.numel() for p in adapter_parameters(place) if p.requires_grad)
    active = tuple(place.active)
    return PlaceStatus(path, tuple(place.configs), () if merged else active, active if merged else (), trained)


def format_status(model: nn.Module) -> str:
    """The table of the module docstring; alike layers of several blocks share a row."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for place in layer_status(model):
        names = (", ".join(found) or "-" for found in (place.adapters, place.active, place.merged))
        rows.setdefault((re.sub(r"^.*\.\d+\.", "", place.path), *names), []).append(place.trained)
    if not rows:
        return "no adapters"
    cells = [("layer", "adapters", "active", "merged", "trained")]
    cells += [(f"{len(counts)} x {name}", *names, f"{sum(counts):,}") for (name, *names), counts in rows.items()]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    return "\n".join("    ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
