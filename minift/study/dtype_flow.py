"""Which dtype each number of a forward pass has: what is stored, what is cast where, and what is multiplied in what.

Three dtypes meet in a layer, and only the first can be read off the model:

    stored     of the weight: bfloat16, or bytes that mean nothing before they are decoded (NF4)
    flowing    of the activations between layers: the embedding's, since every layer returns the dtype it was given
    compute    of the product itself: for a quantized layer whatever its configuration says

So the pass is not described here but watched: every operator that PyTorch runs is seen with the dtypes of its
arguments, and booked to the module in which it ran.

    model.layers.0.input_layernorm      bf16 -> fp32, fp32 -> bf16      the mean square is taken in fp32
    model.layers.0.self_attn.q_proj     uint8 -> bf16,  bf16 x bf16     decoded, multiplied

A cast is a copy into another floating-point type, or of codes into one, or into codes. A 4-bit product is watched as it
is defined, decode and multiply; on a GPU one kernel does both for few rows, with the same values of the weight. Left
out: what an operator does inside (a product of bf16 is summed in fp32), and the backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minift.quant.linear import QuantizedLinear

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "_int_mm", "int8_matmul")
ATTENTION = ("_scaled_dot_product", "_flash_attention")
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MADE_OF_OTHERS = ("minift::matmul_4bit", "minift::dequantize_4bit")
DEFINITION = torch._C.DispatchKey.CompositeExplicitAutograd  # where such an operator's definition is registered


@dataclass
class Flow:
    """What one module did in a forward pass.

    Attributes:
        path, kind: of the module and its class; path "" is the model itself.
        stored: how its own weight is stored; "" if it has none.
        came, left: dtypes of its first input and of its result.
        casts: "from -> to", in order, each once.
        products: "a x b", the dtypes of both factors, and of the sum where it is another: "int8 x int8 -> int32".
    """

    path: str
    kind: str
    stored: str = ""
    came: str = ""
    left: str = ""
    casts: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)


def trace_dtypes(model: nn.Module, *inputs: Any) -> list[Flow]:
    """Run a forward pass without gradients and write down the dtypes, a row for each module that did something itself.

    Rows are in the order in which that began.

    Args:
        model: any module tree; not changed.
        inputs: what its forward takes.
    """
    watch = _Watch()
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(watch.enter(path, module)))
        handles.append(module.register_forward_hook(watch.leave))
    try:
        with torch.no_grad(), watch:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [flow for flow in watch.flows.values() if flow.stored or flow.casts or flow.products]


def one_block(flows: Sequence[Flow], layer: int = 0) -> list[Flow]:
    """The rows of one decoder layer and of what stands before and after all of them."""
    return [flow for flow in flows if ".layers." not in flow.path or f".layers.{layer}." in f"{flow.path}."]


def format_flows(flows: Sequence[Flow]) -> str:
    """The rows as aligned text."""
    lines = [("module", "stored as", "came in", "casts", "multiplied", "went out")]
    for f in flows:
        lines.append((f.path or "(the model)", f.stored, f.came, ", ".join(f.casts), ", ".join(f.products), f.left))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip() for line in lines)


class _Watch(TorchDispatchMode):
    """Books casts and products to the module that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.flows: dict[str, Flow] = {}
        self.running: list[Flow] = []

    def enter(self, path: str, module: nn.Module) -> Callable[[nn.Module, tuple], None]:
        def hook(_: nn.Module, inputs: tuple) -> None:
            flow = self.flows.setdefault(path, Flow(path, type(module).__name__, _stored(module)))
            flow.came = _dtype(inputs)
            self.running.append(flow)

        return hook

    def leave(self, module: nn.Module, inputs: tuple, result: Any) -> None:
        self.running.pop().left = _dtype(result)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name
        if name in MADE_OF_OTHERS:
            with self:  # go on watching inside
                return func._op_dk(DEFINITION, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if self.running:
            flow = self.running[-1]
            idle = not (flow.casts or flow.products)
            self._book(flow, name.split("::")[1], args, result)
            if idle and (flow.casts or flow.products):  # a module that holds others stands where its own work begins
                self.flows[flow.path] = self.flows.pop(flow.path)
        return result

    def _book(self, flow: Flow, name: str, args: tuple, result: Any) -> None:
        types = [_short(arg.dtype) for arg in args if isinstance(arg, Tensor)]
        if name == "dequantize_4bit_out":
            _once(flow.casts, f"{types[0]} -> {types[-1]}")
        elif name == "_to_copy":
            came, left = args[0].dtype, result.dtype
            if came.is_floating_point and came != left and (left.is_floating_point or left == torch.int8):
                _once(flow.casts, f"{types[0]} -> {_short(left)}")
        elif name in PRODUCTS or name.startswith(ATTENTION):
            a, b = types[:2]  # where a sum comes first (addmm), it has the type of both factors
            left = _short((result[0] if isinstance(result, tuple) else result).dtype)
            _once(flow.products, f"{a} x {b}" + (f" -> {left}" if left != a else ""))


def _short(dtype: torch.dtype) -> str:
    return SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _once(found: list[str], text: str) -> None:
    if text not in found:
        found.append(text)


def _stored(module: nn.Module) -> str:
    """How the weight that this very module owns is stored."""
    if isinstance(module, QuantizedLinear):
        return module.config.label
    weight = module._parameters.get("weight")
    return "" if weight is None else _short(weight.dtype)


def _dtype(value: Any) -> str:
    """Of the first tensor in a result or in arguments."""
    first = next((leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor)), None)
    return "" if first is None else _short(first.dtype)
