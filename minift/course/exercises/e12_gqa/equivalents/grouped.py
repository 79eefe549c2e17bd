"""Repeats nothing inside attention: the queries get a group dimension, keys and values broadcast over it."""

import torch


def split_heads(x, heads):
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def merge_heads(x):
    return torch.cat(list(x.unbind(1)), dim=-1)


def repeat_kv(x, n):
    b, g, length, d = x.shape
    return x[:, :, None].expand(b, g, n, length, d).reshape(b, g * n, length, d)


def attention(x, wq, wk, wv, wo, heads, kv_heads):
    length = x.shape[1]
    d = wq.shape[0] // heads
    q = torch.einsum("blw,gndw->bgnld", x, wq.view(kv_heads, heads // kv_heads, d, -1))
    k = torch.einsum("blw,gdw->bgld", x, wk.view(kv_heads, d, -1))
    v = torch.einsum("blw,gdw->bgld", x, wv.view(kv_heads, d, -1))
    scores = torch.einsum("bgnld,bgmd->bgnlm", q * d**-0.5, k)
    hidden = torch.arange(length)[None, :] > torch.arange(length)[:, None]
    weights = torch.softmax(scores + torch.zeros(length, length, dtype=x.dtype).masked_fill(hidden, -torch.inf), -1)
    return torch.einsum("bgnlm,bgmd,wgnd->blw", weights, v, wo.view(-1, kv_heads, heads // kv_heads, d))
