"""Reads the row once, token by token, with what was read so far; pads with pad_sequence."""

import torch
from torch.nn.utils.rnn import pad_sequence


def completion_labels(ids, tokenizer, response, end_id):
    read, inside, seen, labels = "", False, False, []
    for one in ids:
        text = tokenizer.text_of(one)
        starts_here = False
        if not inside:
            for cut in range(len(text)):  # does the answer begin in front of the character number `cut` of this token?
                starts_here = starts_here or (read + text[:cut]).endswith(response)
        inside = inside or starts_here
        seen = seen or inside
        labels.append(one if inside else -100)
        if one == end_id:
            inside = False
        read += text
    if not seen:
        raise ValueError("there is no response template in this row")
    return labels


def collate(rows, pad_id):
    ids = [torch.tensor(row[0]) for row in rows]
    labels = [torch.tensor(row[1]) for row in rows]
    sizes = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(sizes.max()))[None, :] < sizes[:, None]
    return pad_sequence(ids, True, pad_id), pad_sequence(labels, True, -100), mask.long()
