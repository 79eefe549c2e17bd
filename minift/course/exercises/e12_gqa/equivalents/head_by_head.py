"""One head after another with plain slices; the output projection is a sum over heads."""

import torch


def split_heads(x, heads):
    b, length, width = x.shape
    return x.reshape(b, length, heads, width // heads).permute(0, 2, 1, 3).contiguous()


def merge_heads(x):
    b, heads, length, d = x.shape
    return x.permute(0, 2, 1, 3).reshape(b, length, heads * d)


def repeat_kv(x, n):
    return x[:, torch.arange(x.shape[1] * n) // n]


def attention(x, wq, wk, wv, wo, heads, kv_heads):
    d = wq.shape[0] // heads
    out = torch.zeros_like(x)
    for h in range(heads):
        mine, shared = slice(h * d, h * d + d), slice(h * kv_heads // heads * d, (h * kv_heads // heads + 1) * d)
        q, k, v = x @ wq[mine].T, x @ wk[shared].T, x @ wv[shared].T
        scores = torch.bmm(q, k.transpose(1, 2)) / d**0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp().tril()
        out = out + (weights / weights.sum(-1, keepdim=True)) @ v @ wo[:, mine].T
    return out
