"""Virtual tokens: a few columns of trained numbers in front of every document, while the model stays as it is.

    v v v | the text ...        v: no word's embedding, but numbers that gradient descent has found

A good prompt changes what a model does; here the prompt is learned. Its tokens need not be words, so it may lie where
no sentence can. Three ways, from the fewest parameters to the most, for n virtual tokens and a model of width d with L
layers of g key/value heads of e numbers:

    prompt tuning    prompt.py     their embeddings                              n * d
    P-tuning         ptuning.py    their embeddings, computed by a small net     the net's; saved as n * d
    prefix tuning    prefix.py     their keys and values in every layer          n * L * 2 * g * e

The weights are neither changed nor copied, so one model in memory serves as many tasks as there are prompts, and there
is nothing to merge. The price: n tokens of the context, n / s more time for texts of s tokens, and 2 L g e numbers of
key/value cache for each virtual token, in every row.

How they get in. Every document of a row gets n *slots* in front of its first token. A slot is a token like any other:
it has a position (its document moves on by n) and its document's number; so padding, packing, shared prefixes, windows
and the cache need to know nothing of slots:

    ids         a b c d e f            . . a b c . . d e f          . is a slot; n = 2
    positions   0 1 2 0 1 2            0 1 2 3 4 0 1 2 3 4
    documents   0 0 0 1 1 1            0 0 0 0 0 1 1 1 1 1

What is computed for the words is picked out at the end, so nobody outside sees a slot: hidden states, labels and losses
have the shapes that they have without. Rows of fewer documents than others are filled up in front, since in generation
all rows must end in the same column. In layers with a window slots are counted as tokens, and fall out of it in time.

Left out: PEFT feeds the virtual tokens of prompt tuning in front of padding on the left, and turns the text by that
much further; here each row has the numbers that it has alone. PEFT's loss also counts the first word, which the last
slot predicts, if its label is not masked; here it is never counted (train/step.py).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.adapters.method import Method, check_settings
from minift.model.attention import SharedPrefix
from minift.model.cache import KVCache
from minift.model.decoder import CausalLM, Checkpointing, Slots

KEY = "prompt_embeddings"  # the only one in a file
COMMON_SETTINGS = (
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """An input of b rows of s words, laid out with slots: t columns.

    Attributes:
        input_ids_bt, positions_bt, documents_bt: the new input; a slot's id is 0, and documents may be None, as before.
        slots_m: where slots are, counted through all rows, one document's n after the other's.
        words_m: where words are, in order.
    """

    input_ids_bt: Tensor
    positions_bt: Tensor
    documents_bt: Tensor | None
    slots_m: Tensor
    words_m: Tensor

    def fill(self, x_btd: Tensor, values_nd: Tensor) -> Tensor:
        """x with one value for each slot of a document, the same for all documents, in the dtype of x."""
        count = len(self.slots_m) // len(values_nd)
        # Repeated before it is cast: the gradients of the documents are added up in the dtype of the values, fp32.
        values_md = values_nd.repeat(count, *[1] * (values_nd.dim() - 1)).to(x_btd.dtype)
        return x_btd.flatten(0, 1).index_copy(0, self.slots_m, values_md).unflatten(0, x_btd.shape[:2])

    def words(self, x_btd: Tensor) -> Tensor:
        """What belongs to words, [b, s, d]."""
        return x_btd.flatten(0, 1).index_select(0, self.words_m).unflatten(0, (len(x_btd), -1))


def lay_out(n: int, input_ids_bs: Tensor, positions_bs: Tensor | None, documents_bs: Tensor | None) -> Layout:
    """Put n slots in front of every document: every run of one number, but not of -1, which is padding.

    Args:
        positions_bs: None counts each row from 0.
        documents_bs: None is one document a row, which begins with the row.
    """
    (b, s), device = input_ids_bs.shape, input_ids_bs.device
    slots_n, rows_b1 = torch.arange(n, device=device), torch.arange(b, device=device).unsqueeze(1)
    if positions_bs is None:
        positions_bs = torch.arange(s, device=device).unsqueeze(0)
    positions_bs = positions_bs.expand(b, s)
    if documents_bs is None:
        begins_bs = (torch.arange(s, device=device) == 0).expand(b, s)
    else:
        begins_bs = F.pad(documents_bs[:, 1:] != documents_bs[:, :-1], (1, 0), value=True) & (documents_bs >= 0)
    before_bs = begins_bs.cumsum(1)  # documents that have begun
    count_b1 = before_bs[:, -1:]
    most = int(count_b1.max())
    t = s + n * most
    words_bs = torch.arange(s, device=device) + n * (before_bs + most - count_b1) + t * rows_b1
    words_m, first_k1 = words_bs.flatten(), words_bs[begins_bs].unsqueeze(1)
    slots_m = (first_k1 - n + slots_n).flatten()

    def laid_out(words: Tensor, of_slots: Tensor, filler: int) -> Tensor:
        flat = words.new_full((b * t,), filler).index_copy(0, words_m, words.flatten())
        return flat.index_copy(0, slots_m, of_slots.expand(-1, n).flatten()).view(b, t)

    return Layout(
        laid_out(input_ids_bs, torch.zeros_like(first_k1), 0),
        laid_out(positions_bs + n, positions_bs[begins_bs].unsqueeze(1) + slots_n, 0),
        None if documents_bs is None else laid_out(documents_bs, documents_bs[begins_bs].unsqueeze(1), -1),
        slots_m,
        words_m,
    )


class VirtualTokens(nn.Module):
    """What a model holds as `virtual` (decoder.py).

    Args:
        tokens: how many in front of each document.
        encoder: computes what is to be learned, [tokens, ...], fp32.
        slots: puts that into a layout.
    """

    def __init__(self, tokens: int, encoder: nn.Module, slots: Callable[[Layout, Tensor], Slots]):
        super().__init__()
        self.tokens, self.encoder, self.slots = tokens, encoder, slots

    def forward(
        self,
        inner: Callable[..., Tensor],
        input_ids_bs: Tensor,
        positions_bs: Tensor | None,
        documents_bs: Tensor | None,
        cache: KVCache | None,
        gradient_checkpointing: Checkpointing,
        shared_prefix: SharedPrefix | None,
    ) -> Tensor:
        """The words' hidden states [b, s, d]. Words that follow others in a cache belong to their documents."""
        if cache is not None and cache.length:
            moved_bs = None if positions_bs is None else positions_bs + self.tokens
            return inner(input_ids_bs, moved_bs, documents_bs, cache, gradient_checkpointing, shared_prefix)
        layout = lay_out(self.tokens, input_ids_bs, positions_bs, documents_bs)
        if shared_prefix is not None:
            shared_prefix = replace(shared_prefix, length=shared_prefix.length + self.tokens)
        hidden_btd = inner(
            layout.input_ids_bt, layout.positions_bt, layout.documents_bt, cache, gradient_checkpointing, shared_prefix,
            self.slots(layout, self.encoder()),
        )  # fmt: skip
        return layout.words(hidden_btd)

    @torch.no_grad()
    def computed(self) -> Tensor:
        """What the encoder computes without its dropout, [tokens, ...]."""
        training = self.encoder.training
        try:
            return self.encoder.eval()()
        finally:
            self.encoder.train(training)


