"""Pads to whole blocks and looks at all distances at once; state in dictionaries; a pool that keeps a clock."""

import torch


def quantize(x, table, block=256):
    count = x.numel()
    rows = torch.nn.functional.pad(x.reshape(-1), (0, -count % block)).reshape(-1, block)
    absmax = torch.maximum(rows.amax(1), -rows.amin(1))
    inverse = torch.where(absmax > 0, 1 / absmax, torch.zeros_like(absmax))
    distance = (rows * inverse[:, None]).double().unsqueeze(-1) - table.double()
    return distance.abs().argmin(-1).reshape(-1)[:count].reshape(x.shape).byte(), absmax


def dequantize(codes, absmax, table, block=256):
    which = torch.arange(codes.numel()) // block
    return (absmax[which] * torch.index_select(table, 0, codes.reshape(-1).int())).reshape(codes.shape)


class Adam8bit:
    def __init__(self, params, signed, unsigned, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, block=256, min_8bit_size=4096):
        self.params, self.tables, self.block = params, (signed, unsigned), block
        self.lr, self.betas, self.eps, self.t = lr, betas, eps, 0
        self.small = [p.numel() < min_8bit_size for p in params]
        self.moments = [{} for _ in params]
        for i, p in enumerate(params):
            for kind in (0, 1):
                self.put(i, kind, p.data * 0)

    def put(self, i, kind, value):
        self.moments[i][kind] = (value,) if self.small[i] else quantize(value, self.tables[kind], self.block)

    def get(self, i, kind):
        kept = self.moments[i][kind]
        return kept[0] if self.small[i] else dequantize(*kept, self.tables[kind], self.block)

    def state(self, i):
        return self.moments[i][0] + self.moments[i][1]

    def step(self):
        self.t += 1
        for i, p in enumerate(self.params):
            seen = (p.grad, p.grad.square())
            m, v = (self.get(i, kind).lerp(seen[kind], 1 - self.betas[kind]) for kind in (0, 1))
            root = (v / (1 - self.betas[1] ** self.t)).sqrt() + self.eps
            p.data.addcdiv_(m, root, value=-self.lr / (1 - self.betas[0] ** self.t))
            self.put(i, 0, m)
            self.put(i, 1, v)


class PagePool:
    def __init__(self, budget):
        self.room, self.clock, self.rows = budget, 0, {}

    def add(self, name, page):
        self.rows[name] = {"host": page.detach().clone(), "device": None, "time": 0, "users": 0}

    def size(self, row):
        return row["host"].numel() * row["host"].element_size()

    def acquire(self, name):
        row = self.rows[name]
        if row["device"] is None:
            while self.size(row) > self.room:
                idle = [r for r in self.rows.values() if r["device"] is not None and not r["users"]]
                if not idle:
                    raise RuntimeError("the device is full of pages in use")
                oldest = min(idle, key=lambda r: r["time"])
                oldest["host"], oldest["device"] = oldest["device"], None
                self.room += self.size(oldest)
            row["device"] = row["host"].clone()
            self.room -= self.size(row)
        self.clock += 1
        row["time"] = self.clock
        row["users"] += 1
        return row["device"]

    def release(self, name):
        self.rows[name]["users"] -= 1

    def resident(self):
        there = [name for name, row in self.rows.items() if row["device"] is not None]
        return sorted(there, key=lambda name: self.rows[name]["time"])

    def used(self):
        return sum(self.size(row) for row in self.rows.values() if row["device"] is not None)
