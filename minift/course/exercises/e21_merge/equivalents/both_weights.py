"""Makes both weights at the start and only points to one of them; sums in float64; one class does it for both kinds."""

import torch

LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=torch.float64)  # fmt: skip


def scale_of_each(absmax, n):
    return absmax.double()[torch.arange(n) // 64]


def nf4_encode(weight):
    flat = weight.flatten()
    absmax = torch.stack([part.abs().amax() for part in flat.split(64)])
    unit = flat.double() / scale_of_each(absmax, len(flat))
    code = (unit[:, None] > (LEVELS[1:] + LEVELS[:-1]) / 2).sum(1).to(torch.uint8)
    return code[::2] * 16 + code[1::2], absmax


def nf4_decode(packed, absmax, shape):
    code = torch.zeros(2 * len(packed), dtype=torch.long)
    code[::2], code[1::2] = packed.long() >> 4, packed.long() & 15
    return (LEVELS[code] * scale_of_each(absmax, len(code))).float().reshape(shape)


class LoRALinear:
    def __init__(self, weight, a, b, alpha):
        self.rank = a.shape[0]
        self.choose(False, self.prepare(weight, a, b, alpha))

    def prepare(self, weight, a, b, alpha):
        merged = (weight.double() + torch.einsum("or,ri->oi", b.double(), a.double()) * alpha / self.rank).float()
        self.used = {False: merged, True: merged}
        return {False: (weight,), True: (merged,)}

    def choose(self, merged, held=None):
        self.held = held or self.held
        self.merged = merged
        self.show(*self.held[merged])

    def show(self, weight):
        self.weight = weight

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.used[self.merged])

    def merge(self):
        self.choose(True)

    def unmerge(self):
        self.choose(False)


class LoRALinear4bit(LoRALinear):
    def __init__(self, packed, absmax, shape, a, b, alpha):
        self.bytes, self.shape = (packed, absmax), shape
        super().__init__(nf4_decode(packed, absmax, shape), a, b, alpha)

    def prepare(self, weight, a, b, alpha):
        exact = super().prepare(weight, a, b, alpha)[True][0]
        encoded = nf4_encode(exact)
        self.used[True] = nf4_decode(*encoded, self.shape)
        return {False: self.bytes, True: encoded}

    def show(self, packed, absmax):
        self.packed, self.absmax = packed, absmax
