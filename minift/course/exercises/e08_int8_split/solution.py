"""e08 LLM.int8 split: integers for almost all columns, float for the few that would spoil the scales."""

import torch
from torch import Tensor


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, columns) -> q int8 of the same shape, absmax (rows,); a row of zeros gives 0 and 0."""
    absmax = x.abs().amax(1)
    divisor = absmax.masked_fill(absmax == 0, 1.0)
    return torch.round(x / divisor.unsqueeze(1) * 127).to(torch.int8), absmax


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """x (rows, columns) -> bool (columns,): whether the column has any |x| >= threshold."""
    return (x.abs() >= threshold).any(0)


def matmul(x: Tensor, q_w: Tensor, absmax_w: Tensor, threshold: float) -> Tensor:
    """x (tokens, in), q_w int8 (out, in), absmax_w (out,) -> y (tokens, out)."""
    outliers = outlier_columns(x, threshold)
    q_x, absmax_x = quantize_rows(x.masked_fill(outliers, 0.0))
    sums = q_x.int() @ q_w.int().T
    y = sums * (absmax_x.unsqueeze(1) * absmax_w / 127**2)
    decoded = q_w[:, outliers] * absmax_w.unsqueeze(1) / 127
    return y + x[:, outliers] @ decoded.T
