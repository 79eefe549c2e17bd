"""e18: the oracle is F.cross_entropy in float64, with autograd for the gradient."""

import torch
import torch.nn.functional as F

from minift.course.spec import Case, check

EPS = torch.finfo(torch.float32).eps
NAMES = ("loss", "gradient")


def exact(logits, labels):
    """Loss and gradient in float64; where nothing is counted, zeros."""
    leaf = logits.double().requires_grad_()
    targets = labels[:, 1:]
    count = int((targets != -100).sum())
    total = F.cross_entropy(leaf[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    loss = total / max(count, 1)
    return loss.detach().float(), torch.autograd.grad(loss, leaf)[0].float()


def case(logits, labels, about):
    # Of each pair: 8 roundings of numbers as large as its logits, 64 of numbers of size 1. Their mean is no worse.
    atol = EPS * (64 + 8 * float(logits.abs().max()))
    given = {"logits": logits, "labels": labels}
    return Case("loss_and_gradient", given, exact(logits, labels), atol, 64 * EPS, names=NAMES, about=about)


def bfloat16_case(logits, labels, about):
    """The loss alone: its gradient is bfloat16 in any case. The tolerance is that of logits up to 16."""
    given = {"logits": logits.bfloat16(), "labels": labels}
    loss, _ = exact(**given)
    return Case("next_token_loss", given, loss, atol=192 * EPS, rtol=64 * EPS, about=about)


def batch(draw, rows, length, words, size=3.0):
    logits = torch.randn(rows, length, words, generator=draw) * size
    return logits, torch.randint(0, words, (rows, length), generator=draw)


@check(points=1)
def judged_by_the_next_token(draw):
    """The logits of a position are judged by the label of the next one, once."""
    yield case(*batch(draw, 3, 6, 11), "3 rows of 6 tokens, 11 words, all counted")
    yield case(*batch(draw, 1, 2, 5), "one row of 2 tokens: a single pair")


@check(points=1)
def ignored_labels(draw):
    """A label of -100 is left out of the sum and of the count, and every counted pair weighs the same."""
    logits, labels = batch(draw, 4, 7, 9)
    for row, (first, last) in enumerate(((1, 7), (3, 6), (5, 6), (0, 4))):  # 6, 3, 1 and 3 counted pairs
        labels[row, :first] = -100
        labels[row, last:] = -100
    yield case(logits, labels, "4 rows with 6, 3, 1 and 3 counted pairs, -100 first and last")
    logits, labels = batch(draw, 2, 5, 8)
    labels[1] = -100
    yield case(logits, labels, "2 rows, one of them -100 throughout")


@check(points=1)
def large_logits(draw):
    """Logits of 10 000 overflow nothing, and those in bfloat16 are computed in float32."""
    logits, labels = batch(draw, 2, 5, 7)
    logits[0, 1] += 10_000
    logits[1, 2] -= 10_000
    logits[1, 3, int(labels[1, 4])] -= 10_000
    yield case(logits, labels, "logits around 10 000 and around -10 000, and one label 10 000 below the rest")
    logits, labels = batch(draw, 3, 9, 13)
    yield bfloat16_case(logits, labels, "logits in bfloat16")
    # So that each loss is log 13 = 2.56495, which bfloat16 would make 2.5625 at every position.
    alike = (logits[:, :, :1] * 4).round().expand(-1, -1, 13).contiguous() / 4
    yield bfloat16_case(alike, labels, "logits in bfloat16, all 13 words alike")


@check(points=1)
def nothing_to_learn(draw):
    """If no pair is counted the loss is 0 and so is every gradient, never NaN."""
    logits, labels = batch(draw, 2, 5, 6)
    yield case(logits, labels.fill_(-100), "every label is -100")
    logits, labels = batch(draw, 3, 4, 7)
    labels[:, 1:] = -100
    yield case(logits, labels, "only the first labels are not -100, and nobody predicts them")
    yield case(*batch(draw, 2, 1, 5), "rows of a single token")
