"""Goes through the keys one at a time with a running maximum, sum and mean, as FlashAttention does; makes no mask."""

import torch


def attention(q, k, v, padding=None, causal=False):
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    biggest = torch.full((batch, heads, queries), torch.finfo(q.dtype).min, dtype=q.dtype)
    total = torch.zeros_like(biggest)
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=q.dtype)
    position = torch.arange(queries) + keys - queries
    for j in range(keys):
        looks = torch.ones(batch, 1, queries, dtype=torch.bool)
        if causal:
            looks = looks & (position >= j)
        if padding is not None:
            looks = looks & padding[:, j, None, None]
        score = (q * k[:, :, j, None]).sum(-1) * width**-0.5
        risen = torch.where(looks, torch.maximum(biggest, score), biggest)
        shrink = (biggest - risen).exp()
        weight = torch.where(looks, (score - risen).exp(), 0.0)
        total = total * shrink + weight
        out = out * shrink[..., None] + weight[..., None] * v[:, :, j, None]
        biggest = risen
    return torch.where(total[..., None] > 0, out / total[..., None], 0.0)
