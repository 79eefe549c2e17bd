"""e19: the oracle computes every window as one large batch, in float64, with autograd on F.cross_entropy's mean."""

import math

import torch
import torch.nn.functional as F

from minift.course.spec import Case, check

WORDS, WIDTH, LR = 7, 4, 0.5
# Gradients and losses are sums of at most 30 tokens times WORDS numbers of size 1, over 4 updates: 64 roundings each.
TOLERANCE = 64 * torch.finfo(torch.float64).eps * math.sqrt(30 * WORDS) * 4


def micro_batch(draw, rows, length, counted):
    """Ids and labels, `counted` of which are predicted by somebody; the first of a row is not, whatever it is."""
    ids = torch.randint(WORDS, (rows, length), generator=draw)
    labels = ids.clone()
    ignored = torch.randperm(rows * (length - 1), generator=draw)[counted:]
    labels[ignored // (length - 1), ignored % (length - 1) + 1] = -100
    return ids, labels


def one_large_batch(start, micro_batches, window, lr):
    """Weights after, and losses before, every update."""
    params = [value.clone().requires_grad_() for value in start]
    weights, losses = [], []
    for first in range(0, len(micro_batches), window):
        group = micro_batches[first : first + window]
        ids = torch.cat([batch[0][:, :-1].flatten() for batch in group])
        targets = torch.cat([batch[1][:, 1:].flatten() for batch in group])
        loss = F.cross_entropy(F.linear(F.embedding(ids, params[0]), params[1]), targets, ignore_index=-100)
        gradients = torch.autograd.grad(loss, params)
        params = [(p - lr * g).detach().requires_grad_() for p, g in zip(params, gradients, strict=True)]
        weights.append([p.detach() for p in params])
        losses.append(loss.item())
    return weights, losses


def inputs(draw, counts, window, left_over=False):
    start = [torch.randn(WORDS, WIDTH, generator=draw, dtype=torch.float64) for _ in range(2)]
    stale = [torch.randn(WORDS, WIDTH, generator=draw, dtype=torch.float64) for _ in range(2)]
    sizes = [(2 + number % 2, 6 + number % 3) for number in range(len(counts))]
    micro_batches = [micro_batch(draw, *size, counted) for size, counted in zip(sizes, counts, strict=True)]
    given = {"start": start, "micro_batches": micro_batches, "window": window, "lr": LR}
    about = f"micro-batches of {', '.join(map(str, counts))} tokens, windows of {window}"
    return given, given | {"left_over": stale if left_over else None}, about


def weights_case(draw, counts, window, left_over=False, more=""):
    asked, given, about = inputs(draw, counts, window, left_over)
    weights, _ = one_large_batch(**asked)
    names = tuple(f"table and weight after update {number + 1}" for number in range(len(weights)))
    return Case("weights_after", given, weights, TOLERANCE, TOLERANCE, names=names, about=about + more)


@check(points=1)
def weights_of_one_large_batch(draw):
    """After every update the weights are those of one large batch, however many tokens each micro-batch has."""
    yield weights_case(draw, (3, 11, 1), 3)
    yield weights_case(draw, (3, 11, 1, 5, 2, 9), 3)
    yield weights_case(draw, (4, 0, 7, 0), 2, more=", some of them without a token to learn")


@check(points=1)
def losses_of_one_large_batch(draw):
    """The loss that is reported for an update is the mean over all tokens of its window."""
    for counts, window in (((3, 11, 1), 3), ((2, 9, 1, 6), 2)):
        asked, given, about = inputs(draw, counts, window)
        _, losses = one_large_batch(**asked)
        names = tuple(f"the loss of update {number + 1}" for number in range(len(losses)))
        yield Case("losses_reported", given, losses, TOLERANCE, TOLERANCE, names=names, about=about)


@check(points=1)
def first_and_last_window(draw):
    """The first window starts without old gradients, and the micro-batches left at the end are an update, too."""
    yield weights_case(draw, (5, 3), 2, left_over=True, more=", and gradients left from before")
    yield weights_case(draw, (5, 3, 8, 1, 6), 3)
    yield weights_case(draw, (2, 7, 4, 10), 3)


@check(points=1)
def one_graph_at_a_time(draw):
    """Every forward pass is followed by its backward before the next one begins."""
    _, given, about = inputs(draw, (3, 11, 1, 5), 3)
    yield Case("graphs_at_a_time", given, 1, about=about, names=("the number of graphs in memory at a time",))
