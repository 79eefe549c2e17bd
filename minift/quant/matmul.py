"""Multiply by a weight that is stored in 4 bits: y = x W^T + b.

Two ways, chosen by the number of rows of x:

    many rows   decode W to the dtype of x, then an ordinary product: the decoding is paid once for all rows
    few rows    (up to 16, on a GPU) one kernel decodes in registers: W is read at half a byte a value, never written

The first is the definition, and all that a CPU does. Both multiply the same W, the one `dequantize_4bit` gives in the
dtype of x, and sum in fp32; the kernel differs in the order of the sum, and adds the bias before the one rounding of
the result. So a row's result on a GPU depends, in the last bits, on how many rows stand beside it.

Gradients flow to x (dx = dy W, W decoded again) and to the bias; the weight is frozen.

Peer: bitsandbytes `matmul_4bit`. Its kernel for up to 3 rows rounds entry, scale and every product to 16 bits first,
so it is less exact than its own decode + product.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.numerics.dtypes import DTYPES
from minift.quant.fourbit import WEIGHT, QuantState, check_state, code_tables, packed_bytes, workspace


def matmul_4bit(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b, [..., o] in the dtype of x.

    Args:
        x: fp32, bf16 or fp16 [..., i].
        packed, state: of a weight [o, i], as `quantize_4bit` returns them.
        bias: [o] in the dtype of x.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    check_state(packed, state)
    if x.dtype not in DTYPES.values():
        raise ValueError(f"cannot multiply {x.dtype} by a 4-bit weight; supported: {', '.join(DTYPES)}")
    if len(state.shape) != 2 or x.dim() == 0 or x.shape[-1] != state.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} cannot be multiplied by a weight of shape {state.shape}")
    if bias is not None and (bias.shape != state.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"bias is {tuple(bias.shape)} of {bias.dtype}; this product needs {state.shape[:1]} of {x.dtype}"
        )
    return torch.ops.minift.matmul_4bit(
        x, packed_bytes(packed), state.absmax, state.nested_absmax, state.nested_offset,
        state.quant_type, state.blocksize, state.shape, bias,
    )  # fmt: skip


# --- the operator: see fourbit.py -------------------------------------------------------------------------------------

torch.library.define("minift::matmul_4bit", f"(Tensor x, {WEIGHT}, SymInt[] shape, Tensor? bias) -> Tensor")
torch.library.define("minift::matmul_4bit_dx", f"(Tensor grad_y, {WEIGHT}, SymInt[] shape) -> Tensor")


def _decode_and_multiply(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    bias: Tensor | None,
) -> Tensor:
    """x [..., i], packed weight [o, i] -> [..., o]."""
    weight_oi = _decode(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, x.dtype)
    return F.linear(x, weight_oi, bias)


def _decode(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight, in memory that the next call overwrites."""
    # On a GPU the allocator hands out the same memory again by itself, and in the order of each stream.
    on_cpu, n = packed.device.type == "cpu", prod(shape)
    weight_n = workspace(n, dtype, packed.device, "weight") if on_cpu else packed.new_empty(n, dtype=dtype)
    weight_oi = weight_n.view(shape)
    torch.ops.minift.dequantize_4bit_out(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, weight_oi)
    return weight_oi


torch.library.impl("minift::matmul_4bit", "default", _decode_and_multiply)


@torch.library.impl("minift::matmul_4bit", "cuda")
def _matmul_4bit_cuda(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    bias: Tensor | None,
) -> Tensor:
    from minift_kernels.matmul import MAX_ROWS, matmul_4bit

    out_features, in_features = shape
    rows = x.numel() // max(1, in_features)
    if not 0 < rows <= MAX_ROWS:
        return _decode_and_multiply(x, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, bias)
    parts = (None if part is None else part.contiguous() for part in (packed, absmax, nested_absmax, nested_offset))
    weight = (*parts, *code_tables(quant_type, x.device), blocksize, out_features)
    x_ni, bias = x.reshape(rows, in_features).contiguous(), None if bias is None else bias.contiguous()
    y = matmul_4bit(x_ni, *weight, bias=bias)  # pyright: ignore (the checker loses count of the parts)
    return y.view(*x.shape[:-1], out_features)


@torch.library.register_fake("minift::matmul_4bit")
def _matmul_4bit_fake(x, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, bias):
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.impl("minift::matmul_4bit_dx", "default")
def _matmul_4bit_dx(
    grad_y: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
) -> Tensor:
    """dx = dy W, [..., o] -> [..., i]."""
    return grad_y @ _decode(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, grad_y.dtype)


@torch.library.register_fake("minift::matmul_4bit_dx")
def _matmul_4bit_dx_fake(grad_y, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape):
    return grad_y.new_empty((*grad_y.shape[:-1], shape[1]))


def _keep_weight(ctx, inputs, output) -> None:
    """Remember the weight of either operator: references to tensors that exist anyway."""
    _, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, *_ = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
    ctx.form = (quant_type, blocksize, shape)


def _backward(ctx, grad_y: Tensor):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.minift.matmul_4bit_dx(grad_y, *ctx.saved_tensors, *ctx.form)
    if ctx.needs_input_grad[-1]:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
    return grad_x, *[None] * 7, grad_bias


def _backward_dx(ctx, grad_dx: Tensor):
    """dx = dy W is a product with W, too, so its derivative is one with W^T: the forward pass."""
    return torch.ops.minift.matmul_4bit(grad_dx, *ctx.saved_tensors, *ctx.form, None), *[None] * 7


torch.library.register_autograd("minift::matmul_4bit", _backward, setup_context=_keep_weight)
torch.library.register_autograd("minift::matmul_4bit_dx", _backward_dx, setup_context=_keep_weight)
