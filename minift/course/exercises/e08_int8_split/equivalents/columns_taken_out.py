"""Takes the columns out instead of setting them to zero, multiplies in float64, and adds column by column."""

import torch


def quantize_rows(x):
    absmax = x.new_zeros(len(x)) if x.shape[1] == 0 else torch.maximum(x.max(1).values, -x.min(1).values)
    factor = torch.where(absmax > 0, 127 / absmax, torch.zeros_like(absmax))
    return (x * factor[:, None]).round().char(), absmax


def outlier_columns(x, threshold):
    return torch.logical_or(x.amax(0) >= threshold, x.amin(0) <= -threshold)


def matmul(x, q_w, absmax_w, threshold):
    apart = outlier_columns(x, threshold)
    kept = (~apart).nonzero().flatten()
    q_x, absmax_x = quantize_rows(x.index_select(1, kept))
    y = torch.einsum("ti,oi->to", q_x.double(), q_w.index_select(1, kept).double())
    y = y * torch.outer(absmax_x.double() / 127, absmax_w.double() / 127)
    for i in apart.nonzero().flatten().tolist():
        y += torch.outer(x[:, i].double(), q_w[:, i].double() * absmax_w.double() / 127)
    return y.float()
