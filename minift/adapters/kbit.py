"""Preparing a quantized model for training: what is frozen, and in which dtype the rest stays.

Quantized are the decoder's linear layers. Embeddings, norms and the head keep the checkpoint's 16 bits, and the dtype
of the embedding is that of all activations between the layers. Two customs:

    "peft"   everything that is not quantized becomes fp32 (PEFT's prepare_model_for_kbit_training). The residual stream
             is then summed in fp32. It costs two bytes more for each of those parameters, and every activation, also
             those that are kept for the backward pass, takes four bytes instead of two.
    "keep"   it stays as it is (what TRL does, and what `minift train` does). The adapters are fp32 either way.

Of Phi-3-mini (NF4, double quantization, bf16), whose two matrices of the vocabulary weigh 197 million parameters:

              weights                                  + LoRA r = 8
    keep      2206.34 MB                               2256.67 MB
    peft      2600.74 MB    + 394.40 = 2 bytes each    2651.07 MB

(plus the scales, 57.5 MB, which transformers' get_memory_footprint, and so the book, leave out). The arithmetic of a
quantized layer is the same in both: its input is cast to the compute dtype and its output back to the input's.

Both freeze all parameters, before adapters are added. PEFT's function also switches on gradient checkpointing and lets
the embedding's output require a gradient, which reentrant checkpointing needs; here `train` has an option for the first
and its checkpointing does not need the second.

Peer: PEFT `utils/other.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from minift.adapters.method import method_of
from minift.adapters.switched import switched
from minift.quant.linear import QuantizedLinear

POLICIES = ("keep", "peft")
SCALES = "scales"
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Prepared:
    """What `prepare_for_kbit_training` did.

    Attributes:
        policy: "keep" or "peft".
        before, after: bytes by what is stored, as `bytes_by_kind` gives them.
        cast: names of the parameters that are fp32 now and were not before.
        frozen: names of the parameters that required gradients before.
    """

    policy: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    cast: tuple[str, ...]
    frozen: tuple[str, ...]

    def format(self) -> str:
        """The bytes as a table."""
        kinds = list(dict.fromkeys((*self.before, *self.after)))
        rows = [(kind, self.before.get(kind, 0), self.after.get(kind, 0)) for kind in kinds]
        rows.append(("total", sum(self.before.values()), sum(self.after.values())))
        lines = [f"{'stored as':<10}  {'bytes before':>16}  {'after':>16}"]
        lines += [f"{kind:<10}  {before:>16,}  {after:>16,}" for kind, before, after in rows]
        return "\n".join([*lines, f"{len(self.cast)} parameters cast to float32, {len(self.frozen)} frozen"])


def prepare_for_kbit_training(model: nn.Module, policy: str = "keep") -> Prepared:
    """Freeze a quantized model, in place, and cast what is not quantized as the policy says.

    Args:
        model: with quantized layers and without adapters; the meta device will do.
        policy: "keep" or "peft".

    Raises:
        ValueError: an unknown policy, a model without quantized layers (casting all of it would double it), or one
            that holds adapters (they would be frozen).
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}: choose one of {', '.join(POLICIES)}")
    if switched(model) or method_of(model) is not None:
        raise ValueError("prepare the model before adapters are added: they would be frozen, too")
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not quantized:
        raise ValueError("the model has no quantized layers to prepare; load it with quantize='nf4', or just train it")
    before = bytes_by_kind(model)
    frozen = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    model.requires_grad_(False)
    cast = ()
    if policy == "peft":
        cast = tuple(name for name, p in model.named_parameters() if p.dtype in SIXTEEN_BITS)
        for p in model.parameters():
            if p.dtype in SIXTEEN_BITS:
                p.data = p.data.float()  # the parameter stays the same object, so what was tied stays tied
        for layer in quantized:
            layer.dtype = torch.float32  # of what surrounds it
    return Prepared(policy, before, bytes_by_kind(model), cast, frozen)


def bytes_by_kind(model: nn.Module) -> dict[str, int]:
    """Bytes that a model's tensors take, by how they are stored; works on the meta device.

    The keys are formats of quantized weights ("nf4"), "scales" for what belongs to these, and dtypes for everything
    else. A tied weight counts once. Without "scales", the sum is what transformers' get_memory_footprint says.
    """
    found: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        quantized = module.config.quant_type if isinstance(module, QuantizedLinear) else ""
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            kind = str(tensor.dtype).removeprefix("torch.")
            if quantized and name != "bias":
                kind = quantized if name == "weight" else SCALES
            found[kind] = found.get(kind, 0) + tensor.nbytes
    return found
