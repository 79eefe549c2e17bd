"""Prompt tuning: learn the embeddings of n tokens that are in no vocabulary.

    embeddings    p_1 ... p_n | E[the] E[text] ...          p: n * d trained numbers; E and all else: frozen

The fewest parameters of all methods (20 tokens of SmolLM2-135M: 11,520), and the least power: everything it says goes
through the same channel as the text. The paper finds it behind full fine-tuning below a billion parameters and as good
above ten. It wants a large learning rate (0.3 with Adafactor in the paper) and many steps.

Where it starts matters for small models:

    random          normal with deviation 1: far from every word, whose embeddings are usually much shorter
    sample_vocab    embeddings of random words
    text            embeddings of a text's tokens, repeated or cut to n: say what the task is

The prompt stands for what the first block gets in a word's place: Gemma multiplies embeddings by sqrt(d), and not
these; in opt-350m, with narrow embeddings, they are narrow, too, and are projected with the words. Learned positions
are added to them.

A file holds the trained numbers only. Of a beginning from a text it says RANDOM, since what PEFT calls TEXT wants the
name of a tokenizer.

Sources: arXiv 2104.08691; PEFT `tuners/prompt_tuning/model.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minift.adapters.virtual import Layout, Table, VirtualMethod
from minift.model.cache import LayerCache
from minift.model.decoder import CausalLM, Slots

INITS = {"random": "RANDOM", "sample_vocab": "SAMPLE_VOCAB", "text": "TEXT"}  # ours -> PEFT's


@dataclass(frozen=True)
class EmbeddedSlots:
    """Slots with embeddings of their own; their keys and values come out of the model.

    Attributes:
        layout: where they are.
        values_nd: their embeddings, fp32.
    """

    layout: Layout
    values_nd: Tensor

    def embed(self, x_bsd: Tensor) -> Tensor:
        return self.layout.fill(x_bsd, self.values_nd)

    def through(self, layer: int, cache: LayerCache | None) -> LayerCache | None:
        return cache


@dataclass(frozen=True)
class EmbeddedMethod(VirtualMethod):
    """What the two methods have in common whose slots have embeddings."""

    def slots(self, model: CausalLM) -> Callable[[Layout, Tensor], Slots]:
        return EmbeddedSlots

    def token_shape(self, model: CausalLM) -> tuple[int, int]:
        return model.config.num_attention_heads, model.config.embedding_size

    def add(self, model: CausalLM) -> None:
        embedding = model.decoder.embed_tokens
        if not isinstance(embedding, nn.Embedding):
            raise ValueError(
                f"{self.name} puts its tokens among the embeddings, and those of this model are a "
                f"{type(embedding).__name__}; load the model with embeddings that are not quantized"
            )
        super().add(model)


@dataclass(frozen=True)
class PromptTuningConfig(EmbeddedMethod):
    """Settings of prompt tuning.

    Attributes:
        init: "random", "sample_vocab" or "text".
        init_ids: the text's token ids, `tokenizer.encode(text)`, for init "text".
    """

    init: str = "random"
    init_ids: tuple[int, ...] = ()

    name: ClassVar[str] = "prompt-tuning"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    settings: ClassVar[tuple[str, ...]] = (
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in INITS:
            raise ValueError(f"prompt tuning init {self.init!r}: choose one of {', '.join(INITS)}")
        if (self.init == "text") != bool(self.init_ids):
            raise ValueError("prompt tuning: init 'text' and init_ids, the text's token ids, need each other")
        object.__setattr__(self, "init_ids", tuple(self.init_ids))

    def encoder(self, model: CausalLM) -> nn.Module:
        n = self.num_virtual_tokens
        # PEFT draws these in any case, so the words of sample_vocab are drawn after them.
        values_nd = torch.randn(n, model.config.embedding_size, device="cpu")
        if self.init == "random":
            return Table(values_nd)
        words = model.config.vocab_size
        if self.init == "sample_vocab":
            return Table(_embeddings(model, torch.randint(0, words, (n,), device="cpu")))
        strange = [token for token in self.init_ids if not 0 <= token < words]
        if strange:
            raise ValueError(f"prompt tuning init_ids: there is no token {strange[0]} in a vocabulary of {words}")
        repeated = self.init_ids * -(-n // len(self.init_ids))
        return Table(_embeddings(model, torch.tensor(repeated[:n])))

    def to_file(self, model: CausalLM) -> dict[str, Any]:
        return super().to_file(model) | {
            "prompt_tuning_init": INITS[self.init] if self.init != "text" else INITS["random"],
            "prompt_tuning_init_text": None,
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": None,
        }

    @classmethod
    def of_file(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        cls.check_file(content)
        # The values are in the file, so what they began as is of no matter, and the text's ids are not there.
        sampled = content.get("prompt_tuning_init") == INITS["sample_vocab"]
        return cls(content["num_virtual_tokens"], "sample_vocab" if sampled else "random")


@torch.no_grad()
def _embeddings(model: CausalLM, ids_n: Tensor) -> Tensor:
    """What the first block gets for these words, fp32 [n, d]."""
    return model.embed_words(ids_n.to(model.device)).float()
