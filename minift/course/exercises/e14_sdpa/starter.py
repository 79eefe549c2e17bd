"""e14 Masks for scaled_dot_product_attention: README.md says what to write. Check with: minift-course check e14"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bool_mask(queries: int, keys: int, padding: Tensor | None, causal: bool) -> Tensor | None:
    """Who sees whom: (B or 1, 1, queries, keys), True is seen; None if nothing is hidden by either."""
    # TODO
    raise NotImplementedError


def float_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The same mask as numbers that are added to scores."""
    # TODO
    raise NotImplementedError


def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None, causal: bool = False) -> Tensor:
    """q (B, H, Lq, d), k (B, G, Lk, d), v (B, G, Lk, e), padding (B, Lk) -> (B, H, Lq, e)."""
    # TODO: one call of F.scaled_dot_product_attention with the right arguments
    raise NotImplementedError
