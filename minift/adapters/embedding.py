"""LoRA on an embedding: a low-rank change of a table, read at the same rows.

    y = W[id] + (alpha / r) * B A[:, id]          A: [r, v], B: [d, r], W: [v, d]

An embedding is a linear layer whose input is one-hot, so B A is the change of W^T, and A's column is looked up where a
linear layer would multiply. Here A starts at zero and B normal, the other way round than in a linear layer: so the
columns of tokens that never occur stay zero. r * (v + d) numbers instead of v * d: for opt-350m 0.4 instead of 25.7
million.

The change is computed in fp32 and rounded once, with the sum. There is no dropout, because ids have no numbers to drop.
"pissa" starts here as "default" does, as in PEFT; "loftq" is refused. With DoRA, the magnitudes belong to the d columns
of W.

Peer: PEFT `tuners/lora/layer.py`, `Embedding`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.adapters.config import LoraConfig
from minift.adapters.lora import LowRank


class LoraEmbedding(LowRank):
    """An embedding and the low-rank changes added to what it gives.

    Seen as a linear layer from v one-hot features to d, so that everything about matrices works as for `LoraLinear`.

    Attributes:
        base: the embedding, frozen.
        lora_embedding_A, lora_embedding_B: per adapter name, [r, v] and [d, r], fp32.
    """

    base: nn.Embedding
    part_names = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base: nn.Embedding):
        super().__init__(base, base.num_embeddings, base.embedding_dim)
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def add(self, adapter: str, config: LoraConfig, path: str = "") -> None:
        """Create and activate an adapter; see `LoraLinear.add`."""
        own = config.at(path)
        # PEFT's draws, in its order: A, B, and B again.
        a_rv, b_dr = torch.randn(own.r, self.in_features), torch.randn(self.out_features, own.r)
        if own.init != "random":
            a_rv, b_dr = a_rv.zero_(), b_dr.normal_()
        device = self.base.weight.device
        self.lora_embedding_A[adapter] = nn.Parameter(a_rv.to(device))
        self.lora_embedding_B[adapter] = nn.Parameter(b_dr.to(device))
        self.finish(adapter, config, own)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def held(self) -> tuple[nn.Module, nn.Module]:
        return self.lora_embedding_A, self.lora_embedding_B

    def matrices(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, v] and B [d, r] of an adapter."""
        return self.lora_embedding_A.get_parameter(adapter), self.lora_embedding_B.get_parameter(adapter)

    def base_weight(self) -> Tensor:
        """The frozen table as the weight of a linear layer, fp32 [d, v]."""
        return self.base.weight.detach().float().T

    def changed(self, name: str, x: Tensor, base_y: Tensor, y: Tensor) -> Tensor:
        """y [..., d] and what an adapter adds to it for the ids x [...], in the dtype of y."""
        a_rv, b_dr = self.matrices(name)
        change = (F.embedding(x, a_rv.T) @ b_dr.T) * self.configs[name].scaling
        if self.configs[name].use_dora:
            gain_d = self.magnitude(name) / self.norms(name)
            change = (gain_d - 1) * base_y + gain_d * change
        return (y + change).to(y.dtype)

    @torch.no_grad()
    def merge_into(self, model: nn.Module, path: str) -> None:
        """Leave a plain embedding with the changed table; a head that shared the table keeps the old one."""
        merged_dv = self.base_weight() + sum(self.delta(name) for name in self.active)
        embedding = type(self.base)(self.in_features, self.out_features, device="meta")
        embedding.weight = nn.Parameter(merged_dv.T.contiguous().to(self.weight.dtype), requires_grad=False)
        embedding.padding_idx = self.base.padding_idx
        model.set_submodule(path, embedding)
