"""Stacks the queries that share a head, so that no head is repeated; cuts the mask out of a square."""

import torch
from torch.nn.functional import scaled_dot_product_attention


def bool_mask(queries, keys, padding, causal):
    if not causal and padding is None:
        return None
    size = max(queries, keys)
    rows = torch.ones(size, size).tril().bool() if causal else torch.ones(size, size).bool()
    seen = rows[size - queries :, size - keys :]
    if padding is None:
        return seen.reshape(1, 1, queries, keys)
    return torch.stack([torch.stack([row & tokens for row in seen]) for tokens in padding]).unsqueeze(1)


def float_mask(mask, dtype):
    return mask.to(dtype).log()


def attention(q, k, v, padding=None, causal=False):
    b, heads, queries, d = q.shape
    groups, keys = k.shape[1], k.shape[2]
    if causal and padding is None and queries == keys:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mask = bool_mask(queries, keys, padding, causal)
    if mask is not None:
        mask = mask.repeat(1, 1, heads // groups, 1)
    out = scaled_dot_product_attention(q.reshape(b, groups, -1, d), k, v, attn_mask=mask)
    return out.reshape(b, heads, queries, v.shape[-1])
