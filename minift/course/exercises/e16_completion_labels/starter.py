"""e16 Labels of the answers only: README.md says what to write. Check with: minift-course check e16"""

from typing import Any

import torch
from torch import Tensor

IGNORE = -100


def completion_labels(ids: list[int], tokenizer: Any, response: str, end_id: int) -> list[int]:
    """Returns the id of each token of an answer, its end included, and -100 for the others."""
    # TODO: tokenizer.text_of(id) is the text of one token; ValueError if there is no answer
    raise NotImplementedError


def collate(rows: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns input_ids, labels and attention_mask, int64 (rows, longest), padded on the right."""
    # TODO
    raise NotImplementedError
