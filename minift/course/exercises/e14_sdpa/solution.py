"""e14 The arguments of scaled_dot_product_attention: is_causal where it says it all, else a mask, never both."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def bool_mask(queries: int, keys: int, padding: Tensor | None, causal: bool) -> Tensor | None:
    """Who sees whom: (B or 1, 1, queries, keys), True is seen; None if nothing is hidden by either."""
    if padding is None and not causal:
        return None
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if causal:
        mask = mask.tril(keys - queries)
    if padding is not None:
        mask = mask & padding[:, None, None, :]
    return mask


def float_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The same mask as numbers that are added to scores."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None, causal: bool = False) -> Tensor:
    """q (B, H, Lq, d), k (B, G, Lk, d), v (B, G, Lk, e), padding (B, Lk) -> (B, H, Lq, e)."""
    queries, keys = q.shape[2], k.shape[2]
    plain = causal and padding is None and queries == keys
    mask = None if plain else bool_mask(queries, keys, padding, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, enable_gqa=True)
