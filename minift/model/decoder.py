"""A decoder-only language model in one screen.

    token ids -> embedding -> N x (norm, attention, norm, MLP) -> norm -> head -> logits

It knows nothing of LoRA or 4-bit weights: both replace `nn.Linear` modules from outside (adapters/inject.py,
quant/model.py). Padding, packed documents and positions come in as two integers a token.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minift.model.attention import ATTENTION, SharedPrefix, after_prefix, causal_mask, document_mask
from minift.model.cache import KVCache
from minift.model.config import ModelConfig
from minift.model.layers import QKV, Block, RMSNorm
from minift.model.rope import cos_sin, rope_frequencies


class Embedding(nn.Embedding):
    """nn.Embedding, not initialized on the meta device, where drawing from a normal distribution would import torch's
    compiler (1.5 s, 150 MB) to no avail."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Decoder(nn.Module):
    """Embedding, blocks and final norm (the part that checkpoints call `model.`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A decoder with its language-model head.

    Args:
        config: shape of the model.
        attention: "sdpa" or "eager".

    Attributes:
        name: what the model was loaded as; adapters record it as their base.
        folder: where its files are; None for a model that was not loaded.
    """

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"unknown attention {attention!r}: choose {' or '.join(map(repr, ATTENTION))}")
        self.config = config
        self.attention = ATTENTION[attention]
        self.name = ""
        self.folder: Path | None = None
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head use the embedding's matrix where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of embeddings and norms, and so of the activations."""
        return self.model.embed_tokens.weight.dtype

    def hidden(
        self,
        input_ids_bs: Tensor,
        positions_bs: Tensor | None = None,
        documents_bs: Tensor | None = None,
        cache: KVCache | None = None,
        gradient_checkpointing: bool = False,
        shared_prefix: SharedPrefix | None = None,
    ) -> Tensor:
        """Final hidden states [b, s, d]; the head turns them into logits.

        Args:
            input_ids_bs: token ids, int64.
            positions_bs: position of each token in its document; None counts from 0 (or on from the cache).
            documents_bs: document number of each token, -1 for padding; None is one document a row.
            cache: keys and values of the tokens before these; the new ones are appended.
            gradient_checkpointing: keep only each block's input and compute the block again in the backward pass:
                about a third more time for a fraction of the activation memory.
            shared_prefix: if the input is one flat sequence of a prefix and the rows that go on from it.
        """
        model = self.model
        b, s = input_ids_bs.shape
        if documents_bs is None and cache is not None:
            documents_bs = input_ids_bs.new_zeros(b, s)
        documents_bt = documents_bs if cache is None or documents_bs is None else cache.add_documents(documents_bs)

        def attention(window: int | None) -> QKV:
            """Attention with everything but q, k and v decided, for the layers with this window."""
            if shared_prefix is not None:
                slots = shared_prefix.slots(input_ids_bs.device)
                return partial(after_prefix, self.attention, shared_prefix, slots, window)
            if documents_bs is not None and documents_bt is not None:
                return partial(self.attention, mask=document_mask(documents_bs, documents_bt, window))
            beyond = window is not None and s > window
            return partial(self.attention, mask=causal_mask(s, s, input_ids_bs.device, window) if beyond else None)

        attend = {window: attention(window) for window in set(self.config.windows)}
        if positions_bs is None:
            past = 0 if documents_bt is None else documents_bt.shape[1] - s
            positions_bs = torch.arange(past, past + s, device=input_ids_bs.device).unsqueeze(0)

        x_bsd = model.embed_tokens(input_ids_bs)
        # Computed anew for every call (a few microseconds): a buffer would follow `.to(bfloat16)` and lose its digits.
        frequency = rope_frequencies(self.config.rope, self.config.head_dim, x_bsd.device)
        rotation = cos_sin(positions_bs, frequency, x_bsd.dtype)
        for index, block in enumerate(model.layers):
            within = attend[self.config.windows[index]]
            if gradient_checkpointing:
                x_bsd = checkpoint(block, x_bsd, rotation, within, use_reentrant=False)
            else:
                x_bsd = block(x_bsd, rotation, within, cache.layers[index] if cache is not None else None)
        return model.norm(x_bsd)

    def forward(
        self, input_ids_bs: Tensor, positions_bs: Tensor | None = None, documents_bs: Tensor | None = None
    ) -> Tensor:
        """Logits [b, s, v] in the activation dtype. Arguments as `hidden`."""
        return self.lm_head(self.hidden(input_ids_bs, positions_bs, documents_bs))
