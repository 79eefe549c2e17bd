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

from minift.adapters.inject import lora_layers
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
    head, embeddings = model.lm_head, [m for m in model.modules() if isinstance(m, nn.Embedding)]
    adapters = [p for layer in lora_layers(model).values() for p in layer.parameters() if p.requires_grad]
    own = {id(p) for p in adapters} | {id(p) for m in embeddings for p in m.parameters()}
    own |= {id(p) for p in head.parameters()}
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    norms = [p for name, p in model.named_parameters() if id(p) not in own and _is_norm(name)]
    own |= {id(p) for p in norms}
    own |= {id(p) for m in quantized for p in m.parameters()}
    plain = [p for p in model.parameters() if id(p) not in own and p.dim() > 1]
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [
        ("weights", _count([m.config.label for m in quantized] + [_name(p.dtype) for p in plain]),
         _count([_name(m.compute_dtype) for m in quantized] + [_name(p.dtype) for p in plain], False)),
        ("adapters", _types(adapters) or "none", compute if adapters else ""),
        ("norms", _types(norms), f"float32 inside, rounded to {compute}" if compute != "float32" else compute),
        ("embeddings", _types(p for m in embeddings for p in m.parameters()), compute),
        ("head", _types(head.parameters()) or "as the embeddings", compute),
        ("loss", "float32", "float32: logits are cast, a few rows at a time"),
        ("gradients", _types(trained), "as stored; their norm in float32 or wider"),
        ("optimizer state", _state(optimizer), "float32"),
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
        parts = [(large, "8-bit codes, float32 scales"), (len(sizes) - large, "float32")]
        return ", ".join(f"{text} ({count})" for count, text in parts if count)
    if isinstance(optimizer, AdamW):
        return f"float32 ({len(sizes)})"
    found = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return _types(found) or "none before the first step"


def _is_norm(name: str) -> bool:
    return any("norm" in part or part.startswith("ln_") for part in name.split("."))


def _types(tensors: Iterable[Tensor]) -> str:
    return _count([_name(tensor.dtype) for tensor in tensors])


def _count(names: Iterable[str], with_numbers: bool = True) -> str:
    return ", ".join(f"{name} ({count})" if with_numbers else name for name, count in Counter(names).items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
