"""Linear layers whose frozen weight is stored in 4 or 8 bits.

QLoRA trains adapters *through* a frozen quantized weight W. In 4 bits:

    forward    y  = x  W^T + b      W = dequantize(packed), thrown away again
    backward   dx = dy W            the same W, decoded a second time;  dW is never needed

So the layer keeps neither x nor the decoded W for the backward pass: only a reference to the packed bytes, which exist
anyway (matmul.py). Compared with bitsandbytes' Linear4bit, the backward pass uses the same W as the forward pass even
when the compute dtype differs from the dtype the weight had before (theirs rounds W to that one on the way back).

Dtypes in 4 bits: x is cast to the compute dtype, W is decoded straight to it, and y returns in the dtype of x. In 8
bits the product is one of integers (int8.py); y returns in the dtype of x, too. Quantizing is an explicit call
(`quantize_weight`, `from_linear`, `quantize_model`), never a side effect of `.to(device)`.

Peers: bitsandbytes `nn.Linear4bit`, `nn.Linear8bitLt`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from minift.quant.config import INT8, QuantConfig
from minift.quant.fourbit import NESTED_BLOCKSIZE, QuantState, dequantize_4bit, quantize_4bit
from minift.quant.int8 import dequantize_rows, int8_linear, quantize_weight_int8
from minift.quant.matmul import matmul_4bit


class QuantizedLinear(nn.Module):
    """What frozen quantized linear layers have in common.

    Attributes:
        in_features, out_features, bias: as torch.nn.Linear; the bias is not quantized.
        config: the format.
        dtype: of the layers around it, and so of the plain layer that may take its place; `.to(dtype)` changes it.
        stored_dtype: dtype of the weight before it was quantized.
        compute_dtype: dtype that the weight is decoded to for a product.
    """

    weight: Tensor
    bias: nn.Parameter | None

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
        self.config = config or self.default_config()
        self.dtype = self.stored_dtype = dtype
        self.compute_dtype = self.config.compute_dtype or dtype
        parameter = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        self.bias = parameter if bias else None
        self._register(device)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantConfig | None = None) -> Self:
        """Quantize an existing layer; its bias is shared, its weight is not changed."""
        bias, weight = linear.bias is not None, linear.weight
        layer = cls(linear.in_features, linear.out_features, bias, config, weight.dtype, device=weight.device)
        layer.quantize_weight(weight)
        if bias:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer

    @staticmethod
    def default_config() -> QuantConfig:
        raise NotImplementedError

    def _register(self, device: torch.device | str | None) -> None:
        """Make the empty buffers of the format, or refuse a format of the other kind."""
        raise NotImplementedError

    def quantize_weight(self, weight_oi: Tensor) -> None:
        """Fill the buffers from a floating-point weight [out_features, in_features]."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in `dtype`; None is the compute dtype."""
        raise NotImplementedError

    def plain(self) -> nn.Linear:
        """An ordinary frozen layer with the decoded weight, in the dtype of the layers around it."""
        return plain_linear(self.dequantize(self.dtype), self.bias)

    def _check_shape(self, weight_oi: Tensor) -> None:
        expected = (self.out_features, self.in_features)
        if weight_oi.shape != expected:
            raise ValueError(f"weight has shape {tuple(weight_oi.shape)}, this layer needs {expected}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to(device)` moves everything; `.to(dtype)` must not convert codes and scales: that is another weight."""
        held = dict(self.named_buffers(recurse=False))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(fn, recurse)
        for name, before in held.items():
            moved = getattr(self, name)
            if moved.dtype != before.dtype:
                setattr(self, name, before.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.config.label}, compute_dtype={self.compute_dtype}"
        )


