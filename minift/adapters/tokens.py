"""Training a few rows of the embedding: those of new tokens, and nothing else (`trainable_token_indices`).

    id  ->  is it one of the trained?  yes: the adapter's row        no: the frozen table's row

A new token needs its row, and its score if the head shares the table (tied.py), but not the other 50,000 rows. So the
adapter holds n rows of d numbers, fp32, and only these get a gradient: no matrix as large as the table is made,
forwards or backwards. (PEFT writes the rows into a copy of the table in every forward pass, and its gradient is as
large as the table.)

They start as the table's rows. Files hold the rows themselves, though PEFT calls them `trainable_tokens_delta`.

Peer: PEFT `tuners/trainable_tokens/layer.py`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.adapters.config import LoraConfig
from minift.adapters.switched import Exclusive
from minift.adapters.targets import HEAD
from minift.adapters.tied import TiedHead, unfollow

DELTA = "token_adapter.trainable_tokens_delta"


class Rows(nn.Module):
    """Trained rows of one adapter: `weight` fp32 [n, d] for the tokens `indices` [n], in the order of the file."""

    indices: Tensor
    sorted_ids: Tensor
    order: Tensor

    def __init__(self, table_vd: Tensor, indices: Sequence[int]):
        super().__init__()
        index_n = torch.tensor(indices, device=table_vd.device)
        sorted_n, order_n = index_n.sort()
        for name, value in (("indices", index_n), ("sorted_ids", sorted_n), ("order", order_n)):
            self.register_buffer(name, value, persistent=False)
        self.weight = nn.Parameter(table_vd.detach()[index_n].float())

    def look_up(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For ids of any shape: whether each is one of ours [..., 1], and its row [..., d] (or any, if it is not)."""
        place = torch.searchsorted(self.sorted_ids, ids).clamp_(max=len(self.order) - 1)
        ours = self.sorted_ids[place] == ids
        return ours.unsqueeze(-1), F.embedding(self.order[place], self.weight)


class TokenRows(Exclusive):
    """An embedding, or a head, some of whose rows each adapter has its own of.

    Attributes:
        base: nn.Embedding or nn.Linear, frozen.
        rows: per adapter name, its `Rows`.
    """

    base: nn.Embedding | nn.Linear

    def __init__(self, base: nn.Module):
        super().__init__()
        assert isinstance(base, nn.Embedding | nn.Linear)
        self.base = base
        self.rows = nn.ModuleDict()

    def add(self, adapter: str, config: LoraConfig, indices: Sequence[int]) -> None:
        """Create and activate rows that are as in the table."""
        self.rows[adapter] = Rows(self.base.weight, indices)
        self.accept(adapter, config)

    def remove(self, adapter: str) -> None:
        """Forget an adapter's rows."""
        super().remove(adapter)
        del self.rows[adapter]

    def of(self, adapter: str) -> Rows:
        """The rows of an adapter."""
        rows = self.rows.get_submodule(adapter)
        assert isinstance(rows, Rows)
        return rows

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """The rows [n, d]."""
        return {DELTA: self.of(adapter).weight}

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Of an embedding: ids of any shape -> [..., d]. Of a head: [..., d] -> [..., v]."""
        if isinstance(self.base, nn.Linear):
            return self.scores(self.base, x)
        y = self.base(x)
        for name in self.active:
            ours, row = self.of(name).look_up(x)
            y = torch.where(ours, row.to(y.dtype), y)
        return y

    def scores(self, head: nn.Linear, x: Tensor) -> Tensor:
        """What a head with these rows computes: x [..., d] -> [..., v]."""
        y = head(x)
        for name in self.active:
            rows = self.of(name)
            bias_n = None if head.bias is None else head.bias[rows.indices]
            # In place: the logits are the largest tensor there is, and nobody else has seen these.
            y.index_copy_(-1, rows.indices, F.linear(x, rows.weight.to(x.dtype), bias_n))
        return y

    def put_back(self, model: nn.Module, path: str) -> None:
        """Take this place out of the model again."""
        unfollow(model, self)
        super().put_back(model, path)

    @torch.no_grad()
    def merge_into(self, model: nn.Module, path: str) -> None:
        """Write the active rows into a copy of the table, which a tied head shares again."""
        head = dict(model.named_children()).get(HEAD)
        tied = isinstance(head, TiedHead) and head.source[0] is self
        self.put_back(model, path)
        table_vd = self.base.weight.detach().clone()
        for name in self.active:
            rows = self.of(name)
            table_vd[rows.indices] = rows.weight.to(table_vd.dtype)
        self.base.weight = nn.Parameter(table_vd, requires_grad=False)
        if tied:
            model.get_submodule(HEAD).weight = self.base.weight
