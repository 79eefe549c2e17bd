"""Merging: fold an adapter's change into the weight, so that it costs nothing any more.

    W' = W + s B A        (what DoRA makes of it: dora.py)

The sum is computed in fp32 and rounded once, to the dtype of the layers around. What becomes of it is reported:

    16 bit    rounding moves each weight by up to 2^-8 of it in bf16, 2^-11 in fp16: about as much as unmerged bf16
              arithmetic rounds anyway. In an fp32 model nothing is lost but the last bits (2^-24).
    4 bit     a quantized base is decoded first, because the adapter was trained on the decoded weight and has made up
              for some of its errors. The merged layer then stays in 16 bit: four times the memory, the same answers.
              `requantize=True` rounds the sum to the base's format again. Then every weight may move by half a step of
              16 levels, often more than training moved it, and the result is a model that nobody has trained. So it
              happens only when asked for, and only with text to measure the drift of logits on.
    original  merging into the unquantized weights looks better and is not what was trained, either: they differ from
              the decoded ones by the error that the adapter learned to live with. Give `original` to see by how much.

`keep=True` lets `unmerge_lora` put the very modules back that were there before: exact in every dtype, at the price of
the frozen weight beside the merged one (half a byte a weight in NF4, two in 16 bit). Subtracting s B A again, as PEFT
does, needs no second copy, but (W + D) - D is W only to rounding: the sum is off by up to u |W + D|, u = 2^-24 in fp32
and 2^-8 in bf16, and the difference by up to u |W|. In 16 bit, merging and unmerging often would wear the weights down.

Peers: PEFT `merge_and_unload` (which quantizes a 4-bit base again), `merge_adapter`, `unmerge_adapter`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from minift.adapters.dora import dora_delta
from minift.adapters.drift import Drift, evaluated, measure_drift
from minift.adapters.inject import low_rank_layers
from minift.adapters.lora import LoraLinear, LowRank
from minift.adapters.many import adapter_names, check_names
from minift.adapters.originals import original_weights
from minift.adapters.switched import check_exclusive, switched
from minift.adapters.tied import settle_tie
from minift.quant.linear import Linear8bit, QuantizedLinear, plain_linear


@dataclass(frozen=True)
class MergedLayer:
    """What merging did to one weight. Sizes are Frobenius norms, the roots of the sum of squares.

    Attributes:
        path: of the layer.
        stored: dtype or format of the merged weight.
        size: of the exact sum W + change.
        rounding: size of (stored weight - exact sum).
        from_original: size of (exact sum - what merging into the original weight gives); None: no original was given.
    """

    path: str
    stored: str
    size: float
    rounding: float
    from_original: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        adapters: names of the merged adapters.
        dropped: names of those that took no part and are gone (or kept, with keep=True).
        layers: one record for each merged weight.
        drift: of the logits, if token ids were given.
    """

    adapters: tuple[str, ...]
    dropped: tuple[str, ...]
    layers: tuple[MergedLayer, ...]
    drift: Drift | None = None

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def paths(self) -> list[str]:
        """Paths of the merged layers."""
        return [layer.path for layer in self.layers]

    @property
    def rounding(self) -> float:
        """What storing the sums lost, over all layers, relative to their size."""
        return _share(_total([layer.rounding for layer in self.layers]), _total([layer.size for layer in self.layers]))

    @property
    def from_original(self) -> float | None:
        """How far the sums are from those with the original weights, over all layers, relative to their size."""
        distances = [layer.from_original for layer in self.layers if layer.from_original is not None]
        return _share(_total(distances), _total([layer.size for layer in self.layers])) if distances else None

    def format(self) -> str:
        """A few lines for people."""
        stored = ", ".join(dict.fromkeys(layer.stored for layer in self.layers))
        lines = [f"merged {', '.join(self.adapters)} into {len(self)} layers, stored as {stored}"]
        if self.dropped:
            lines.append(f"not merged: {', '.join(self.dropped)}")
        if self.rounding:
            worst = max(self.layers, key=lambda layer: _share(layer.rounding, layer.size))
            lines.append(
                f"rounding moved the weights by {100 * self.rounding:.3g} %, most of all {worst.path}, by "
                f"{100 * _share(worst.rounding, worst.size):.3g} %"
            )
        if self.from_original is not None:
            lines.append(f"merging into the original weights would differ by {100 * self.from_original:.3g} %")
        return "\n".join([*lines, *([self.drift.format()] if self.drift else [])])


