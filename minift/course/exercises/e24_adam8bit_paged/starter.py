"""e24 8-bit Adam and paged state: README.md says what to write. Check with: minift-course check e24"""

import torch
from torch import Tensor


def quantize(x: Tensor, table: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Returns (codes uint8 with the shape of x, absmax float32, one for each block of the flat x)."""
    # TODO: absmax of each block, also of a short last one; then the index of the nearest number of the table
    raise NotImplementedError


def dequantize(codes: Tensor, absmax: Tensor, table: Tensor, block: int = 256) -> Tensor:
    """Returns what the codes stand for, float32 with the shape of codes."""
    # TODO
    raise NotImplementedError


class Adam8bit:
    """Adam whose m and v lie in 8 bits between two steps."""

    def __init__(
        self,
        params: list[Tensor],
        signed: Tensor,
        unsigned: Tensor,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        block: int = 256,
        min_8bit_size: int = 4096,
    ) -> None:
        # TODO
        raise NotImplementedError

    def state(self, i: int) -> tuple[Tensor, ...]:
        """What is stored for parameter i: (m codes, m absmax, v codes, v absmax), or (m, v) of a small one."""
        # TODO
        raise NotImplementedError

    def step(self) -> None:
        """Update every parameter in place."""
        # TODO: load, update, change p, store
        raise NotImplementedError


class PagePool:
    """Tensors in a host store, some of them at a time on a device with room for `budget` bytes."""

    def __init__(self, budget: int) -> None:
        # TODO: what lies where, in which order was it acquired, how many users has each page?
        raise NotImplementedError

    def add(self, name: str, page: Tensor) -> None:
        """Keep a copy of a page in the host store."""
        # TODO
        raise NotImplementedError

    def acquire(self, name: str) -> Tensor:
        """The page on the device, brought there if need be, pinned until it is released."""
        # TODO
        raise NotImplementedError

    def release(self, name: str) -> None:
        """Undo one acquire."""
        # TODO
        raise NotImplementedError

    def resident(self) -> list[str]:
        """The pages on the device, last acquired last."""
        # TODO
        raise NotImplementedError

    def used(self) -> int:
        """Bytes of the pages on the device."""
        # TODO
        raise NotImplementedError
