"""A pair is a complex number and turning it is one complex product."""

import torch


def tables(position_ids, width, theta):
    steps = torch.arange(width // 2, dtype=torch.float64) * 2 / width
    angles = torch.outer(position_ids.flatten().double(), torch.tensor(theta, dtype=torch.float64) ** -steps)
    turns = torch.polar(torch.ones_like(angles), angles).view(*position_ids.shape, -1)
    return turns.real.repeat(1, 1, 2).float(), turns.imag.repeat(1, 1, 2).float()


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].float(), x[..., half:].float())
    turned = pairs * torch.complex(cos[:, None, :, :half], sin[:, None, :, :half])
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def attention(q, k, v, position_ids, theta):
    cos, sin = tables(position_ids, q.shape[-1], theta)
    return torch.softmax(rotate(q, cos, sin) @ rotate(k, cos, sin).mT * q.shape[-1] ** -0.5, -1) @ v
