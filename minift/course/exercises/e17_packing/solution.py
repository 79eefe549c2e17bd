"""e17 Packing: best fit decreasing, and a row in which every document is alone."""

import torch
from torch import Tensor

IGNORE = -100


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Returns the bins, each a list of indices of documents."""
    if max(lengths) > capacity:
        raise ValueError(f"a document of {max(lengths)} tokens does not fit into {capacity}")
    bins: list[list[int]] = []
    space: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = [number for number in range(len(bins)) if space[number] >= length]
        if fitting:
            best = min(fitting, key=lambda number: space[number])
        else:
            best = len(bins)
            bins.append([])
            space.append(capacity)
        bins[best].append(index)
        space[best] -= length
    return bins


def assemble(documents: list[list[int]], capacity: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ids, labels, positions (capacity,) and mask (capacity, capacity) of one row."""
    ids = torch.full((capacity,), pad_id)
    labels = torch.full((capacity,), IGNORE)
    positions = torch.zeros(capacity, dtype=torch.int64)
    place = torch.arange(capacity)
    owner = place.clone()  # where the document of a token begins; a pad is a document of its own
    start = 0
    for document in documents:
        stop = start + len(document)
        ids[start:stop] = torch.tensor(document)
        labels[start + 1 : stop] = ids[start + 1 : stop]
        positions[start:stop] = torch.arange(len(document))
        owner[start:stop] = start
        start = stop
    same = owner[:, None] == owner[None, :]
    mask = same & (place[None, :] <= place[:, None])
    return ids, labels, positions, mask
