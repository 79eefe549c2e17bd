"""One expression for the whole update, decay included, from a copy of the old weight; the state lies in lists."""

import torch


class AdamW:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.rows = [[p, 0, 0.0, 0.0] for p in params]
        self.lr, self.eps, self.decay = lr, eps, weight_decay
        self.b1, self.b2 = betas

    def step(self):
        with torch.no_grad():
            for row in filter(lambda row: row[0].grad is not None, self.rows):
                p, t, m, v = row
                t, before = t + 1, p.clone()
                m = m * self.b1 + p.grad - p.grad * self.b1
                v = v * self.b2 + p.grad.square() * (1 - self.b2)
                move = (m / (1 - self.b1**t)) / (torch.sqrt(v / (1 - self.b2**t)) + self.eps)
                p.copy_(before - self.lr * (self.decay * before + move))
                row[1:] = t, m, v