@torch.no_grad()
def merge_lora(
    model: nn.Module,
    adapters: Sequence[str] | None = None,
    requantize: bool = False,
    original: str | Path | nn.Module | None = None,
    token_ids: Tensor | None = None,
    keep: bool = False,
) -> MergeReport:
    """Replace everything that adapters change by plain layers with the merged weights, in place.

    Args:
        adapters: names; None: the active ones. All others are dropped.
        requantize: store the merged weights of quantized layers in their format again, not in 16 bit.
        original: the model without quantization (itself, or what `load_model` takes), to report the difference.
        token_ids: int64 [b, s], text to measure the drift of the logits on.
        keep: keep what is needed for `unmerge_lora`.

    Raises:
        ValueError: nothing to merge, unknown names, settings that contradict each other, an original that does not
            fit, or a merged weight that is not finite. The model is as it was, then.
    """
    names = _chosen(model, adapters)
    layers = {p: layer for p, layer in low_rank_layers(model).items() if any(n in layer.configs for n in names)}
    _check(model, layers, names, requantize, original, token_ids, keep)
    dropped = tuple(name for name in adapter_names(model) if name not in names)
    distances = {} if original is None else _distances(model, layers, names, original)
    places, config = switched(model), getattr(model, "config", None)
    for place in places.values():
        place.active = [name for name in names if name in place.configs]
    before = None if token_ids is None else _logits(model, token_ids)
    reports = []
    for path, place in places.items():
        if path in layers:
            reports.append(_merge(model, path, layers[path], requantize, distances.get(path)))
        elif isinstance(place, LowRank):
            place.put_back(model, path)  # a layer that these adapters leave alone stays as it is, quantized or not
        else:
            place.merge_into(model, path)
    if keep:
        kept = [(path, place, model.get_submodule(path)) for path, place in places.items()]
        model.merged = (kept, config)  # pyright: ignore (in a tuple, so that it is no part of the module tree)
    settle_tie(model)
    drift = None if before is None or token_ids is None else measure_drift(before, _logits(model, token_ids))
    return MergeReport(tuple(names), dropped, tuple(reports), drift)


def unmerge_lora(model: nn.Module) -> list[str]:
    """Take merged adapters out of the weights again and put them back beside them, exactly as they were.

    Returns:
        paths of the layers.

    Raises:
        ValueError: nothing was merged with keep=True, or a merged layer has been replaced since.
    """
    kept, config = getattr(model, "merged", None) or ([], None)
    if not kept:
        raise ValueError("nothing to unmerge: merge with keep=True, or load the base and the adapter again")
    changed = [path for path, _, merged in kept if model.get_submodule(path) is not merged]
    if changed:
        raise ValueError(f"{changed[0]} has been changed since the merge; delete what was added to it first")
    for path, place, merged in kept:
        weight = merged.weight
        model.set_submodule(path, place.to(weight.device).train(merged.training))  # the model may have moved meanwhile
    if config is not None:
        model.config = config
    del model.merged
    return [path for path, _, _ in kept]


def _chosen(model: nn.Module, adapters: Sequence[str] | None) -> list[str]:
    if isinstance(adapters, str):
        raise ValueError(f"adapters must be a list of names, got the string {adapters!r}")
    if adapters is not None:
        check_names(model, adapters)
        return list(adapters)
    return list(dict.fromkeys(name for place in switched(model).values() for name in place.active))


def _check(
    model: nn.Module,
    layers: Mapping[str, LowRank],
    names: list[str],
    requantize: bool,
    original: object,
    token_ids: Tensor | None,
    keep: bool,
) -> None:
    if not names:
        raise ValueError(f"nothing to merge: the model has no {'active ' if adapter_names(model) else ''}adapter")
    check_exclusive(model, names)
    if requantize and not any(isinstance(layer.base, QuantizedLinear) for layer in layers.values()):
        raise ValueError("requantize: no adapted layer was quantized; merge, then call quantize_model")
    if requantize and token_ids is None:
        raise ValueError("requantize moves every weight: give token_ids of some text, so that the drift is measured")
    inits = {layer.given[name].init for layer in layers.values() for name in names if name in layer.given}
    if original is not None and any(init.startswith(("pissa", "loftq")) for init in inits):
        raise ValueError("original: an adapter that began as a part of the weights cannot be added to the whole ones")
    if keep and any(not isinstance(place, LowRank) for place in switched(model).values()):
        raise ValueError("keep: only low-rank changes can be taken out again, and this model holds trained copies, too")
    if keep and getattr(model, "merged", None):
        raise ValueError("keep: the model keeps an earlier merge already; call unmerge_lora first")
    _check_ids(model, token_ids)
    for path, layer in layers.items():
        merged_oi = _sum(layer, [name for name in names if name in layer.configs])
        # LLM.int8() casts weights to fp16 first.
        dtype = torch.float16 if requantize and isinstance(layer.base, Linear8bit) else _dtype(layer)
        if not merged_oi.to(dtype).isfinite().all():
            raise ValueError(f"the merged weight of {path} is not finite in {dtype}; the adapter is broken")


