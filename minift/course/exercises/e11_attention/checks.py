"""e11: the oracle takes the keys that each query sees, and only those; it knows no mask."""

import math

import torch

from minift.course.spec import Case, check

BATCH, HEADS, WIDTH, VALUES = 2, 3, 10, 6
# Scores are sums of 10 products of size up to 10, outputs means of up to 9 values: 64 roundings of float64 on 90 terms.
TOLERANCE = 64 * torch.finfo(torch.float64).eps * math.sqrt(90)


def numbers(draw, *shape):
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def drawn(draw, queries, keys, width=WIDTH):
    q, k = numbers(draw, BATCH, HEADS, queries, width), numbers(draw, BATCH, HEADS, keys, width)
    return {"q": q, "k": k, "v": numbers(draw, BATCH, HEADS, keys, VALUES)}


def tokens_at(keys, *spans):
    """A padding mask: in each row the places from start to stop are tokens."""
    padding = torch.zeros(len(spans), keys, dtype=torch.bool)
    for row, (start, stop) in zip(padding, spans, strict=True):
        row[start:stop] = True
    return padding


def formula(q, k, v, padding=None, causal=False):
    queries, keys = q.shape[2], k.shape[2]
    out = q.new_zeros(BATCH, HEADS, queries, VALUES)
    for b in range(BATCH):
        for i in range(queries):
            tokens = torch.arange(keys) if padding is None else padding[b].nonzero().flatten()
            seen = tokens[tokens <= i + keys - queries] if causal else tokens
            if len(seen):
                scores = torch.einsum("hd,hkd->hk", q[b, :, i], k[b, :, seen]) / math.sqrt(q.shape[3])
                out[b, :, i] = torch.einsum("hk,hke->he", scores.softmax(1), v[b, :, seen])
    return out


def case(given, about):
    return Case("attention", given, formula(**given), atol=TOLERANCE, rtol=TOLERANCE, about=about)


@check(points=1)
def scaled_scores(draw):
    """Without a mask every query takes the mean of all values, by softmax of q . k / sqrt(d) over the keys."""
    yield case(drawn(draw, 5, 7), "5 queries, 7 keys, no mask")
    given = drawn(draw, 7, 4)
    given["k"] = given["k"].mT.contiguous().mT
    yield case(given, "7 queries, 4 keys, no mask, k is a transposed view")


@check(points=1)
def nothing_later(draw):
    """Causal: a query sees its own position and those before it, the last query stands at the last key."""
    yield case(drawn(draw, 9, 9) | {"causal": True}, "9 queries, 9 keys, causal")
    yield case(drawn(draw, 4, 9) | {"causal": True}, "4 queries at the end of 9 keys, causal")


@check(points=1)
def zero_is_a_score(draw):
    """A score of exactly 0 is a score like any other and hides nothing."""
    given = drawn(draw, 5, 8)
    given["q"][0, 1, 3] = 0
    given["q"][1, 0, 2, :4] = 0
    given["k"][1, 0, :4, 4:] = 0
    yield case(given | {"causal": True}, "a query of zeros, and one at right angles to some keys; causal")


@check(points=1)
def padding_is_not_seen(draw):
    """Keys of padding are not seen by anybody, be they on the left or on the right."""
    yield case(drawn(draw, 9, 9) | {"padding": tokens_at(9, (0, 5), (0, 9))}, "padding on the right of row 0")
    yield case(drawn(draw, 5, 8) | {"padding": tokens_at(8, (3, 8), (2, 8))}, "padding on the left of both rows")


@check(points=1)
def sees_nothing(draw):
    """Both masks together; a query that sees no key at all gives zeros."""
    given = drawn(draw, 7, 7) | {"padding": tokens_at(7, (3, 7), (0, 5)), "causal": True}
    yield case(given, "7 queries, 7 keys, causal, padding on the left of row 0: its first 3 queries see nothing")
    given = drawn(draw, 5, 8) | {"padding": tokens_at(8, (0, 0), (1, 8))}
    yield case(given, "row 0 is padding only")
    yield case(drawn(draw, 8, 5) | {"causal": True}, "8 queries, 5 keys, causal: the first 3 queries see nothing")


@check(points=1)
def scores_of_any_size(draw):
    """Scores of 30000 and -30000 work like small ones, and a hidden key stays hidden beside them."""
    for size in (-60000.0, 60000.0):
        # Whole numbers and d = 4: the scores are exact, so that their size adds nothing to the rounding.
        given = drawn(draw, 5, 8, width=4)
        for name in ("q", "k"):
            given[name] = torch.randint(-2, 3, given[name].shape, generator=draw).double()
        given["q"][..., 0] = 1
        padding = tokens_at(8, (2, 8), (0, 7))
        given["k"][..., 0] = size * padding.double().unsqueeze(1)
        yield case(given | {"padding": padding, "causal": True}, f"the scores of all tokens are near {size / 2:g}")
