"""The mean of each micro-batch times its share of the tokens; the windows come from an iterator."""

from itertools import islice


def train(micro_batches, loss_sum, count, optimizer, window):
    rest = iter(micro_batches)
    losses = []
    while group := list(islice(rest, window)):
        counts = [count(batch) for batch in group]
        for parameter in optimizer.params:
            parameter.grad = None
        parts = []
        for batch, tokens in zip(group, counts, strict=True):
            mean = loss_sum(batch) / max(tokens, 1)
            share = tokens / sum(counts)
            (mean * share).backward()
            parts.append(mean.item() * share)
        optimizer.step()
        losses.append(sum(parts))
    return losses
