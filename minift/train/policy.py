"""Which numbers of a run have which type, read off the model and the optimizer: the whole precision policy.

    part              stored                  computed in
    weights           nf4 (210)               bfloat16
    adapters          float32 (420)           bfloat16
    norms             bfloat16 (61)           float32 inside, rounded to bfloat16
    ...

There is no autocast: each of these casts is written in the code of the layer. What surprises elsewhere (adapters in
fp32 beside a 16-bit model, a 4-bit layer that computes in fp32) shows here before the first step.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minift.adapters.inject import adapter_parameters
from minift.adapters.method import method_of
from minift.adapters.own import OwnParameters
from minift.adapters.switched import switched
from minift.model.decoder import CausalLM
from minift.optim.adamw import AdamW
from minift.optim.adamw8bit import MIN_8BIT_SIZE, AdamW8bit
from minift.quant.linear import QuantizedLinear

HEADINGS = ("part", "stored", "computed in")


def precision_table(model: CausalLM, optimizer: torch.optim.Optimizer) -> list[tuple[str, str, str]]:
    """(part, how it is stored, what it is computed in) for each part of a run; in brackets, how many tensors.

    Args:
        model: with its adapters, ready to train.
        optimizer: before its first step or later.
    """
    compute = _name(model.decoder.embed_tokens.weight.dtype)
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    taken: set[int] = set()  # each parameter belongs to the first part that claims it

    def claim(parameters: Iterable[Tensor]) -> list[Tensor]:
        found = [p for p in parameters if id(p) not in taken]
        taken.update(map(id, found))
        return found

    trained = [p for p in model.parameters() if p.requires_grad]
    adapters = claim(_added(model))
    embeddings = claim(p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    head = claim(model.lm_head.parameters())
    norms = claim(p for name, p in model.named_parameters() if _is_norm(name))
    claim(p for m in quantized for p in m.parameters() if p.dim() > 1)
    plain = claim(p for p in model.parameters() if p.dim() > 1)
    biases = claim(model.parameters())
    rows = [
        ("weights", _count([m.config.label for m in quantized] + [_name(p.dtype) for p in plain]),
         _count([_name(m.compute_dtype) for m in quantized] + [_name(p.dtype) for p in plain], False)),
        ("adapters", _types(adapters) or "none", compute if adapters else ""),
        ("norms", _types(norms), f"float32 inside, rounded to {compute}" if compute != "float32" else compute),
        ("biases", _types(biases), compute),
        ("embeddings", _types(embeddings), compute),
        ("head", _types(head) or "as the embeddings", compute),
        ("loss", "float32", "float32: logits are cast, a few rows at a time"),
        ("gradients", _types(trained), "as stored; their norm in float32 or wider"),
        ("optimizer state", _state(optimizer), f"float32{_rounding(trained, optimizer)}"),
    ]  # fmt: skip
    return [row for row in rows if row[1]]


def format_precision(table: Iterable[tuple[str, str, str]]) -> str:
    """The table as aligned text."""
    rows = [HEADINGS, *table]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{part:<{widths[0]}}  {stored:<{widths[1]}}  {how}".rstrip() for part, stored, how in rows)


def _state(optimizer: torch.optim.Optimizer) -> str:
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, AdamW8bit):
        large = sum(size >= MIN_8BIT_SIZE for size in sizes)
        paged = " in pages of host memory" if optimizer.pool is not None else ""
        parts = [(large, f"8-bit codes, float32 scales{paged}"), (len(sizes) - large, "float32")]
        return ", ".join(f"{text} ({count})" for count, text in parts if count)
    if isinstance(optimizer, AdamW):
        return f"float32 ({len(sizes)})"
    found = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return _types(found) or "none before the first step"


def _rounding(trained: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> str:
    """How an update comes to a parameter that is narrower than the arithmetic."""
    narrow = sorted({_name(p.dtype) for p in trained if p.dtype.itemsize < 4})
    how = "by chance" if optimizer.defaults.get("stochastic_rounding") else "to nearest"
    return f", then rounded {how} to {', '.join(narrow)}" if narrow else ""


def _added(model: CausalLM) -> list[Tensor]:
    """The trained parameters that the model did not have before."""
    method = method_of(model)
    if method is not None:
        return [] if isinstance(method, OwnParameters) else [p for p in model.parameters() if p.requires_grad]
    return [p for place in switched(model).values() for p in adapter_parameters(place) if p.requires_grad]


def _is_norm(name: str) -> bool:
    return any("norm" in part or part.startswith("ln_") for part in name.split("."))


def _types(tensors: Iterable[Tensor]) -> str:
    return _count([_name(tensor.dtype) for tensor in tensors])


def _count(names: Iterable[str], with_numbers: bool = True) -> str:
    return ", ".join(f"{name} ({count})" if with_numbers else name for name, count in Counter(names).items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
