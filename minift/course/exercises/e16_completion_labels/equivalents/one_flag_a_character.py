"""Marks the characters of the answers, then asks of each token whether it has one; pads with lists."""

import torch


def completion_labels(ids, tokenizer, response, end_id):
    texts = list(map(tokenizer.text_of, ids))
    before, *answers = "".join(texts).split(response)
    if not answers:
        raise ValueError("no answer in this row")
    end = tokenizer.text_of(end_id)
    flags = [False] * len(before)
    for part in answers:
        answer = part[: part.index(end) + len(end)] if end in part else part
        flags += [False] * len(response) + [True] * len(answer) + [False] * (len(part) - len(answer))
    labels, place = [], 0
    for one, text in zip(ids, texts, strict=True):
        labels.append(one if any(flags[place : place + len(text)]) else -100)
        place += len(text)
    return labels


def collate(rows, pad_id):
    longest = max(len(row[0]) for row in rows)
    gaps = [longest - len(row[0]) for row in rows]
    ids = [list(row[0]) + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)]
    labels = [list(row[1]) + [-100] * gap for row, gap in zip(rows, gaps, strict=True)]
    mask = [[1] * (longest - gap) + [0] * gap for gap in gaps]
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask)
