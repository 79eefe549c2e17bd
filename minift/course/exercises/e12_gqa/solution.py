"""e12 Grouped-query attention: several query heads share one head of keys and values."""

import math

import torch
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads * D) -> (B, heads, L, D)."""
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B, L, heads * D)."""
    return x.transpose(1, 2).flatten(2)


def repeat_kv(x: Tensor, n: int) -> Tensor:
    """(B, kv_heads, L, D) -> (B, kv_heads * n, L, D): each head n times, its copies side by side."""
    return x.repeat_interleave(n, dim=1)


def attention(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, heads: int, kv_heads: int) -> Tensor:
    """x (B, L, W), wq (heads * D, W), wk and wv (kv_heads * D, W), wo (W, heads * D) -> (B, L, W); causal."""
    q = split_heads(x @ wq.T, heads)
    k = repeat_kv(split_heads(x @ wk.T, kv_heads), heads // kv_heads)
    v = repeat_kv(split_heads(x @ wv.T, kv_heads), heads // kv_heads)
    length, width = q.shape[2], q.shape[3]
    scores = q @ k.mT / math.sqrt(width)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(dim=3)
    return merge_heads(weights @ v) @ wo.T
