"""e24 8-bit Adam and paged state: compute in float32, store in 8 bits; a page is written back before it goes."""

import torch
from torch import Tensor


def quantize(x: Tensor, table: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Returns (codes uint8 with the shape of x, absmax float32, one for each block of the flat x)."""
    flat = x.flatten()
    absmax = torch.stack([part.abs().max() for part in flat.split(block)])
    divisor = absmax.masked_fill(absmax == 0, 1).repeat_interleave(block)[: flat.numel()]
    midpoints = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(flat / divisor, midpoints)
    return codes.to(torch.uint8).view(x.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, table: Tensor, block: int = 256) -> Tensor:
    """Returns what the codes stand for, float32 with the shape of codes."""
    scale = absmax.repeat_interleave(block)[: codes.numel()].view(codes.shape)
    return table[codes.long()] * scale


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
        self.params, self.signed, self.unsigned = list(params), signed, unsigned
        self.lr, self.betas, self.eps = lr, betas, eps
        self.block, self.min_8bit_size = block, min_8bit_size
        self.t = 0
        self.stored = [self._store(torch.zeros_like(p.detach()), torch.zeros_like(p.detach())) for p in self.params]

    def state(self, i: int) -> tuple[Tensor, ...]:
        """What is stored for parameter i: (m codes, m absmax, v codes, v absmax), or (m, v) of a small one."""
        return self.stored[i]

    def _store(self, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if m.numel() < self.min_8bit_size:
            return m, v
        return *quantize(m, self.signed, self.block), *quantize(v, self.unsigned, self.block)

    def _load(self, stored: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(stored) == 2:
            return stored
        m_codes, m_absmax, v_codes, v_absmax = stored
        m = dequantize(m_codes, m_absmax, self.signed, self.block)
        return m, dequantize(v_codes, v_absmax, self.unsigned, self.block)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter in place."""
        b1, b2 = self.betas
        self.t += 1
        for i, p in enumerate(self.params):
            m, v = self._load(self.stored[i])
            m = b1 * m + (1 - b1) * p.grad
            v = b2 * v + (1 - b2) * p.grad * p.grad
            m_hat, v_hat = m / (1 - b1**self.t), v / (1 - b2**self.t)
            p.sub_(self.lr * m_hat / (v_hat.sqrt() + self.eps))
            self.stored[i] = self._store(m, v)


class PagePool:
    """Tensors in a host store, some of them at a time on a device with room for `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.host: dict[str, Tensor] = {}
        self.device: dict[str, Tensor] = {}  # last acquired last
        self.pins: dict[str, int] = {}

    def add(self, name: str, page: Tensor) -> None:
        """Keep a copy of a page in the host store."""
        self.host[name] = page.clone()
        self.pins[name] = 0

    def acquire(self, name: str) -> Tensor:
        """The page on the device, brought there if need be, pinned until it is released."""
        if name in self.device:
            page = self.device.pop(name)
        else:
            self._make_room(self.host[name].nbytes)
            page = self.host[name].clone()
        self.device[name] = page
        self.pins[name] += 1
        return page

    def _make_room(self, needed: int) -> None:
        while self.used() + needed > self.budget:
            victim = next((name for name in self.device if self.pins[name] == 0), None)
            if victim is None:
                raise RuntimeError(f"no room for {needed} bytes: everything on the device is in use")
            self.host[victim].copy_(self.device.pop(victim))

    def release(self, name: str) -> None:
        """Undo one acquire."""
        self.pins[name] -= 1

    def resident(self) -> list[str]:
        """The pages on the device, last acquired last."""
        return list(self.device)

    def used(self) -> int:
        """Bytes of the pages on the device."""
        return sum(page.nbytes for page in self.device.values())
