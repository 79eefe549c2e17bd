"""Adds up the gradients of the sums and divides them once, before the step; counts while it goes."""


def train(micro_batches, loss_sum, count, optimizer, window):
    losses, total, tokens = [], 0.0, 0
    optimizer.zero_grad()
    for number, batch in enumerate(micro_batches, start=1):
        part = loss_sum(batch)
        part.backward()
        total, tokens = total + float(part.detach()), tokens + count(batch)
        if number % window == 0 or number == len(micro_batches):
            for parameter in optimizer.params:
                if parameter.grad is not None:
                    parameter.grad /= tokens
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total / tokens)
            total, tokens = 0.0, 0
    return losses
