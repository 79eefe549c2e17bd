"""e11 Attention with causal and padding masks: README.md says what to write. Check with: minift-course check e11"""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None, causal: bool = False) -> Tensor:
    """q (B, H, Lq, d), k (B, H, Lk, d), v (B, H, Lk, e), padding (B, Lk) bool, True is a token -> (B, H, Lq, e)."""
    # TODO: scores; which key is seen by which query; softmax over the seen ones; the mean of v
    raise NotImplementedError
