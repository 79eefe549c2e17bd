"""e19: a model of two matrices, plain gradient descent, and a node in the graph that counts how many are alive."""

import torch
import torch.nn.functional as F


class Counted(torch.autograd.Function):
    """Hands its input on; alive from its forward to its backward."""

    @staticmethod
    def forward(ctx, x, tally):
        ctx.tally = tally
        tally["alive"] += 1
        tally["most"] = max(tally["most"], tally["alive"])
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.tally["alive"] -= 1
        return grad, None


class Descent:
    """p -= lr * grad, and remembers the parameters after every step."""

    def __init__(self, params, lr):
        self.params, self.lr, self.seen = params, lr, []

    def zero_grad(self, set_to_none=True):
        for parameter in self.params:
            parameter.grad = None

    def step(self):
        with torch.no_grad():
            for parameter in self.params:
                if parameter.grad is not None:
                    parameter -= self.lr * parameter.grad
        self.seen.append([parameter.detach().clone() for parameter in self.params])


def _run(student, start, micro_batches, window, lr, left_over):
    table, weight = (torch.nn.Parameter(value.clone()) for value in start)
    if left_over is not None:
        table.grad, weight.grad = (value.clone() for value in left_over)
    optimizer, tally = Descent([table, weight], lr), {"alive": 0, "most": 0}

    def loss_sum(batch):
        ids, labels = batch
        logits = table[ids[:, :-1]] @ weight.T
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)
        return Counted.apply(loss, tally)

    def count(batch):
        return int((batch[1][:, 1:] != -100).sum())

    losses = student.train(micro_batches, loss_sum, count, optimizer, window)
    return losses, optimizer.seen, tally["most"]


def weights_after(student, **given):
    """Table and weight after every update."""
    return _run(student, **given)[1]


def losses_reported(student, **given):
    """What train returns."""
    return _run(student, **given)[0]


def graphs_at_a_time(student, **given):
    """The most forward passes that waited for their backward at one time."""
    return _run(student, **given)[2]
