"""LLM.int8(): both factors of a matrix product in 8 bits, except for the few columns that would spoil it.

A linear layer sums over input features, y[n, o] = sum_i x[n, i] w[o, i]. If every row of x and every row of w has one
scale, the scales do not depend on i and leave the sum, so what is left to multiply and add are integers:

    codes[r, i] = round(x[r, i] * 127 / absmax[r])       absmax[r] = max_i |x[r, i]|       one byte a value
    y[n, o]     = absmax_x[n] * absmax_w[o] / 127^2  *  sum_i codes_x[n, i] codes_w[o, i]     ("vector-wise")

The weight is quantized once, x anew in every call. The sum is exact in int32.

**Outlier columns.** From some 6.7 billion parameters on, transformers put values 20 times as large as all others into a
handful of features, the same ones for most tokens. Such a value becomes the absmax of its row, and the other features
share the few codes around zero. So a column of x in which any |x| reaches the threshold is multiplied in floating
point, with the decoded column of the weight, and has code 0 in the integer product:

    x_ni   0.4   -61.0   1.2  -0.3          codes with absmax    61        1  -127     2    -1
          -1.1   -58.5   0.2   2.5                               58.5     -2  -127     0     5
                   |
                 |x| >= 6: an outlier       codes without it,     1.2     42     0   127   -32
                   |                              absmax          2.5    -56     0    10   127
                   v
    y_no = int8 product of the other columns   +   x_ni[:, [1]] @ decoded w_oi[:, [1]]^T

Threshold 6 is the paper's: it keeps the quality of fp16, with 99.9 % of the values in 8 bits. 0 turns the split off. As
in bitsandbytes, values below the threshold in an outlier column still count for the absmax of their row.

Cost: a weight takes one byte instead of two, and four bytes a row. Every call quantizes x, and a threshold makes a GPU
tell the CPU how many outlier columns there are, and the CPU waits. For small layers this is slower than fp16.

Rounding: x and w are cast to fp16 before they are quantized (w even from bf16: below 2^-14 it loses bits). The integer
sum, the scales and the bias meet in fp32 and are rounded once to the dtype of x; the outlier product is added in that
dtype. Values beyond 65504, the largest of fp16, are refused in a weight. In x they are outliers if there is a
threshold, and are multiplied as they are; without one the row becomes NaN, as in bitsandbytes: a check would make the
CPU wait for a GPU in every layer, and a NaN loss is noticed anyway.

**Backward.** dx = dy W with the decoded weight, as if rounding x had slope 1; the weight is frozen. Nothing is kept for
it but the codes. Training computes the same forward pass as inference (bitsandbytes does so on CUDA only).

Decoding has two forms that differ by an ulp of fp32, and bitsandbytes uses both: (code * absmax) / 127 for columns and
for merging (`dequantize_rows`), and code * (absmax / 127) in the backward pass, which needs no fp32 copy of the weight.

Equal bit for bit to bitsandbytes' `MatMul8bitLt` on a CPU but for one constant: it multiplies by 6.200124e-05 where
1/127^2 is 6.2000124e-05 (1.8e-5 too much; its CUDA kernel has 6.200012e-05, which is right, but rounds to fp16 on the
way to any other dtype).

Left out: weights kept in fp16 and quantized in every step (`has_fp16_weights`), and with them the column scales of x
that bitsandbytes takes for weight gradients.

Source: Dettmers et al., LLM.int8(), arXiv 2208.07339. Here n counts rows (tokens), k outlier columns.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minift.numerics.dtypes import DTYPES

CODE_UNIT = 1 / 127  # a code of 1, as a fraction of the absmax
PRODUCT_UNIT = 1 / 127**2  # a product of two codes of 1
# 2^17 products of (-128) x (-128) sum up to 2^31, one more than int32 holds.
MAX_IN_FEATURES = 2**17 - 1


def quantize_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to int8 with one scale a row, leaving outliers out.

    Rows run over the last dimension. A row of zeros has absmax 0 and codes 0; so has one whose absmax is so small
    (below 3.8e-37, fp32 and bf16 only) that 127 / absmax exceeds fp32, but it keeps its absmax.

    Args:
        x: fp32, bf16 or fp16 [..., i], not empty; not changed.
        threshold: |x| >= threshold (compared in the dtype of x) makes an outlier; 0: there are none.

    Returns:
        codes: int8, shape of x, in -127..127; 0 in outlier columns.
        absmax: fp32 [n], largest magnitude of each row among those that are no outliers.
        outlier_columns: int64 [k], rising.

    Raises:
        ValueError: another dtype, no element, a negative threshold, NaN, or an infinity that is not an outlier.
    """
    _check_float(x, "x")
    _check_threshold(threshold)
    codes_ni, absmax_n, outlier_columns = _quantize_rows(x.detach().reshape(-1, x.shape[-1]), threshold)
    if not absmax_n.isfinite().all():
        kind = "NaN" if absmax_n.isnan().any() else "infinite"
        raise ValueError(f"cannot quantize: the tensor holds {kind} values")
    return codes_ni.view(x.shape), absmax_n, outlier_columns


