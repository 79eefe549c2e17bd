"""e26: the model, the optimizer and the schedule that a training loop is given, and what can be seen from outside."""

import torch
from torch import nn


class FixedDropout(nn.Module):
    """Dropout with always the same mask, so that no random number decides what comes out."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask.clone()

    def forward(self, x):
        return x * self.mask if self.training else x


class SmallModel(nn.Module):
    """Predicts a token from the one before: tokens (rows, length) -> logits (rows, length, vocabulary)."""

    def __init__(self, weights, mask):
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Embedding(*weight.shape) if name == "embed" else nn.Linear(*weight.shape[::-1], bias=False)
            layer.weight = nn.Parameter(weight.clone())
            setattr(self, name, layer)
        self.dropout = FixedDropout(mask)
        self.most_rows = 0

    def forward(self, tokens):
        self.most_rows = max(self.most_rows, len(tokens))
        x = self.mix(self.embed(tokens))
        return self.head(self.down(self.dropout(torch.tanh(self.up(x)))))


class GivenAdamW:
    """AdamW as in e23; writes down which rate each step had."""

    def __init__(self, params, weight_decay):
        self.params, self.decay, self.lr, self.rates = list(params), weight_decay, 0.0, []
        self.m, self.v = [torch.zeros_like(p) for p in self.params], [torch.zeros_like(p) for p in self.params]

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self):
        self.rates.append(float(self.lr))
        t = len(self.rates)
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            if p.grad is None:
                continue
            p.mul_(1 - self.lr * self.decay)
            m.lerp_(p.grad, 0.1)
            v.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
            p.addcdiv_(m, (v / (1 - 0.99**t)).sqrt_().add_(1e-4), value=-self.lr / (1 - 0.9**t))


def run(student, weights, mask, data, held_out, rates, weight_decay, options, generator):
    """Returned and left behind by a run. rates[step] is the schedule; the model comes in eval mode with gradients."""
    model, made = SmallModel(weights, mask).eval(), []
    kept = {name for name in weights if name.startswith(options["frozen"])}
    for name, parameter in model.named_parameters():
        if name.split(".")[0] not in kept:
            parameter.grad = torch.ones_like(parameter)

    def make_optimizer(params):
        made.append(GivenAdamW(params, weight_decay))
        return made[-1]

    def schedule(step):
        return rates[min(step, len(rates) - 1)]

    losses, evaluations = student.train(model, make_optimizer, schedule, data, held_out, **options, generator=generator)
    return {
        "losses": list(losses),
        "evaluations": list(evaluations),
        "rates": made[-1].rates,
        "most rows at once": model.most_rows,
        "numbers in the optimizer": sum(p.numel() for p in made[-1].params),
        "frozen ones changed": [n for n in sorted(kept) if not torch.equal(getattr(model, n).weight, weights[n])],
        "frozen ones with a gradient": [n for n in sorted(kept) if getattr(model, n).weight.grad is not None],
    }


def evaluation(student, weights, mask, data, micro_batch, training):
    """The loss, the mode afterwards, whether gradients were made, the most rows at once."""
    model = SmallModel(weights, mask).train(training)
    loss = student.evaluate(model, data, micro_batch)
    return loss, model.training, any(p.grad is not None for p in model.parameters()), model.most_rows
