"""e16 Labels of the answers only: found in the text of the row, which does not depend on how it was cut into tokens."""

from bisect import bisect_right
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


def answer_starts(ids: list[int], tokenizer: Any, response: str) -> list[int]:
    """For each answer the index of the first token that reaches beyond the template."""
    texts = [tokenizer.text_of(one) for one in ids]
    whole = "".join(texts)
    stops = list(accumulate(len(text) for text in texts))
    starts = []
    at = whole.find(response)
    while at >= 0:
        begin = at + len(response)
        starts.append(bisect_right(stops, begin))
        at = whole.find(response, begin)
    return starts


def completion_labels(ids: list[int], tokenizer: Any, response: str, end_id: int) -> list[int]:
    """Returns the id of each token of an answer, its end included, and -100 for the others."""
    starts = answer_starts(ids, tokenizer, response)
    if not starts:
        raise ValueError(f"the row has no {response!r}, so there is nothing to learn from it")
    labels = [IGNORE] * len(ids)
    for start in starts:
        stop = ids.index(end_id, start) + 1 if end_id in ids[start:] else len(ids)
        labels[start:stop] = ids[start:stop]
    return labels


def collate(rows: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns input_ids, labels and attention_mask, int64 (rows, longest), padded on the right."""
    shape = len(rows), max(len(ids) for ids, _ in rows)
    input_ids = torch.full(shape, pad_id)
    targets = torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.int64)
    for number, (ids, labels) in enumerate(rows):
        input_ids[number, : len(ids)] = torch.tensor(ids)
        targets[number, : len(ids)] = torch.tensor(labels)
        mask[number, : len(ids)] = 1
    return input_ids, targets, mask