def quantize_weight_int8(weight_oi: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight as LLM.int8() does: cast to fp16, then one scale for each output feature.

    Args:
        weight_oi: fp32, bf16 or fp16 [o, i], finite, not empty, no magnitude beyond fp16's 65504.

    Returns:
        codes: int8 [o, i].
        absmax: fp32 [o].

    Raises:
        ValueError: if the weight is not as described.
    """
    _check_float(weight_oi, "weight")
    if weight_oi.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight_oi.shape)}; a matrix [out_features, in_features] is needed")
    largest = weight_oi.detach().abs().amax()
    if largest.isfinite() and largest.half().isinf():
        raise ValueError(
            f"the weight holds {largest.item():g}, but LLM.int8() casts weights to fp16, which ends at 65504: "
            "use a 4-bit type or leave this layer unquantized"
        )
    codes_oi, absmax_o, _ = quantize_rows(weight_oi.detach().half())
    return codes_oi, absmax_o


def dequantize_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Get values back: (code * absmax) / 127 in fp32, rounded once to `dtype`. Shape of `codes`.

    Args:
        codes: int8 [..., i].
        absmax: fp32 [n], one for each row.

    Raises:
        ValueError: another dtype, or not one scale for each row.
    """
    check_rows(codes, absmax)
    return (codes * absmax.view(*codes.shape[:-1], 1)).mul_(CODE_UNIT).to(dtype)


def int8_matmul(a_ni: Tensor, b_oi: Tensor) -> Tensor:
    """a b^T, exact: int8 [n, i] and int8 [o, i] -> int32 [n, o].

    A product of fp32 copies would not do: a product of two codes reaches 127^2, so from 1041 features on a sum can pass
    2^24, above which fp32 skips integers.

    Raises:
        ValueError: other dtypes or shapes, or so many features that int32 could overflow.
    """
    if a_ni.dtype != torch.int8 or b_oi.dtype != torch.int8:
        raise ValueError(f"int8_matmul multiplies int8 codes, got {a_ni.dtype} and {b_oi.dtype}")
    if a_ni.ndim != 2 or b_oi.ndim != 2 or a_ni.shape[1] != b_oi.shape[1]:
        raise ValueError(f"cannot multiply [n, i] with [o, i]: the shapes are {tuple(a_ni.shape)}, {tuple(b_oi.shape)}")
    if a_ni.shape[1] > MAX_IN_FEATURES:
        raise ValueError(f"{a_ni.shape[1]} features could overflow int32: at most {MAX_IN_FEATURES} are exact")
    return torch.ops.minift.int8_matmul(a_ni, b_oi)


def int8_linear(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    """y = x W^T + b in 8 bits, outlier columns of x apart. Differentiable in x and the bias.

    Args:
        x: fp32, bf16 or fp16 [..., i].
        codes, absmax: the frozen weight, int8 [o, i] and fp32 [o], from `quantize_weight_int8`.
        bias: floating point [o]; added in fp32.
        threshold: |x| >= threshold in fp16 makes an outlier; the paper's value is 6; 0: all columns in 8 bits.

    Returns:
        y: [..., o] in the dtype of x. A row that holds NaN, or without a threshold anything beyond 65504, is NaN.

    Raises:
        ValueError: dtypes or shapes that do not fit, or a negative threshold.
    """
    _check_threshold(threshold)
    check_rows(codes, absmax)
    if codes.ndim != 2 or x.ndim == 0 or x.shape[-1] != codes.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit a weight of shape {tuple(codes.shape)}")
    if x.dtype not in DTYPES.values():
        raise ValueError(f"x is {x.dtype}; supported: {', '.join(DTYPES)}")
    if bias is not None and bias.shape != absmax.shape:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, this weight needs {tuple(absmax.shape)}")
    y_no = Int8Linear.apply(x.reshape(-1, x.shape[-1]), codes, absmax, bias, threshold)
    return y_no.view(*x.shape[:-1], len(codes))


class Int8Linear(torch.autograd.Function):
    """`int8_linear` for a matrix x, with the decoded weight for its gradient."""

    @staticmethod
    def forward(
        ctx, x_ni: Tensor, codes_oi: Tensor, absmax_o: Tensor, bias_o: Tensor | None, threshold: float
    ) -> Tensor:
        ctx.save_for_backward(codes_oi, absmax_o)
        ctx.bias_dtype = None if bias_o is None else bias_o.dtype
        codes_ni, absmax_n, outlier_columns = _quantize_rows(x_ni.half(), threshold)
        # Codes of such a row mean nothing (0 x infinity was cast to int8), so its scale must spoil whatever they are.
        absmax_n.masked_fill_(absmax_n.isinf(), torch.nan)
        y_no = int8_matmul(codes_ni, codes_oi) * (absmax_n.unsqueeze(1) * absmax_o)
        y_no.mul_(PRODUCT_UNIT)
        if bias_o is not None:
            y_no.add_(bias_o)
        y_no = y_no.to(x_ni.dtype)
        if len(outlier_columns):
            weight_ok = dequantize_rows(codes_oi[:, outlier_columns], absmax_o, x_ni.dtype)
            y_no.addmm_(x_ni[:, outlier_columns], weight_ok.T)
        return y_no

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        (grad_no,) = grads
        codes_oi, absmax_o = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            # In place on the cast codes: one buffer of the weight's size in the gradient's dtype and no other.
            weight_oi = codes_oi.to(grad_no.dtype).mul_((absmax_o * CODE_UNIT).unsqueeze(1))
            grad_x = grad_no @ weight_oi
        if ctx.needs_input_grad[3]:
            grad_bias = grad_no.sum(0, dtype=ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None


def check_rows(codes: Tensor, absmax: Tensor) -> None:
    """Refuse codes and scales that do not belong together."""
    if codes.dtype != torch.int8 or codes.ndim == 0:
        raise ValueError(f"codes must be int8 [..., i], got {codes.dtype} of shape {tuple(codes.shape)}")
    rows = math.prod(codes.shape[:-1])
    if absmax.dtype != torch.float32 or absmax.shape != (rows,):
        found = f"{absmax.dtype} of shape {tuple(absmax.shape)}"
        raise ValueError(f"absmax is {found}; codes of shape {tuple(codes.shape)} need torch.float32 ({rows},)")


def _quantize_rows(x_ni: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_rows` for a matrix, unchecked: a row whose absmax is not finite has codes without meaning."""
    magnitude_ni = x_ni.abs()
    outlier_columns = torch.empty(0, dtype=torch.int64, device=x_ni.device)
    if threshold > 0:
        is_outlier_ni = magnitude_ni >= threshold
        outlier_columns = is_outlier_ni.any(dim=0).nonzero().view(-1)
        magnitude_ni.masked_fill_(is_outlier_ni, 0)
    absmax_n = magnitude_ni.amax(dim=1).float()
    # Rounded twice, as `127.0 / tensor` is in Python; another order would move some values across a midpoint.
    scale_n = absmax_n.reciprocal() * 127
    scale_n.masked_fill_(scale_n.isinf(), 0)  # 0 x infinity would be NaN, and what that is in int8 is nowhere defined
    scaled_ni = (x_ni * scale_n.unsqueeze(1)).round_()
    # Before the cast, since an outlier may exceed int8 by any amount.
    scaled_ni.index_fill_(1, outlier_columns, 0)
    return scaled_ni.to(torch.int8), absmax_n, outlier_columns


def _check_float(x: Tensor, name: str) -> None:
    if x.dtype not in DTYPES.values():
        raise ValueError(f"cannot quantize {x.dtype}; supported: {', '.join(DTYPES)}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; at least one row with one value is needed")


def _check_threshold(threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(f"outlier threshold {threshold}: choose 0 for none, or a positive magnitude such as 6.0")


# --- the operator: one integer product; cuBLAS takes certain sizes only ----------------------------------------------

torch.library.define("minift::int8_matmul", "(Tensor a_ni, Tensor b_oi) -> Tensor")


@torch.library.impl("minift::int8_matmul", "default")
def _int8_matmul(a_ni: Tensor, b_oi: Tensor) -> Tensor:
    return torch._int_mm(a_ni, b_oi.T) if _has_byte_products() else _int8_matmul_by_floats(a_ni, b_oi)


@cache
def _has_byte_products() -> bool:
    """Whether this CPU multiplies bytes fast and adds them in 32 bits: AVX-512 with VNNI.

    Without AVX-512 torch multiplies one by one, slower than in fp32. And oneDNN, where it is told to use less than the
    CPU has (ONEDNN_MAX_CPU_ISA), adds pairs of products in 16 bits and cuts off what is more.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    codes = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.T) == 64 * 127**2).all())


def _int8_matmul_by_floats(a_ni: Tensor, b_oi: Tensor) -> Tensor:
    """The same sums in fp32, which holds every integer up to 2^24: exact for 1024 products of at most 2^14."""
    sums_no = a_ni.new_zeros(len(a_ni), len(b_oi), dtype=torch.int32)
    for start in range(0, a_ni.shape[1], 1024):
        piece = slice(start, start + 1024)
        sums_no += (a_ni[:, piece].float() @ b_oi[:, piece].float().T).to(torch.int32)
    return sums_no


def _int8_matmul_padded(a_ni: Tensor, b_oi: Tensor) -> Tensor:
    """Zeros around both factors, cut off again: PyTorch wants more than 16 rows and the other sizes in eights.

    32 rows and sixteens, because cuBLAS has been seen to refuse the smallest sizes that PyTorch lets pass. Layers of
    real models are multiples of 16, so it is only ever x, with few rows, that is copied.
    """
    rows, out_features, more_i = len(a_ni), len(b_oi), -a_ni.shape[1] % 16
    padded_ni = _pad(a_ni, max(0, 32 - rows), more_i)
    padded_oi = _pad(b_oi, -out_features % 16, more_i)
    return torch._int_mm(padded_ni, padded_oi.T)[:rows, :out_features].contiguous()


torch.library.impl("minift::int8_matmul", "cuda", _int8_matmul_padded)


def _pad(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Append zeros; F.pad copies even where there is nothing to append."""
    return F.pad(codes, (0, columns, 0, rows)) if rows or columns else codes


@torch.library.register_fake("minift::int8_matmul")
def _int8_matmul_fake(a_ni: Tensor, b_oi: Tensor) -> Tensor:
    return a_ni.new_empty((a_ni.shape[0], b_oi.shape[0]), dtype=torch.int32)