def _check_ids(model: nn.Module, token_ids: Tensor | None) -> None:
    if token_ids is None:
        return
    if token_ids.dim() != 2 or token_ids.numel() == 0 or token_ids.is_floating_point():
        raise ValueError(f"token_ids must be whole numbers [b, s], got {token_ids.dtype} {tuple(token_ids.shape)}")
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if token_ids.min() < 0 or (size is not None and token_ids.max() >= size):
        raise ValueError(f"token_ids must lie within 0 and {size}, got {token_ids.min()} to {token_ids.max()}")


def _merge(model: nn.Module, path: str, layer: LowRank, requantize: bool, from_original: float | None) -> MergedLayer:
    exact_oi, dtype = _sum(layer, layer.active), _dtype(layer)
    stored_oi, stored = exact_oi.to(dtype), str(dtype).removeprefix("torch.")
    if not isinstance(layer, LoraLinear):
        layer.merge_into(model, path)
    elif requantize and isinstance(layer.base, QuantizedLinear):
        again = _quantized_again(layer.base, exact_oi)
        stored_oi, stored = again.dequantize(torch.float32), again.config.label
        model.set_submodule(path, again)
    else:
        model.set_submodule(path, plain_linear(stored_oi, layer.base.bias).train(layer.training))
    rounding = (stored_oi.float() - exact_oi).norm().item()
    return MergedLayer(path, stored, exact_oi.norm().item(), rounding, from_original)


def _quantized_again(base: QuantizedLinear, weight_oi: Tensor) -> QuantizedLinear:
    """A layer of the same format with another weight."""
    layer = type(base)(base.in_features, base.out_features, False, base.config, base.dtype, weight_oi.device)
    layer.quantize_weight(weight_oi)
    layer.bias, layer.stored_dtype, layer.compute_dtype = base.bias, base.stored_dtype, base.compute_dtype
    return layer.train(base.training)


def _distances(
    model: nn.Module, layers: Mapping[str, LowRank], names: Sequence[str], original: str | Path | nn.Module
) -> dict[str, float]:
    found = {}
    for path, weight_oi in original_weights(model, layers, original):
        layer = layers[path]
        own = [name for name in names if name in layer.configs]
        merged_oi = _sum(layer, own)
        found[path] = (merged_oi - _sum(layer, own, weight_oi.to(merged_oi.device))).norm().item()
    return found


def _sum(layer: LowRank, names: Sequence[str], weight_oi: Tensor | None = None) -> Tensor:
    """Weight and changes, fp32 [out, in]; with another weight in the place of the base's if one is given."""
    if weight_oi is None:
        weight_oi, changes = layer.base_weight(), [layer.delta(name) for name in names]
    else:
        changes = [_delta(layer, name, weight_oi) for name in names]
    return weight_oi + sum(changes[1:], changes[0])


def _delta(layer: LowRank, name: str, weight_oi: Tensor) -> Tensor:
    """What the change would be with another weight: with DoRA it depends on that."""
    if not layer.configs[name].use_dora:
        return layer.delta(name)
    a_ri, b_or = layer.matrices(name)
    return dora_delta(weight_oi, (b_or @ a_ri) * layer.configs[name].scaling, layer.magnitude(name))


def _dtype(layer: LowRank) -> torch.dtype:
    """Of the merged weight, if it is not quantized again."""
    base = layer.base
    return base.dtype if isinstance(base, QuantizedLinear) else base.weight.dtype  # pyright: ignore


def _logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    with evaluated(model):
        return model(token_ids)


def _total(sizes: Sequence[float]) -> float:
    return sqrt(sum(size * size for size in sizes))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
