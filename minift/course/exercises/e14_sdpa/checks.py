"""e14: the oracle is softmax over the keys that each query sees, and only those, in float64."""

import math

import torch

from minift.course.spec import Case, check

BATCH, HEADS, SHARED, WIDTH, VALUES = 2, 6, 3, 8, 5
# Scores are sums of 8 products of size up to 10, outputs means of up to 9 values: 64 roundings of float64 on 72 terms.
TOLERANCE = 64 * torch.finfo(torch.float64).eps * math.sqrt(72)


def drawn(draw, queries, keys):
    def numbers(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {
        "q": numbers(BATCH, HEADS, queries, WIDTH),
        "k": numbers(BATCH, SHARED, keys, WIDTH),
        "v": numbers(BATCH, SHARED, keys, VALUES),
    }


def seen_by(row, i, queries, keys, padding, causal):
    """The keys that query i of a row of the batch sees, as a list of numbers."""
    tokens = range(keys) if padding is None else padding[row].nonzero().flatten().tolist()
    return [j for j in tokens if not causal or j <= i + keys - queries]


def formula(q, k, v, padding=None, causal=False):
    out = q.new_zeros(*q.shape[:3], VALUES)
    for b in range(BATCH):
        for i in range(q.shape[2]):
            seen = seen_by(b, i, q.shape[2], k.shape[2], padding, causal)
            for h in range(HEADS):
                shared = h // (HEADS // SHARED)
                weights = (k[b, shared, seen] @ q[b, h, i] / math.sqrt(WIDTH)).softmax(0)
                out[b, h, i] = weights @ v[b, shared, seen]
    return out


def drawn_padding(draw, keys, left):
    """Row 0 has some padding on one side, row 1 has none."""
    padding = torch.ones(BATCH, keys, dtype=torch.bool)
    count = int(torch.randint(2, 4, (1,), generator=draw))
    padding[0, slice(0, count) if left else slice(keys - count, keys)] = False
    return padding


def mask_case(queries, keys, padding, causal, about):
    rows = 1 if padding is None else BATCH
    mask = torch.zeros(rows, 1, queries, keys, dtype=torch.bool)
    for b in range(rows):
        for i in range(queries):
            mask[b, 0, i, seen_by(b, i, queries, keys, padding, causal)] = True
    given = {"queries": queries, "keys": keys, "padding": padding, "causal": causal}
    return Case("bool_mask", given, None if padding is None and not causal else mask, about=about)


@check(points=1)
def masks(draw):
    """The bool mask is True where a query sees a key; the float mask is 0 there and -inf elsewhere."""
    yield mask_case(6, 6, None, True, "6 queries, 6 keys, causal")
    yield mask_case(4, 9, None, True, "4 queries at the end of 9 keys, causal")
    yield mask_case(5, 7, drawn_padding(draw, 7, left=True), False, "padding on the left, not causal")
    yield mask_case(4, 9, drawn_padding(draw, 9, left=True), True, "padding on the left, causal")
    yield mask_case(5, 7, None, False, "nothing hidden")
    mask = torch.rand(2, 1, 3, 7, generator=draw) < 0.5
    mask[0, 0, 0, :2] = torch.tensor([True, False])
    for dtype in (torch.float32, torch.bfloat16):
        expect = torch.where(mask, 0.0, -math.inf).to(dtype)
        yield Case("float_mask", {"mask": mask, "dtype": dtype}, expect, about=f"as {dtype}")


def attention_case(given, about):
    about = f"{about}; {HEADS} heads, {SHARED} key/value heads"
    return Case("attention", given, formula(**given), atol=TOLERANCE, rtol=TOLERANCE, about=about)


@check(points=1)
def equals_the_formula(draw):
    """Attention through SDPA gives the numbers of the formula, with shared heads, causal or not, padded or not."""
    yield attention_case(drawn(draw, 5, 7), "5 queries, 7 keys, no mask")
    yield attention_case(drawn(draw, 7, 7) | {"causal": True}, "7 queries, 7 keys, causal")
    yield attention_case(drawn(draw, 4, 9) | {"causal": True}, "4 queries at the end of 9 keys, causal")
    yield attention_case(drawn(draw, 1, 9) | {"causal": True}, "1 query after 8 cached keys, causal")
    given = {"padding": drawn_padding(draw, 7, left=False)}
    yield attention_case(drawn(draw, 7, 7) | given, "7 queries, 7 keys, padding on the right")
    yield attention_case(
        drawn(draw, 7, 7) | given | {"causal": True}, "7 queries, 7 keys, padding on the right, causal"
    )
    given = {"padding": drawn_padding(draw, 9, left=True), "causal": True}
    yield attention_case(drawn(draw, 4, 9) | given, "4 queries at the end of 9 keys, padding on the left, causal")


@check(points=1)
def no_mask_without_need(draw):
    """The kernel is called once, without a mask where is_causal says it all or nothing is hidden."""
    for queries, keys, causal in ((7, 7, True), (5, 7, False), (7, 7, False)):
        given = drawn(draw, queries, keys) | {"causal": causal}
        about = f"{queries} queries, {keys} keys, {'causal' if causal else 'no mask'}, no padding"
        expect = [{"attn_mask": False, "is_causal": causal}]
        yield Case("arguments", given, expect, names=("the only call of SDPA",), about=about)
