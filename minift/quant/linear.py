"""Linear layers whose frozen weight is stored in 4 bits and decoded for every use.

QLoRA trains adapters *through* a frozen quantized weight W:

    forward    y  = x  W^T + b      W = dequantize(packed), thrown away again
    backward   dx = dy W            the same W, decoded a second time;  dW is never needed

So the layer keeps neither x nor the decoded W for the backward pass: only a reference to the packed bytes, which exist
anyway. Compared with bitsandbytes' Linear4bit, the backward pass uses the same W as the forward pass even when the
compute dtype differs from the dtype the weight had before (theirs rounds W to that dtype on the way back only).

Dtypes: x is cast to the compute dtype, W is decoded straight to it, and y returns in the dtype of x. Quantizing is an
explicit call (`quantize_weight`, `quantize_model`), never a side effect of `.to(device)`.

Peer: bitsandbytes `nn.Linear4bit` (peers compute a product for few rows with a kernel of its own; here every product is
decode + matmul, so the result does not depend on the batch size).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.quant.fourbit import NESTED_BLOCKSIZE, QuantState, check_format, dequantize_4bit, quantize_4bit


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize a model's linear layers.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: values per scale.
        double_quant: store the scales in 8 bits.
        skip: names of modules (last part of the dotted path, or the whole path) that stay as they are.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    skip: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        check_format(self.quant_type, self.blocksize)

    @classmethod
    def named(cls, quantize: "str | QuantConfig | None") -> "QuantConfig | None":
        """None | "nf4" | "fp4" | QuantConfig -> QuantConfig | None."""
        return cls(quant_type=quantize) if isinstance(quantize, str) else quantize


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + b for a weight that is decoded on demand and never gets a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, decode: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.decode = decode
        return F.linear(x, decode(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (grad_y,) = grads
        grad_x = grad_y @ ctx.decode() if ctx.needs_input_grad[0] else None
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias


class Linear4bit(nn.Module):
    """A frozen linear layer with a packed 4-bit weight.

    Buffers: `weight` uint8 [ceil(out * in / 2), 1], `absmax` [m], and with double quantization `nested_absmax`
    [ceil(m / 256)] and `nested_offset` []. They are empty until `quantize_weight` is called.

    Args:
        in_features, out_features, bias: as torch.nn.Linear.
        config: the format.
        dtype: dtype of the weight before quantization, of the bias, and the compute dtype.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        config: QuantConfig | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.config = config or QuantConfig()
        self.compute_dtype = self.stored_dtype = dtype
        n = in_features * out_features
        blocks = -(-n // self.config.blocksize)
        nested = self.config.double_quant

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.register_buffer("weight", empty(-(-n // 2), 1, dtype=torch.uint8))
        self.register_buffer("absmax", empty(blocks, dtype=torch.uint8 if nested else torch.float32))
        self.register_buffer(
            "nested_absmax", empty(-(-blocks // NESTED_BLOCKSIZE), dtype=torch.float32) if nested else None
        )
        self.register_buffer("nested_offset", empty(dtype=torch.float32) if nested else None)
        self.bias = nn.Parameter(empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantConfig | None = None) -> "Linear4bit":
        """Quantize an existing layer; its bias is shared, its weight is not changed."""
        bias, weight = linear.bias is not None, linear.weight
        layer = cls(linear.in_features, linear.out_features, bias, config, weight.dtype, device=weight.device)
        layer.quantize_weight(weight)
        if bias:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer

    def quantize_weight(self, weight_oi: Tensor) -> None:
        """Fill the buffers from a floating-point weight [out_features, in_features]."""
        expected = (self.out_features, self.in_features)
        if weight_oi.shape != expected:
            raise ValueError(f"weight has shape {tuple(weight_oi.shape)}, this layer needs {expected}")
        config = self.config
        self.weight, state = quantize_4bit(weight_oi, config.quant_type, config.blocksize, config.double_quant)
        self.absmax, self.nested_absmax, self.nested_offset = state.absmax, state.nested_absmax, state.nested_offset
        self.stored_dtype = weight_oi.dtype

    @property
    def quant_state(self) -> QuantState:
        return QuantState(
            (self.out_features, self.in_features), self.stored_dtype, self.config.quant_type, self.config.blocksize,
            self.absmax, self.nested_absmax, self.nested_offset,
        )  # fmt: skip

    def dequantize(self) -> Tensor:
        """The weight in the compute dtype, [out_features, in_features]."""
        return dequantize_4bit(self.weight, self.quant_state, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features], any float dtype -> [..., out_features] in the same dtype."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return FrozenLinear.apply(x.to(self.compute_dtype), self.dequantize, bias).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear4bit":
        """`.to(device)` moves everything; `.to(dtype)` must not round the scales, which would be another weight."""
        scales = {name: b for name, b in self.named_buffers(recurse=False) if b.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, scale.to(moved.device))
        return self

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.config.double_quant else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.config.quant_type}, blocksize={self.config.blocksize}{nested}, compute_dtype={self.compute_dtype}"
        )


def swap_linears(model: nn.Module, config: QuantConfig) -> list[str]:
    """Replace every nn.Linear that `config` does not skip by an empty Linear4bit on the same device.

    Works on the meta device: nothing is allocated or computed. A head that shares its weight with the embedding is left
    alone too, since the embedding needs its rows.

    Returns:
        names of the replaced modules.

    Raises:
        ValueError: if nothing was replaced.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not {name, name.rpartition(".")[2]} & set(config.skip)
        and id(module.weight) not in embeddings
    ]
    if not chosen:
        raise ValueError("nothing to quantize: the model has no linear layer that is not skipped")
    for name, linear in chosen:
        weight, bias = linear.weight, linear.bias is not None
        empty = Linear4bit(linear.in_features, linear.out_features, bias, config, weight.dtype, weight.device)
        model.set_submodule(name, empty)
    return [name for name, _ in chosen]


def quantize_model(model: nn.Module, quantize: str | QuantConfig = "nf4") -> list[str]:
    """Quantize the linear layers of a model that is already in memory, one by one, in place.

    Returns:
        names of the quantized modules.
    """
    config = QuantConfig.named(quantize)
    assert config is not None
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = swap_linears(model, config)
    for name in names:
        model.set_submodule(name, Linear4bit.from_linear(linears[name], config))
    return names


def dequantize_model(model: nn.Module) -> list[str]:
    """Replace every Linear4bit by an ordinary nn.Linear with the decoded weight, in place.

    The outputs stay the same to the bit: the decoded values are those the 4-bit layer multiplies with. It trades memory
    (4x at 16 bit) for not decoding at every token, which is what slows generation down on a CPU.

    Returns:
        names of the replaced modules.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name, layer in layers:
        model.set_submodule(name, plain_linear(layer.dequantize(), layer.bias))
    return [name for name, _ in layers]


def plain_linear(weight_oi: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A frozen nn.Linear around an existing weight and bias."""
    out_features, in_features = weight_oi.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_oi, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear
