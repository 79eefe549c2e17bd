"""e22: a block with tanh, dropout and a residual, that counts its runs and whose activations can be watched."""

import gc
import weakref

import numpy as np
import torch
from torch import nn

alive = []  # weak references to the memory of every activation


class Tanh(torch.autograd.Function):
    """Its output lies in memory of numpy, which can be asked whether anything still holds it."""

    @staticmethod
    def forward(ctx, x):
        memory = np.tanh(x.detach().numpy())
        alive.append(weakref.ref(memory))
        out = torch.from_numpy(memory)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, d_out):
        (out,) = ctx.saved_tensors
        return d_out * (1 - out * out)


class Block(nn.Module):
    def __init__(self, w1, w2, frozen, drop):
        super().__init__()
        self.w1 = nn.Parameter(w1.clone(), requires_grad="w1" not in frozen)
        self.w2 = nn.Parameter(w2.clone(), requires_grad="w2" not in frozen)
        self.drop, self.runs = drop, 0

    def forward(self, x, gate, factor):
        self.runs += 1
        h = Tanh.apply(x @ self.w1.T)
        if self.drop:
            h = h * (torch.rand(h.shape, dtype=h.dtype) >= self.drop) / (1 - self.drop)
        h = h @ self.w2.T * factor
        return x + (h if gate is None else h * gate)


def prepared(x, gate, weights, frozen, drop, seed):
    torch.manual_seed(seed)
    alive.clear()
    x = x.clone().requires_grad_("x" not in frozen)
    gate = None if gate is None else gate.clone().requires_grad_("gate" not in frozen)
    return x, gate, [Block(w1, w2, frozen, drop) for w1, w2 in weights]


def held():
    """How many activations are in memory."""
    if any(reference() is not None for reference in alive):
        gc.collect()  # those that only wait for the garbage collector do not count
    return sum(reference() is not None for reference in alive)


def gradients(student, x, gate, factor, weights, dy, frozen=(), drop=0.0, seed=0):
    """The answer, all gradients, and the random numbers that come after backward."""
    x, gate, blocks = prepared(x, gate, weights, frozen, drop, seed)
    y = x
    for block in blocks:
        y = student.checkpoint(block, y, gate, factor)
    (y * dy).sum().backward()
    of_weights = [[block.w1.grad, block.w2.grad] for block in blocks]
    return y, x.grad, None if gate is None else gate.grad, of_weights, torch.rand(3)


def runs_and_memory(student, x, gate, factor, weights, dy):
    """Runs of each block after forward, activations alive then, runs after backward."""
    x, gate, blocks = prepared(x, gate, weights, (), 0.0, 0)
    y = x
    for block in blocks:
        y = student.checkpoint(block, y, gate, factor)
    forward, kept = [block.runs for block in blocks], held()
    (y * dy).sum().backward()
    return forward, kept, [block.runs for block in blocks]


def forward_only(student, x, gate, factor, weights, frozen=(), recording=True):
    """The answer without a backward pass, and whether it needs gradients."""
    x, gate, (block,) = prepared(x, gate, weights, frozen, 0.0, 0)
    with torch.set_grad_enabled(recording):
        y = student.checkpoint(block, x, gate, factor)
    return y, y.requires_grad
