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
    """One LayerCache per layer, and the document number of every cached token.

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
        self.documents_bt = torch.empty((batch, 0), dtype=torch.long, device=device)
        self.capacity = capacity

    def add_documents(self, documents_bs: Tensor) -> Tensor:
        """Note the documents of new tokens; return those of all tokens, [b, t]."""
        if self.documents_bt.shape[1] + documents_bs.shape[1] > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row; more were fed")
        self.documents_bt = torch.cat([self.documents_bt, documents_bs], dim=1)
        return self.documents_bt
