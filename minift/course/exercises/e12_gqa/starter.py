"""e12 Grouped-query attention: README.md says what to write. Check with: minift-course check e12"""

import torch
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads * D) -> (B, heads, L, D)."""
    # TODO
    raise NotImplementedError


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B, L, heads * D)."""
    # TODO
    raise NotImplementedError


def repeat_kv(x: Tensor, n: int) -> Tensor:
    """(B, kv_heads, L, D) -> (B, kv_heads * n, L, D): each head n times, its copies side by side."""
    # TODO
    raise NotImplementedError


def attention(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, heads: int, kv_heads: int) -> Tensor:
    """x (B, L, W), wq (heads * D, W), wk and wv (kv_heads * D, W), wo (W, heads * D) -> (B, L, W); causal."""
    # TODO: project, split, repeat, attend, merge, project
    raise NotImplementedError
