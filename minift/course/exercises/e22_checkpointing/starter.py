"""e22 Gradient checkpointing: README.md says what to write. Check with: minift-course check e22"""

from typing import Any

import torch
from torch import Tensor, nn


def checkpoint(block: nn.Module, *args: Any) -> Tensor:
    """block(*args), without keeping what is computed inside; backward runs the block a second time."""
    # TODO: a torch.autograd.Function (write the class above) that runs the block in forward and again in backward
    raise NotImplementedError
