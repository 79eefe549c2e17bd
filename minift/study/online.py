"""A softmax computed while its row is still being read: what a query of flash attention carries from tile to tile.

    peak     the largest score so far
    total    sum of exp(score - peak)
    acc      sum of exp(score - peak) v

A tile with a larger score restates the old sums: both are multiplied by exp(old peak - new peak). At the end
acc / total is the weighted mean of the values, the same as after reading the whole row at once. minift/model/flash.py
does this for tiles of queries; here is one query, with every state on the way.

Source: arXiv 1805.02867.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Carried(NamedTuple):
    """What is known after a tile.

    Attributes:
        decay: what the old sums were multiplied by; 0 at the first tile, which finds none.
        out_e: acc / total, the result if the row ended here.
    """

    peak: float
    decay: float
    total: float
    acc_e: Tensor
    out_e: Tensor


def online_softmax(scores_t: Tensor, v_te: Tensor, tile: int) -> list[Carried]:
    """The states of one query, after each tile of keys.

    Args:
        scores_t: of the query and t keys, finite.
        v_te: their values.
        tile: keys read at a time; the last tile may be shorter.

    Raises:
        ValueError: a tile without keys.
    """
    if tile < 1:
        raise ValueError(f"a tile of {tile} keys: give at least 1")
    peak, total = scores_t.new_tensor(-torch.inf), scores_t.new_zeros(())
    acc_e, states = torch.zeros_like(v_te[0]), []
    for score, v in zip(scores_t.split(tile), v_te.split(tile), strict=True):
        new_peak = torch.maximum(peak, score.max())
        p, decay = (score - new_peak).exp(), (peak - new_peak).exp()
        total = total * decay + p.sum()
        acc_e = acc_e * decay + p @ v
        peak = new_peak
        states.append(Carried(peak.item(), decay.item(), total.item(), acc_e, acc_e / total))
    return states