class Table(nn.Module):
    """An encoder that computes nothing: the values themselves are learned."""

    def __init__(self, values_nd: Tensor):
        super().__init__()
        self.prompt_embeddings = nn.Parameter(values_nd)

    def forward(self) -> Tensor:
        return self.prompt_embeddings


@dataclass(frozen=True)
class VirtualMethod(Method):
    """What the three ways have in common.

    Attributes:
        num_virtual_tokens: n, in front of every document; 20 to 100 are usual.
    """

    num_virtual_tokens: int = 20

    key_prefix: ClassVar[str] = ""
    settings: ClassVar[tuple[str, ...]] = ()  # in adapter_config.json, besides those that all three have

    def __post_init__(self) -> None:
        if not isinstance(self.num_virtual_tokens, int) or self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be at least 1, got {self.num_virtual_tokens!r}")

    @abstractmethod
    def encoder(self, model: CausalLM) -> nn.Module:
        """What computes the values, with initial values drawn on the CPU as PEFT draws them."""

    @abstractmethod
    def slots(self, model: CausalLM) -> Callable[[Layout, Tensor], Slots]:
        """What puts these values into a layout."""

    @abstractmethod
    def token_shape(self, model: CausalLM) -> tuple[int, int]:
        """Heads, and numbers of all of them together, as adapter_config.json has them."""

    def add(self, model: CausalLM) -> None:
        context = model.config.max_position_embeddings
        if self.num_virtual_tokens >= context:
            raise ValueError(
                f"{self.num_virtual_tokens} virtual tokens leave no room for text in a context of {context}; take fewer"
            )
        virtual = VirtualTokens(self.num_virtual_tokens, self.encoder(model), self.slots(model))
        model.virtual = virtual.to(model.device).train(model.training)

    def remove(self, model: CausalLM) -> None:
        model.virtual = None

    def tensors(self, model: CausalLM) -> dict[str, Tensor]:
        return {KEY: _virtual(model).computed()}

    def load(self, model: CausalLM, tensors: Mapping[str, Tensor]) -> None:
        """A file holds what was computed, not what computed it: that goes in, and training goes on with it alone."""
        values = tensors[KEY].to(model.device, torch.float32, copy=True)
        _virtual(model).encoder = Table(values)

    def to_file(self, model: CausalLM) -> dict[str, Any]:
        heads, width = self.token_shape(model)
        return {
            "modules_to_save": None,
            "num_attention_heads": heads,
            "num_layers": model.config.num_hidden_layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": width,
        }

    @classmethod
    def check_file(cls, content: Mapping[str, Any]) -> None:
        """Refuse settings that are not computed here."""
        check_settings(content, (*COMMON_SETTINGS, *cls.settings))
        if content.get("num_transformer_submodules") not in (1, None):
            raise ValueError("num_transformer_submodules=2 (an encoder with a decoder) is not supported")


def _virtual(model: CausalLM) -> VirtualTokens:
    assert isinstance(model.virtual, VirtualTokens)
    return model.virtual
