"""A loop over the blocks with searchsorted, the step in float64, one list of names for the order in the pool."""

import torch


def quantize(x, table, block=256):
    codes, scales = [], []
    middle = table[:-1] + table.diff() / 2
    for part in x.reshape(-1).split(block):
        top = part.abs().amax()
        scales.append(top)
        codes.append(torch.searchsorted(middle, part / top if top > 0 else part))
    return torch.cat(codes).view(x.shape).to(torch.uint8), torch.stack(scales)


def dequantize(codes, absmax, table, block=256):
    flat = table.take(codes.reshape(-1).long())
    parts = [part * scale for part, scale in zip(flat.split(block), absmax, strict=True)]
    return torch.cat(parts).view(codes.shape)


class Adam8bit:
    def __init__(self, params, signed, unsigned, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, block=256, min_8bit_size=4096):
        self.params, self.signed, self.unsigned, self.block = params, signed, unsigned, block
        self.lr, self.b1, self.b2, self.eps, self.least = lr, *betas, eps, min_8bit_size
        self.steps = 0
        self.kept = [self.pack(torch.zeros(p.shape), torch.zeros(p.shape)) for p in params]

    def pack(self, m, v):
        if m.numel() >= self.least:
            return quantize(m, self.signed, self.block) + quantize(v, self.unsigned, self.block)
        return m, v

    def state(self, i):
        return self.kept[i]

    def step(self):
        self.steps += 1
        with torch.no_grad():
            for i, p in enumerate(self.params):
                kept, g = self.kept[i], p.grad.double()
                if p.numel() >= self.least:
                    m = dequantize(kept[0], kept[1], self.signed, self.block)
                    v = dequantize(kept[2], kept[3], self.unsigned, self.block)
                else:
                    m, v = kept
                m = m.double() * self.b1 + g * (1 - self.b1)
                v = v.double() * self.b2 + g**2 * (1 - self.b2)
                top = m / (1 - self.b1**self.steps)
                p.copy_(p - self.lr * top / ((v / (1 - self.b2**self.steps)) ** 0.5 + self.eps))
                self.kept[i] = self.pack(m.float(), v.float())


class PagePool:
    def __init__(self, budget):
        self.budget, self.store, self.there, self.order, self.users = budget, {}, {}, [], []

    def add(self, name, page):
        self.store[name] = torch.empty_like(page).copy_(page)

    def acquire(self, name):
        if name not in self.there:
            free = [other for other in self.order if other not in self.users]
            while self.used() + self.store[name].nbytes > self.budget:
                if not free:
                    raise RuntimeError("no room")
                gone = free.pop(0)
                self.order.remove(gone)
                self.store[gone] = self.there.pop(gone).clone()
            self.there[name] = self.store[name].detach().clone()
        else:
            self.order.remove(name)
        self.order.append(name)
        self.users.append(name)
        return self.there[name]

    def release(self, name):
        self.users.remove(name)

    def resident(self):
        return self.order

    def used(self):
        return sum(self.there[name].nbytes for name in self.order)
