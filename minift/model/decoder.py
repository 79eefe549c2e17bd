"""A decoder-only language model in one screen.

    token ids -> embedding -> N x (norm, attention, norm, MLP) -> norm -> head -> logits

It knows nothing of LoRA or 4-bit weights: both replace `nn.Linear` modules from outside (adapters/inject.py,
quant/model.py). Tokens that are no words come in through `virtual` alone. Padding, packed documents and positions come
in as two integers a token. Dropout, which OPT and GPT-2 were trained with, is left out: fine-tuning has the adapters'
own.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from minift.model.attention import ATTENTION, SharedPrefix, Visible, after_prefix
from minift.model.cache import KVCache, LayerCache
from minift.model.config import ModelConfig
from minift.model.layers import QKV, Block, Part, norm
from minift.model.rope import Rotation, rotation

# False: keep everything for the backward pass. True: keep each block's input and compute the block again: a third more
# work, with LoRA half as much again (frozen weights have no gradient), for a fraction of the memory. "selective": keep
# the results of linear layers and of fused attention, which cost most to compute, and compute only what lies between
# them again. It pays for training all weights; with LoRA the frozen layers' results are kept as well, and that is more
# than keeping what backward needs.
Checkpointing = bool | Literal["selective"]


class Slots(Protocol):
    """What stands in those columns of an input that hold no words (adapters/virtual.py)."""

    def embed(self, x_bsd: Tensor) -> Tensor:
        """The words' embeddings, with what stands in the slots."""
        ...

    def through(self, layer: int, cache: LayerCache | None) -> Any:
        """What a layer's keys and values go through: its cache, or something that appends to it."""
        ...


class Virtual(Protocol):
    """Puts `tokens` slots in front of every document, and takes them out of the result."""

    tokens: int

    def __call__(
        self,
        inner: Callable[..., Tensor],
        input_ids_bs: Tensor,
        positions_bs: Tensor | None,
        documents_bs: Tensor | None,
        cache: KVCache | None,
        gradient_checkpointing: Checkpointing,
        shared_prefix: SharedPrefix | None,
    ) -> Tensor: ...


