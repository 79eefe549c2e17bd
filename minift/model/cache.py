"""The key/value cache: what earlier tokens contribute to attention does not change, so it is computed once.

Without it, generating n tokens runs the model over 1 + 2 + ... + n tokens; with it, over n. The price is
2 * layers * g * e numbers a token. Space for the longest text is reserved at the start, so no step copies the past.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minift.model.config import ModelConfig


@dataclass
class LayerCache:
    """Keys and values of one layer, [b, g, capacity, e]; the first `length` slots are filled."""

    k_bgte: Tensor
    v_bgte: Tensor
    length: int = 0

    def append(self, k_bgse: Tensor, v_bgse: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens; return all keys and values so far."""
        end = self.length + k_bgse.shape[2]
        self.k_bgte[:, :, self.length : end] = k_bgse
        self.v_bgte[:, :, self.length : end] = v_bgse
        self.length = end
        return self.k_bgte[:, :, :end], self.v_bgte[:, :, :end]


class KVCache:
    """One LayerCache per layer, and the document number of every cached token, if they are not all one.

    Args:
        config: of the model.
        batch: rows.
        capacity: most tokens a row can hold.
        dtype, device: of the activations.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]
        self.documents_bt: Tensor | None = None
        self.length, self.capacity = 0, capacity

    def add(self, input_ids_bs: Tensor, documents_bs: Tensor | None) -> Tensor | None:
        """Note new tokens and their documents; return the documents of all tokens [b, t], None if all are one.

        Raises:
            ValueError: more tokens than there is room for.
        """
        (b, s), past = input_ids_bs.shape, self.length
        if past + s > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row; {past + s} were fed")
        self.length = past + s
        if documents_bs is None and self.documents_bt is None:
            return None
        before = input_ids_bs.new_zeros(b, past) if self.documents_bt is None else self.documents_bt
        now = input_ids_bs.new_zeros(b, s) if documents_bs is None else documents_bs
        self.documents_bt = torch.cat([before, now], dim=1)
        return self.documents_bt
