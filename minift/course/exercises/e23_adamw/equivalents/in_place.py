"""State in a dictionary by parameter, in-place operations, the corrections folded into the step size."""

import math

import torch


class AdamW:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.lr, self.betas, self.eps, self.decay = params, lr, betas, eps, weight_decay
        self.state = {}

    def step(self):
        b1, b2 = self.betas
        for p in self.params:
            if p.grad is None:
                continue
            state = self.state.setdefault(p, {"t": 0, "m": torch.zeros_like(p.data), "v": torch.zeros_like(p.data)})
            state["t"] += 1
            state["m"].lerp_(p.grad, 1 - b1)
            state["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            root = state["v"].sqrt().div_(math.sqrt(1 - b2 ** state["t"])).add_(self.eps)
            p.data.mul_(1 - self.lr * self.decay)
            p.data.addcdiv_(state["m"], root, value=-self.lr / (1 - b1 ** state["t"]))
