"""No helper of torch but log_softmax: gathers by hand, clips by hand, walks with ranges."""

import torch


def scored(model, data, rows):
    labels = data["labels"][rows]
    used = labels != -100
    logp = torch.log_softmax(model(data["tokens"][rows]), -1)
    return -logp[used].gather(1, labels[used].unsqueeze(1)).sum(), int(used.sum())


def evaluate(model, data, micro_batch):
    mode = model.training
    model.train(False)
    top = bottom = 0.0
    with torch.inference_mode():
        for first in range(0, data["tokens"].shape[0], micro_batch):
            loss, count = scored(model, data, slice(first, first + micro_batch))
            top, bottom = top + float(loss), bottom + count
    model.train(mode)
    return top / bottom


def train(
    model, make_optimizer, schedule, data, held_out, *, frozen, epochs, micro_batch, accumulate, max_norm, eval_every,
    generator,
):  # fmt: skip
    params = []
    for name, p in model.named_parameters():
        if any(name.startswith(prefix) for prefix in frozen):
            p.requires_grad = False
        else:
            params.append(p)
    optimizer = make_optimizer(params)
    model.train()
    losses, evals, update = [], [], 0
    for _ in range(epochs):
        order = torch.randperm(data["tokens"].shape[0], generator=generator)
        done = 0
        while done < len(order):
            for p in params:
                p.grad = None
            window = order[done : done + micro_batch * accumulate]
            done += len(window)
            top = bottom = 0.0
            for first in range(0, len(window), micro_batch):
                loss, count = scored(model, data, window[first : first + micro_batch])
                loss.backward()
                top, bottom = top + float(loss.detach()), bottom + count
            for p in params:
                p.grad /= bottom
            norm = sum(float(p.grad.square().sum()) for p in params) ** 0.5
            if norm + 1e-6 > max_norm:
                for p in params:
                    p.grad *= max_norm / (norm + 1e-6)
            optimizer.lr = schedule(update)
            optimizer.step()
            update += 1
            losses.append(top / bottom)
            if not update % eval_every:
                evals.append(evaluate(model, held_out, micro_batch))
    return losses, evals
