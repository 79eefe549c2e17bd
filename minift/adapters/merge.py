"""Merging: fold the low-rank change into the weight, so that the adapter costs nothing any more.

    W' = W + (alpha / r) * B A

A quantized base is decoded first and the merged layer stays in 16 bit (or whatever the compute dtype is): the adapter
was trained on the decoded weight, so that is the weight it belongs to. Quantizing the sum again would change every
value.

The sum is computed in fp32 and rounded once. Peer: PEFT `merge_and_unload`.
"""

import torch
from torch import nn

from minift.adapters.inject import lora_layers
from minift.quant.linear import QuantizedLinear, plain_linear


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Replace every adapted layer by a plain nn.Linear that holds the merged weight, in place.

    Returns:
        paths of the merged layers.

    Raises:
        ValueError: the model has no adapter.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("nothing to merge: the model has no adapter")
    for path, layer in layers.items():
        base = layer.base
        weight_oi = base.dequantize(base.dtype) if isinstance(base, QuantizedLinear) else base.weight
        merged_oi = weight_oi.float() + sum(layer.delta(name) for name in layer.active)
        model.set_submodule(path, plain_linear(merged_oi.to(weight_oi.dtype), base.bias))
    return list(layers)
