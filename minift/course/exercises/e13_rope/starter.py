"""e13 Rotary position embedding: README.md says what to write. Check with: minift-course check e13"""

import torch
from torch import Tensor


def tables(position_ids: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """position_ids (B, L) -> cos and sin (B, L, width), float32, with the angles of the width / 2 pairs twice."""
    # TODO
    raise NotImplementedError


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, L, width), cos and sin (B, L, width) -> x with number i and number i + width / 2 turned as a pair."""
    # TODO
    raise NotImplementedError


def attention(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, theta: float) -> Tensor:
    """q, k, v (B, H, L, width), position_ids (B, L) -> (B, H, L, width); no mask."""
    # TODO
    raise NotImplementedError
