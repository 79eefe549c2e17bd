"""Sorted bins searched with bisect; the row put together from parts, the mask with block_diag."""

from bisect import bisect_left, insort

import torch


def pack(lengths, capacity):
    if any(length > capacity for length in lengths):
        raise ValueError("too long")
    bins, open_bins = [], []  # (space left, number of the bin), sorted
    for negative, index in sorted((-length, index) for index, length in enumerate(lengths)):
        place = bisect_left(open_bins, (-negative, -1))
        if place == len(open_bins):
            space, number = capacity, len(bins)
            bins.append([index])
        else:
            space, number = open_bins.pop(place)
            bins[number].append(index)
        insort(open_bins, (space + negative, number))
    return bins


def assemble(documents, capacity, pad_id):
    pads = capacity - sum(len(document) for document in documents)
    ids = torch.tensor([token for document in documents for token in document] + [pad_id] * pads)
    labels = torch.tensor([x for document in documents for x in [-100, *document[1:]]] + [-100] * pads)
    positions = torch.cat([torch.arange(len(document)) for document in documents] + [torch.zeros(pads).long()])
    blocks = [torch.ones(len(document), len(document)).tril() for document in documents]
    return ids, labels, positions, torch.block_diag(*blocks, torch.eye(pads)).bool()
