"""e07 Dynamic 8-bit map: seven decades, each with twice as many values as the one below."""

import torch
from torch import Tensor


def dynamic_map(signed: bool = True) -> Tensor:
    """Returns the 256 values of the map in rising order, float32."""
    values = [0.0, 1.0]
    for decade in range(7):
        bins = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, bins + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        scaled = (10.0 ** (decade - 6) * middles).tolist()
        values += scaled
        if signed:
            values += [-value for value in scaled]
    return torch.tensor(sorted(values))


def encode(x: Tensor, code: Tensor) -> Tensor:
    """Returns the index (uint8, shape of x) of the value in the rising table `code` that is nearest to each x."""
    # The nearest value changes halfway between two neighbours: count the halfway points below x.
    halfway = (code[:-1] + code[1:]) / 2
    return torch.bucketize(x, halfway).to(torch.uint8)
