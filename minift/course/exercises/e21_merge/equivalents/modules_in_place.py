"""Modules that add into the weight in place and copy the kept one back; the adapter is switched by a flag."""

import torch
import torch.nn.functional as F
from torch import nn

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4_encode(weight):
    codes, scales = [], []
    for block in weight.reshape(-1).split(64):
        scales.append(block.abs().max())
        codes.append((block[:, None] / scales[-1].clamp(min=1e-30) - NF4).abs().argmin(1))
    pairs = torch.cat(codes).view(-1, 2)
    return (pairs[:, 0] * 16 + pairs[:, 1]).byte(), torch.stack(scales)


def nf4_decode(packed, absmax, shape):
    values = torch.stack([NF4[packed.long() // 16], NF4[packed.long() % 16]], -1).flatten()
    return torch.cat([part * scale for part, scale in zip(values.split(64), absmax, strict=True)]).reshape(shape)


class LoRALinear(nn.Module):
    def __init__(self, weight, a, b, alpha):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.first.weight, self.second.weight = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.merged = alpha / len(a), False

    def forward(self, x):
        y = F.linear(x, self.weight)
        return y if self.merged else torch.add(y, self.second(self.first(x)), alpha=self.scale)

    @torch.no_grad()
    def merge(self):
        if self.merged:
            return
        self.copy, self.merged = self.weight.clone(), True
        self.weight.addmm_(self.second.weight, self.first.weight, alpha=self.scale)

    @torch.no_grad()
    def unmerge(self):
        if self.merged:
            self.weight.copy_(self.copy)
            self.merged = False


class LoRALinear4bit(LoRALinear):
    def __init__(self, packed, absmax, shape, a, b, alpha):
        super().__init__(nf4_decode(packed, absmax, shape), a, b, alpha)
        self.packed, self.absmax, self.shape = packed, absmax, shape

    def merge(self):
        if not self.merged:
            self.bytes = self.packed.clone(), self.absmax.clone()
            super().merge()
            packed, absmax = nf4_encode(self.weight.data)
            self.packed.copy_(packed)
            self.absmax.copy_(absmax)
            self.weight.data.copy_(nf4_decode(packed, absmax, self.shape))

    def unmerge(self):
        if self.merged:
            super().unmerge()
            self.packed.copy_(self.bytes[0])
            self.absmax.copy_(self.bytes[1])
