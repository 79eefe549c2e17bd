"""e17 Packing: README.md says what to write. Check with: minift-course check e17"""

import torch
from torch import Tensor

IGNORE = -100


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Returns the bins, each a list of indices of documents."""
    # TODO: longest first, each into the fullest bin that still holds it
    raise NotImplementedError


def assemble(documents: list[list[int]], capacity: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ids, labels, positions (capacity,) and mask (capacity, capacity) of one row."""
    # TODO
    raise NotImplementedError
