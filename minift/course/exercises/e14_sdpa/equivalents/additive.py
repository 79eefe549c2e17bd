"""Adds a float mask to the scores and repeats keys and values before the call."""

import torch
import torch.nn.functional as F


def bool_mask(queries, keys, padding, causal):
    hidden = None
    if causal:
        hidden = torch.arange(keys)[None, :] > torch.arange(keys - queries, keys)[:, None]
        hidden = hidden[None, None]
    if padding is not None:
        pads = padding.logical_not().view(padding.shape[0], 1, 1, keys).expand(-1, -1, queries, -1)
        hidden = pads if hidden is None else torch.logical_or(pads, hidden)
    return None if hidden is None else hidden.logical_not()


def float_mask(mask, dtype):
    return torch.where(mask, torch.tensor(0, dtype=dtype), torch.tensor(float("-inf"), dtype=dtype))


def attention(q, k, v, padding=None, causal=False):
    n = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(n, dim=1) for x in (k, v))
    if causal and padding is None and q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = bool_mask(q.shape[2], k.shape[2], padding, causal)
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else float_mask(mask, q.dtype))
