"""e12: the oracle goes through the query heads one by one, with slices of the weights, and never reshapes."""

import math

import torch

from minift.course.spec import Case, check

BATCH, LENGTH, WIDTH, HEADS, D = 3, 5, 20, 6, 4  # WIDTH is not HEADS * D
# Sums of 20, 4, 5 and 24 products one after another, each of size 1 to 30: 64 roundings of float64 on 480 terms.
TOLERANCE = 64 * torch.finfo(torch.float64).eps * math.sqrt(480)


def numbers(draw, *shape):
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def formula(x, wq, wk, wv, wo, heads, kv_heads):
    d, n, out = len(wq) // heads, heads // kv_heads, []
    hidden = torch.arange(x.shape[1]) > torch.arange(x.shape[1]).unsqueeze(1)
    for h in range(heads):
        own, shared = slice(h * d, (h + 1) * d), slice(h // n * d, (h // n + 1) * d)
        scores = (x @ wq[own].T) @ (x @ wk[shared].T).mT / math.sqrt(d)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out.append(weights @ (x @ wv[shared].T))
    return torch.cat(out, -1) @ wo.T


def attention_case(draw, kv_heads):
    given = {
        "x": numbers(draw, BATCH, LENGTH, WIDTH),
        "wq": numbers(draw, HEADS * D, WIDTH) / 4,
        "wk": numbers(draw, kv_heads * D, WIDTH) / 4,
        "wv": numbers(draw, kv_heads * D, WIDTH) / 4,
        "wo": numbers(draw, WIDTH, HEADS * D) / 4,
        "heads": HEADS,
        "kv_heads": kv_heads,
    }
    about = f"width {WIDTH}, {HEADS} heads of {D}, {kv_heads} key/value heads"
    return Case("attention", given, formula(**given), atol=TOLERANCE, rtol=TOLERANCE, about=about)


@check(points=1)
def heads_apart(draw):
    """split_heads gives every head its own D numbers of every token, and merge_heads puts them back."""
    for heads, d in ((6, 4), (2, 7)):
        each = [numbers(draw, BATCH, LENGTH, d) for _ in range(heads)]
        apart, whole = torch.stack(each, 1), torch.cat(each, -1)
        about = f"{heads} heads of {d}, {LENGTH} tokens"
        yield Case("split_heads", {"x": whole, "heads": heads}, apart, about=about)
        yield Case("merge_heads", {"x": apart}, whole, about=about)


@check(points=1)
def copies_side_by_side(draw):
    """repeat_kv puts the n copies of a head side by side, so that query head h finds key/value head h // n."""
    for heads, n in ((2, 3), (4, 2), (6, 1)):
        x = numbers(draw, BATCH, heads, LENGTH, 7)
        expect = torch.stack([x[:, h // n] for h in range(heads * n)], 1)
        yield Case("repeat_kv", {"x": x, "n": n}, expect, about=f"{heads} heads, n = {n}")


@check(points=1)
def plain_attention(draw):
    """With as many key/value heads as heads it is plain causal attention, scaled by the width of one head."""
    yield attention_case(draw, HEADS)


@check(points=1)
def shared_heads(draw):
    """Query heads share key/value heads, three to one or six to one."""
    yield attention_case(draw, 2)
    yield attention_case(draw, 1)
