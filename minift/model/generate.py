"""Generating text: read the prompt once, then one token at a time.

The prompt fills the key/value cache in one pass (prefill); after that each step feeds only the newest token of each
row. Prompts of different lengths are padded on the left, so that all rows end, and go on, in the same column:

    . . a b c | x        positions of padding do not matter: its document number -1 hides it from every other token
    d e f g h | y

Greedy decoding takes the most likely token. Sampling draws from the distribution after dividing the logits by the
temperature and keeping the most likely tokens that together reach `top_p` (nucleus sampling, arXiv 1904.09751).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from minift.model.cache import KVCache
from minift.model.decoder import CausalLM


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer here (minift.data.tokenizer.Tokenizer has it)."""

    eos_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...
    def apply_chat_template(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str: ...


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must not be negative, infinite or NaN, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


@torch.no_grad()
def generate_tokens(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
) -> Iterator[Tensor]:
    """Yield the next token of every row, int64 [b], until all rows have stopped or `max_new_tokens` are out.

    A row that has produced one of `stop_ids` goes on yielding that token.

    Raises:
        ValueError: an empty prompt, or prompt and new tokens exceed the model's context.
    """
    longest = max(map(len, prompts))
    context = model.config.max_position_embeddings
    if min(map(len, prompts)) == 0:
        raise ValueError("cannot generate from an empty prompt")
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {context}"
        )
    device = model.device
    pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device).unsqueeze(1)
    input_ids_bs = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    slots = torch.arange(longest, device=device)
    documents_bs = torch.where(slots < pads, -1, 0)
    positions_bs = (slots - pads).clamp(min=0)
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, model.dtype, device)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    stops = torch.tensor(list(stop_ids), device=device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    token = input_ids_bs[:, -1]
    for _ in range(max_new_tokens):
        hidden_bsd = model.hidden(input_ids_bs, positions_bs, documents_bs, cache)
        chosen = _choose(model.lm_head(hidden_bsd[:, -1]), sampling, generator)
        token = torch.where(stopped, token, chosen)
        yield token
        stopped |= torch.isin(token, stops)
        if stopped.all():
            return
        input_ids_bs, positions_bs = token.unsqueeze(1), positions_bs[:, -1:] + 1
        documents_bs = torch.zeros_like(input_ids_bs)


def _choose(logits_bv: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    if sampling.temperature == 0:
        return logits_bv.argmax(dim=-1)
    probability, order = (logits_bv.float() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
    # The first token always stays: it is kept if those before it have not reached top_p, and none are before it.
    probability[probability.cumsum(-1) - probability >= sampling.top_p] = 0.0
    drawn = torch.multinomial(probability, 1, generator=generator)
    return order.gather(1, drawn).squeeze(1)


def generate_batch(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    conversations: Sequence[Sequence[dict[str, Any]]],
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """The assistant's answer to each conversation, generated side by side."""
    prompts = [_prompt(tokenizer, messages) for messages in conversations]
    stops = _stops(model, tokenizer)
    tokens = list(generate_tokens(model, prompts, max_new_tokens, stops, sampling))
    if not tokens:
        return ["" for _ in prompts]
    answers = []
    for row in torch.stack(tokens, dim=1).tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        answers.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return answers


def generate(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
) -> str:
    """The assistant's answer to a conversation."""
    return generate_batch(model, tokenizer, [messages], max_new_tokens, sampling)[0]


def stream(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    max_new_tokens: int = 512,
    sampling: Sampling = GREEDY,
) -> Iterator[str]:
    """The assistant's answer, piece by piece as it is generated."""
    ids: list[int] = []
    shown = ""
    stops = _stops(model, tokenizer)
    for token in generate_tokens(model, [_prompt(tokenizer, messages)], max_new_tokens, stops, sampling):
        if token.item() in stops:
            break
        ids.append(int(token))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for its other bytes
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]
    if rest:
        yield rest


def _prompt(tokenizer: ChatTokenizer, messages: Sequence[dict[str, Any]]) -> list[int]:
    return tokenizer.encode(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True), add_special_tokens=False
    )


def _stops(model: CausalLM, tokenizer: ChatTokenizer) -> set[int]:
    return set(model.config.eos_token_ids) | ({tokenizer.eos_id} if tokenizer.eos_id is not None else set())