class Linear4bit(QuantizedLinear):
    """A frozen linear layer with a packed 4-bit weight.

    Buffers: `weight` uint8 [ceil(out * in / 2), 1] (or the same bytes as `quant_storage`), `absmax` [m], and with
    double quantization `nested_absmax` [ceil(m / 256)] and `nested_offset` []. They are empty until filled.

    Args:
        in_features, out_features, bias: as torch.nn.Linear.
        config: the format; None is NF4 with double quantization.
        dtype: dtype of the weight before quantization, of the bias, and of the arithmetic unless `config` names one.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def _register(self, device: torch.device | str | None) -> None:
        config = self.config
        if config.quant_type == INT8:
            raise ValueError("Linear4bit cannot hold int8; use Linear8bit")
        n = self.in_features * self.out_features
        blocks, nested = -(-n // config.blocksize), config.double_quant

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        packed = -(-n // 2) // config.quant_storage.itemsize
        self.register_buffer("weight", empty(packed, 1, dtype=config.quant_storage))
        self.register_buffer("absmax", empty(blocks, dtype=torch.uint8 if nested else torch.float32))
        self.register_buffer(
            "nested_absmax", empty(-(-blocks // NESTED_BLOCKSIZE), dtype=torch.float32) if nested else None
        )
        self.register_buffer("nested_offset", empty(dtype=torch.float32) if nested else None)

    @staticmethod
    def default_config() -> QuantConfig:
        return QuantConfig()

    def quantize_weight(self, weight_oi: Tensor) -> None:
        """Fill the buffers from a floating-point weight [out_features, in_features]."""
        self._check_shape(weight_oi)
        config = self.config
        self.set_packed(
            *quantize_4bit(weight_oi, config.quant_type, config.blocksize, config.double_quant, config.quant_storage)
        )

    def set_packed(self, packed: Tensor, state: QuantState) -> None:
        """Take over a weight that is quantized already; its format replaces the configured one."""
        self.weight, self.absmax = outside_inference(packed), outside_inference(state.absmax)
        nested = (state.nested_absmax, state.nested_offset)
        self.nested_absmax, self.nested_offset = (None if t is None else outside_inference(t) for t in nested)
        self.stored_dtype = state.dtype
        self.config = replace(
            self.config, quant_type=state.quant_type, blocksize=state.blocksize,
            double_quant=state.nested_absmax is not None, quant_storage=packed.dtype,
        )  # fmt: skip

    @property
    def quant_state(self) -> QuantState:
        return QuantState(
            (self.out_features, self.in_features), self.stored_dtype, self.config.quant_type, self.config.blocksize,
            self.absmax, self.nested_absmax, self.nested_offset,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in `dtype`; None is the compute dtype."""
        return dequantize_4bit(self.weight, self.quant_state, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features], any float dtype -> [..., out_features] in the same dtype."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return matmul_4bit(x.to(self.compute_dtype), self.weight, self.quant_state, bias).to(x.dtype)


class Linear8bit(QuantizedLinear):
    """A frozen linear layer with an int8 weight and the products of LLM.int8().

    Buffers: `weight` int8 [out, in], `absmax` fp32 [out] (bitsandbytes: SCB).

    Args:
        in_features, out_features, bias: as torch.nn.Linear.
        config: `QuantConfig("int8", threshold=...)`; None is that with the threshold of the paper, 6.
        dtype: dtype of the weight before quantization, and of the bias.
    """

    absmax: Tensor

    def _register(self, device: torch.device | str | None) -> None:
        if self.config.quant_type != INT8:
            raise ValueError(f"Linear8bit cannot hold {self.config.quant_type}; use Linear4bit")
        shape = (self.out_features, self.in_features)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer("absmax", torch.empty(self.out_features, dtype=torch.float32, device=device))

    @staticmethod
    def default_config() -> QuantConfig:
        return QuantConfig(INT8)

    def quantize_weight(self, weight_oi: Tensor) -> None:
        """Fill the buffers from a floating-point weight [out_features, in_features]."""
        self._check_shape(weight_oi)
        self.set_codes(*quantize_weight_int8(weight_oi), weight_oi.dtype)

    def set_codes(self, codes_oi: Tensor, absmax_o: Tensor, stored_dtype: torch.dtype) -> None:
        """Take over a weight that is quantized already."""
        self.weight, self.absmax = outside_inference(codes_oi), outside_inference(absmax_o)
        self.stored_dtype = stored_dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in `dtype`; None is the compute dtype."""
        return dequantize_rows(self.weight, self.absmax, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features], any float dtype -> [..., out_features] in the same dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return int8_linear(x, self.weight, self.absmax, bias, self.config.threshold)


def outside_inference(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode: autograd refuses to remember those."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def empty_quantized(linear: nn.Linear, config: QuantConfig) -> QuantizedLinear:
    """The unfilled counterpart of a linear layer, on the same device."""
    kind = Linear8bit if config.quant_type == INT8 else Linear4bit
    weight = linear.weight
    return kind(linear.in_features, linear.out_features, linear.bias is not None, config, weight.dtype, weight.device)


def plain_linear(weight_oi: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A frozen nn.Linear around an existing weight and bias."""
    out_features, in_features = weight_oi.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_oi, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear
