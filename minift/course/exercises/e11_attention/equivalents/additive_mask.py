"""Adds 0 or -inf to the scores from index arithmetic, with einsum, and removes NaN from the rows that saw nothing."""

import torch


def attention(q, k, v, padding=None, causal=False):
    lq, lk = q.size(2), k.size(2)
    bias = torch.zeros(q.size(0), 1, lq, lk, dtype=q.dtype)
    if causal:
        later = torch.arange(lk)[None, :] > torch.arange(lk - lq, lk)[:, None]
        bias[..., later] = float("-inf")
    if padding is not None:
        bias = bias + torch.zeros(padding.shape, dtype=q.dtype).masked_fill(~padding, float("-inf"))[:, None, None]
    scores = torch.einsum("bhqd,bhkd->bhqk", q / q.size(3) ** 0.5, k) + bias
    shifted = scores - scores.amax(-1, keepdim=True)
    weights = shifted.exp() / shifted.exp().sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhke->bhqe", torch.nan_to_num(weights, nan=0.0), v)
