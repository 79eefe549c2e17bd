"""e21 Merge and unmerge: README.md says what to write. Check with: minift-course check e21"""

import torch
import torch.nn.functional as F
from torch import Tensor

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
BLOCK = 64


def nf4_encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Given: weight with an even number of elements -> packed uint8 (n / 2,), absmax (blocks,)."""
    n = weight.numel()
    blocks = F.pad(weight.flatten(), (0, -n % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    unit = blocks / absmax.masked_fill(absmax == 0, 1.0).unsqueeze(1)
    code = torch.bucketize(unit, (NF4[:-1] + NF4[1:]) / 2).flatten()[:n].to(torch.uint8)
    return code[0::2] << 4 | code[1::2], absmax


def nf4_decode(packed: Tensor, absmax: Tensor, shape: tuple[int, int]) -> Tensor:
    """Given: the weight that packed and absmax stand for, float32."""
    code = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    return (NF4[code] * absmax.repeat_interleave(BLOCK)[: len(code)]).view(shape)


class LoRALinear:
    """A float32 weight with an adapter that can be merged into it."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
        # TODO: what has to be remembered to know whether the layer is merged, and to get back?
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out), with the adapter, merged or not."""
        # TODO
        raise NotImplementedError

    def merge(self) -> None:
        """Add the adapter into self.weight; on a merged layer do nothing."""
        # TODO
        raise NotImplementedError

    def unmerge(self) -> None:
        """Bring back the weight as it was, bit for bit; on a layer that is not merged do nothing."""
        # TODO
        raise NotImplementedError


class LoRALinear4bit:
    """The same for a weight in NF4, held as self.packed and self.absmax."""

    def __init__(
        self, packed: Tensor, absmax: Tensor, shape: tuple[int, int], a: Tensor, b: Tensor, alpha: float
    ) -> None:
        # TODO
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out), with the adapter, merged or not."""
        # TODO
        raise NotImplementedError

    def merge(self) -> None:
        """Make self.packed and self.absmax those of the weight with the adapter; on a merged layer do nothing."""
        # TODO
        raise NotImplementedError

    def unmerge(self) -> None:
        """Bring back self.packed and self.absmax as they were; on a layer that is not merged do nothing."""
        # TODO
        raise NotImplementedError
