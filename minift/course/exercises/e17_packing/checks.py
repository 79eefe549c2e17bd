"""e17: bins from TRL's own packing, masks built from block_diag, attention over each document alone in float64."""

import math

import torch
import torch.nn.functional as F

from minift.course.spec import Case, check

# trl 1.16.0, pack_dataset(strategy="bfd", seq_length=16), on lengths where its order of equal documents is ours.
GOLDEN = (
    ([3, 3, 10, 10, 6, 14, 9, 5, 1], [[5], [2, 4], [3, 7, 8], [6, 0, 1]]),
    ([2, 7, 15, 6, 2, 13, 7, 12, 4], [[2], [5, 4], [7, 8], [1, 6, 0], [3]]),
)
NAMES = ("ids", "labels", "positions", "mask")
VOCABULARY, WIDTH, HEAD = 11, 6, 4
# Sums of at most 17 keys times WIDTH times VOCABULARY products of a size of about 10: 64 roundings of float64 on those.
TOLERANCE = 64 * torch.finfo(torch.float64).eps * math.sqrt(17 * WIDTH * VOCABULARY) * 10


def best_fit(lengths, capacity):
    """Bins as (space, indices), searched one by one; the definition, slowly."""
    bins = []
    for length, index in sorted(((length, index) for index, length in enumerate(lengths)), key=lambda one: -one[0]):
        best = None
        for one in bins:
            if one[0] >= length and (best is None or one[0] < best[0]):
                best = one
        if best is None:
            best = [capacity, []]
            bins.append(best)
        best[0] -= length
        best[1].append(index)
    return [indices for _, indices in bins]


def documents_of(draw, *lengths):
    """Ids from 1 on, so that the padding 0 is none of them."""
    return [torch.randint(1, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]


def row_of(documents, capacity, pad):
    gap = capacity - sum(map(len, documents))
    rows = [torch.tensor(document) for document in documents]
    nothing = torch.tensor([-100])
    ids = F.pad(torch.cat(rows), (0, gap), value=pad)
    labels = F.pad(torch.cat([torch.cat([nothing, row[1:]]) for row in rows]), (0, gap), value=-100)
    positions = F.pad(torch.cat([torch.ones_like(row).cumsum(0) - 1 for row in rows]), (0, gap))
    mask = torch.block_diag(*(torch.ones(len(row), len(row)).tril() for row in rows), torch.eye(gap)) == 1
    return ids, labels, positions, mask


def row_case(draw, lengths, capacity, pad=0, about=""):
    documents = documents_of(draw, *lengths)
    given = {"documents": documents, "capacity": capacity, "pad_id": pad}
    text = f"documents of {', '.join(map(str, lengths))} tokens in a row of {capacity}{about}"
    return Case("assemble", given, row_of(documents, capacity, pad), names=NAMES, about=text)


def alone(documents, tokens, places, weights, out):
    """Each document through the layer for itself: logits, sum of the losses, gradient of the table."""
    table = tokens.clone().requires_grad_()
    logits, losses = [], []
    for document in map(torch.tensor, documents):
        x = (F.embedding(document, table) + places[: len(document)])[None]
        q, k, v = (F.linear(x, weight) for weight in weights)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen = F.linear(F.linear(mixed, out), table)[0]
        logits.append(seen.detach())
        losses.append(F.cross_entropy(seen[:-1], document[1:], reduction="sum"))
    loss = torch.stack(losses).sum()
    return torch.cat(logits), loss.detach(), torch.autograd.grad(loss, table)[0]


def attention_case(draw, lengths, capacity):
    documents = documents_of(draw, *lengths)
    net = {
        "tokens": torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64),
        "places": torch.randn(capacity, WIDTH, generator=draw, dtype=torch.float64),
        "weights": [torch.randn(HEAD, WIDTH, generator=draw, dtype=torch.float64) / 2 for _ in range(3)],
        "out": torch.randn(WIDTH, HEAD, generator=draw, dtype=torch.float64) / 2,
    }
    given = {"documents": documents, "capacity": capacity, "pad_id": 0} | net
    about = f"documents of {', '.join(map(str, lengths))} tokens in a row of {capacity}"
    names = ("logits", "loss", "gradient")
    return Case("through_attention", given, alone(documents, **net), TOLERANCE, TOLERANCE, names=names, about=about)


@check(points=1)
def best_fit_decreasing(draw):
    """Every document is whole and in one bin, the longest first, each in the fullest bin that still holds it."""
    for lengths, bins in GOLDEN:
        yield Case("pack", {"lengths": lengths, "capacity": 16}, bins, about=f"{lengths} into 16, as trl packs them")
    lengths = torch.randint(1, 14, (15,), generator=draw).tolist()
    about = f"{lengths} into 13, so that some fill a bin alone"
    yield Case("pack", {"lengths": lengths, "capacity": 13}, best_fit(lengths, 13), about=about)
    lengths = torch.randint(1, 9, (5,), generator=draw).tolist()
    lengths[int(torch.randint(5, (1,), generator=draw))] = 10
    yield Case("pack", {"lengths": lengths, "capacity": 9}, raises="ValueError", about=f"{lengths} into 9")


@check(points=1)
def a_row_of_one_document(draw):
    """One document and its padding: labels without the first token, a causal mask, pads that see themselves only."""
    yield row_case(draw, (5,), 8)
    yield row_case(draw, (7,), 7, about=", which leaves no padding")
    yield row_case(draw, (4,), 9, pad=3, about=", padded with 3, which is a token, too")


@check(points=1)
def a_row_of_several(draw):
    """In a row of several documents each begins again: its positions, its labels, its block of the mask."""
    yield row_case(draw, (5, 3, 6), 17)
    yield row_case(draw, (4, 4, 2, 4), 15, about=", three of the same length")
    yield row_case(draw, (1, 6, 1), 11, about=", two of them a single token")


@check(points=2)
def as_if_alone(draw):
    """Logits, loss and gradient of an attention layer over the row are those of every document alone."""
    yield attention_case(draw, (5, 3, 7), 17)
    yield attention_case(draw, (4, 4, 2), 10)