class Embedding(nn.Embedding):
    """nn.Embedding, not initialized on the meta device, where drawing from a normal distribution would import torch's
    compiler (1.5 s, 150 MB) to no avail."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Decoder(Part):
    """Embeddings, blocks and final norm (the part that Llama's checkpoints call `model.`).

    opt-350m has embeddings narrower than its blocks: `project_in` and `project_out` stand between.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        width, narrow = config.hidden_size, config.embedding_size
        self.embed_tokens = Embedding(config.vocab_size, narrow)
        if config.family.learned is not None:
            self.embed_positions = Embedding(config.max_position_embeddings + config.family.learned, width)
        self.project_in = nn.Linear(narrow, width, bias=False) if narrow != width else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = None if config.norm_sum else norm(config, width)
        self.project_out = nn.Linear(width, narrow, bias=False) if narrow != width else None


class CausalLM(Part):
    """A decoder with its language-model head.

    Args:
        config: shape of the model.
        attention: "eager", "sdpa" or "flash"; None: "sdpa", or "eager" where scores are capped.

    Attributes:
        name: what the model was loaded as; adapters record it as their base.
        folder: where its files are; None for a model that was not loaded.
        resized: whether the embedding has other rows than when it was loaded, of which an adapter's file says nothing.
        virtual: tokens that are no words, in front of every document (adapters/virtual.py); None: there are none.

    Raises:
        ValueError: an attention that does not exist, or that cannot cap scores for a model that does.
    """

    def __init__(self, config: ModelConfig, attention: str | None = None):
        super().__init__(config)
        attention = attention or ("eager" if config.attention_softcap else "sdpa")
        if attention not in ATTENTION:
            raise ValueError(f"unknown attention {attention!r}: choose one of {', '.join(ATTENTION)}")
        if attention == "sdpa" and config.attention_softcap:
            raise ValueError(f"{config.model_type} caps its scores, which sdpa cannot; choose 'eager' or 'flash'")
        self.config = config
        self.attention = ATTENTION[attention]
        self.name = ""
        self.folder: Path | None = None
        self.resized = False
        self.virtual: Virtual | None = None
        self.decoder = Decoder(config)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head use the embedding's matrix where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of embeddings and norms, and so of the activations."""
        return self.decoder.embed_tokens.weight.dtype

    @property
    def virtual_tokens(self) -> int:
        """Slots in front of every document, which take room in the context and in the cache."""
        return self.virtual.tokens if self.virtual is not None else 0

    def hidden(
        self,
        input_ids_bs: Tensor,
        positions_bs: Tensor | None = None,
        documents_bs: Tensor | None = None,
        cache: KVCache | None = None,
        gradient_checkpointing: Checkpointing = False,
        shared_prefix: SharedPrefix | None = None,
    ) -> Tensor:
        """Final hidden states [b, s, d]; `logits` turns them into scores of the vocabulary.

        Args:
            input_ids_bs: token ids, int64.
            positions_bs: position of each token in its document; None counts from 0 (or on from the cache).
            documents_bs: a number for each token, runs of the same number are documents; None is one a row.
            cache: keys and values of the tokens before these; the new ones are appended.
            gradient_checkpointing: what to keep for the backward pass.
            shared_prefix: if the input is one flat sequence of a prefix and the rows that go on from it.

        Raises:
            ValueError: more tokens than there are learned positions.
        """
        given = (input_ids_bs, positions_bs, documents_bs, cache, gradient_checkpointing, shared_prefix)
        return self._hidden(*given) if self.virtual is None else self.virtual(self._hidden, *given)

    def _hidden(
        self,
        input_ids_bs: Tensor,
        positions_bs: Tensor | None,
        documents_bs: Tensor | None,
        cache: KVCache | None,
        gradient_checkpointing: Checkpointing,
        shared_prefix: SharedPrefix | None,
        slots: Slots | None = None,
    ) -> Tensor:
        config, decoder = self.config, self.decoder
        past = cache.length if cache is not None else 0
        if positions_bs is None:
            positions_bs = torch.arange(past, past + input_ids_bs.shape[1], device=input_ids_bs.device).unsqueeze(0)
        documents_bt = documents_bs if cache is None else cache.add(input_ids_bs, documents_bs)
        attend = {
            window: self._attend(window, input_ids_bs, past, documents_bt, shared_prefix)
            for window in set(config.windows)
        }
        x_bsd = self._embed(input_ids_bs, positions_bs, slots)
        rotations = self._rotations(positions_bs, x_bsd.dtype)
        for index, block in enumerate(decoder.layers):
            window = config.windows[index]
            layer_cache = cache.layers[index] if cache is not None and not gradient_checkpointing else None
            if slots is not None:
                layer_cache = slots.through(index, layer_cache)
            run = partial(block, rotation=rotations[window is not None], attend=attend[window], cache=layer_cache)
            if gradient_checkpointing:
                kept = _selective if gradient_checkpointing == "selective" else noop_context_fn
                x_bsd = checkpoint(run, x_bsd, use_reentrant=False, context_fn=kept)
            else:
                x_bsd = run(x_bsd)
        x_bsd = decoder.final_norm(x_bsd) if decoder.final_norm is not None else x_bsd
        return decoder.project_out(x_bsd) if decoder.project_out is not None else x_bsd

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary [..., v] for final hidden states [..., d], in their dtype; capped for Gemma 2."""
        scores, cap = self.lm_head(hidden), self.config.logit_softcap
        return (scores / cap).tanh() * cap if cap else scores

    def forward(
        self, input_ids_bs: Tensor, positions_bs: Tensor | None = None, documents_bs: Tensor | None = None
    ) -> Tensor:
        """Logits [b, s, v] in the activation dtype. Arguments as `hidden`."""
        return self.logits(self.hidden(input_ids_bs, positions_bs, documents_bs))

    def _attend(
        self,
        window: int | None,
        input_ids_bs: Tensor,
        past: int,
        documents_bt: Tensor | None,
        shared_prefix: SharedPrefix | None,
    ) -> QKV:
        """Attention with everything but q, k and v decided, for the layers with this window."""
        config, s, device = self.config, input_ids_bs.shape[1], input_ids_bs.device
        scores = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        if shared_prefix is not None:
            return partial(after_prefix, self.attention, shared_prefix, shared_prefix.slots(device), window, **scores)
        if documents_bt is not None:
            visible = Visible.of_documents(documents_bt, s, window)
        elif window is not None and past + s > window:
            visible = Visible.within(s, past + s, window, device)
        else:
            visible = None
        return partial(self.attention, visible=visible, **scores)

    def embed_words(self, input_ids: Tensor) -> Tensor:
        """Embeddings of token ids [...] as the first layer's input is made of them, [..., embedding_size]."""
        x = self.decoder.embed_tokens(input_ids)
        if self.config.family.scaled_embedding:
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)
        return x

    def _embed(self, input_ids_bs: Tensor, positions_bs: Tensor, slots: Slots | None) -> Tensor:
        config, decoder = self.config, self.decoder
        x_bsd = self.embed_words(input_ids_bs)
        if slots is not None:
            x_bsd = slots.embed(x_bsd)
        if decoder.project_in is not None:
            x_bsd = decoder.project_in(x_bsd)
        if config.family.learned is None:
            return x_bsd
        if int(positions_bs.max()) >= config.max_position_embeddings:
            raise ValueError(
                f"position {int(positions_bs.max())} is beyond the {config.max_position_embeddings} positions that "
                f"{self.name or config.model_type} has learned; shorten the text"
            )
        return x_bsd + decoder.embed_positions(positions_bs + config.family.learned)

    def _rotations(self, positions_bs: Tensor, dtype: torch.dtype) -> tuple[Rotation | None, Rotation | None]:
        """Rotations of the layers without and with a window; they may turn at different speeds (Gemma 3).

        Computed anew for every call (a few microseconds): a buffer would follow `.to(bfloat16)` and lose its digits.
        """
        config = self.config
        if not any(config.rotary):
            return None, None
        everywhere = rotation(config.rope, config.head_dim, positions_bs, dtype)
        if config.local_rope is None:
            return everywhere, everywhere
        return everywhere, rotation(config.local_rope, config.head_dim, positions_bs, dtype)


def _selective() -> tuple:
    """Save the results of linear layers and fused attention; compute the rest again (eager attention is part of it: its
    scores are what fills the memory)."""
    aten, own = torch.ops.aten, torch.ops.minift
    saved = {
        aten.mm.default, aten.addmm.default, own.matmul_4bit.default, own.flash_attention.default,
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }  # fmt: skip

    def policy(_context: object, operator: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
