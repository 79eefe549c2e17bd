"""Picks the visible keys of every query and never makes a mask."""

import torch


def attention(q, k, v, padding=None, causal=False):
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    ahead = k.shape[2] - q.shape[2]
    for b in range(q.shape[0]):
        tokens = range(k.shape[2]) if padding is None else padding[b].nonzero().flatten().tolist()
        for i in range(q.shape[2]):
            keys = [j for j in tokens if not causal or j <= i + ahead]
            if keys:
                scores = (k[b][:, keys] @ q[b, :, i, :, None]).squeeze(-1) / q.shape[-1] ** 0.5
                out[b, :, i] = (scores.softmax(-1).unsqueeze(-1) * v[b][:, keys]).sum(1)
    return out
