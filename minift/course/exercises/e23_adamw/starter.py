"""e23 AdamW: README.md says what to write. Check with: minift-course check e23"""

import torch
from torch import Tensor


class AdamW:
    """Adam with decoupled weight decay."""

    def __init__(
        self,
        params: list[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        # TODO: what has to be remembered between steps, and for whom?
        raise NotImplementedError

    def step(self) -> None:
        """Update every parameter that has a gradient, in place."""
        # TODO
        raise NotImplementedError
