"""Everything from the positions: a document begins where they are 0. Bins by the space they would be left with."""

import torch


def pack(lengths, capacity):
    todo = dict(enumerate(lengths))
    bins = []
    while todo:
        index = max(todo, key=todo.get)  # the first of the longest
        length = todo.pop(index)
        if length > capacity:
            raise ValueError(f"document {index} is too long")
        left = [capacity - sum(lengths[other] for other in one) - length for one in bins]
        best = None
        for number, rest in enumerate(left):
            if rest >= 0 and (best is None or rest < left[best]):
                best = number
        if best is None:
            bins.append([index])
        else:
            bins[best] = [*bins[best], index]
    return bins


def assemble(documents, capacity, pad_id):
    flat = [token for document in documents for token in document]
    counted = [i for document in documents for i in range(len(document))]
    gap = capacity - len(flat)
    ids = torch.tensor(flat + [pad_id] * gap)
    positions = torch.tensor(counted + [0] * gap)
    owner = (positions == 0).cumsum(0)
    labels = ids.masked_fill(positions == 0, -100)
    mask = torch.zeros(capacity, capacity, dtype=torch.bool)
    for query in range(capacity):
        for key in range(query + 1):
            mask[query, key] = owner[query] == owner[key]
    return ids, labels, positions, mask
