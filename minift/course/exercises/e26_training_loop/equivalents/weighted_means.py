"""One generator of windows for the whole run; autograd.grad of each micro-batch, added up in lists; means weighted."""

import torch
import torch.nn.functional as F


def loss_of(model, tokens, labels, reduction="mean"):
    return F.nll_loss(model(tokens).log_softmax(-1).transpose(1, 2), labels, ignore_index=-100, reduction=reduction)


def evaluate(model, data, micro_batch):
    training = model.training
    model.eval()
    with torch.no_grad():
        parts = zip(data["tokens"].split(micro_batch), data["labels"].split(micro_batch), strict=True)
        found = [(loss_of(model, tokens, labels), (labels >= 0).sum()) for tokens, labels in parts]
    if training:
        model.train()
    return (sum(loss * count for loss, count in found) / sum(count for _, count in found)).item()


def windows(rows, size, epochs, generator):
    for _ in range(epochs):
        yield from torch.randperm(rows, generator=generator).split(size)


def train(
    model, make_optimizer, schedule, data, held_out, *, frozen, epochs, micro_batch, accumulate, max_norm, eval_every,
    generator,
):  # fmt: skip
    for prefix in frozen:
        for name, p in model.named_parameters():
            if name.startswith(prefix):
                p.requires_grad_(False)
    live = list(filter(lambda p: p.requires_grad, model.parameters()))
    optimizer, losses, evals = make_optimizer(live), [], []
    size = micro_batch * accumulate
    for step, rows in enumerate(windows(len(data["labels"]), size, epochs, generator)):
        grads, loss, model = [torch.zeros_like(p) for p in live], 0.0, model.train()
        for part in rows.split(micro_batch):
            weight = (data["labels"][part] >= 0).sum() / (data["labels"][rows] >= 0).sum().double()
            mean = loss_of(model, data["tokens"][part], data["labels"][part]) * weight
            grads = [g + new for g, new in zip(grads, torch.autograd.grad(mean, live), strict=True)]
            loss += mean.detach()
        norm = torch.stack([g.norm() for g in grads]).norm()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for p, g in zip(live, grads, strict=True):
            p.grad = g * factor
        optimizer.lr = schedule(step)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % eval_every == 0:
            evals.append(evaluate(model, held_out, micro_batch))
    return losses, evals
