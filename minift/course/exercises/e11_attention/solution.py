"""e11 Attention: scores, one bool tensor for who sees whom, softmax, a weighted mean."""

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None, causal: bool = False) -> Tensor:
    """q (B, H, Lq, d), k (B, H, Lk, d), v (B, H, Lk, e), padding (B, Lk) bool, True is a token -> (B, H, Lq, e)."""
    queries, keys = q.shape[2], k.shape[2]
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen = seen.tril(keys - queries)
    if padding is not None:
        seen = seen & padding[:, None, None, :]
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
    # A row of -inf only has no softmax: 0 / 0. It saw nothing and adds nothing.
    weights = weights.masked_fill(~seen, 0.0)
    return weights @ v
