"""e13 RoPE: queries and keys are turned by an angle that grows with the position, so that scores see distances."""

import math

import torch
from torch import Tensor


def tables(position_ids: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """position_ids (B, L) -> cos and sin (B, L, width), float32, with the angles of the width / 2 pairs twice."""
    frequencies = theta ** (-torch.arange(0, width, 2) / width)
    angles = position_ids.unsqueeze(2).float() * frequencies
    both = torch.cat((angles, angles), dim=2)
    return both.cos(), both.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, L, width), cos and sin (B, L, width) -> x with number i and number i + width / 2 turned as a pair."""
    first, second = x.chunk(2, dim=3)
    partner = torch.cat((-second, first), dim=3)
    # One table for all heads; float32 tables make the sum float32, whatever x is.
    turned = x * cos.unsqueeze(1) + partner * sin.unsqueeze(1)
    return turned.to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, theta: float) -> Tensor:
    """q, k, v (B, H, L, width), position_ids (B, L) -> (B, H, L, width); no mask."""
    cos, sin = tables(position_ids, q.shape[3], theta)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    weights = (q @ k.mT / math.sqrt(q.shape[3])).softmax(dim=3)
    return weights @ v
