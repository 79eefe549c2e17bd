"""Generating text: read the prompt once, then one token at a time.

The prompt fills the key/value cache in one pass (prefill); after that each step feeds only the newest token of each
row. Prompts of different lengths are padded on the left, so that all rows end, and go on, in the same column:

    . . a b c | x        positions of padding do not matter: its document number -1 hides it from every other token
    d e f g h | y

Virtual tokens (adapters/virtual.py) get into the cache with the prompt, between padding and text, and take room there.

How the next token is chosen from the logits: sampling.py.

Phi-3's longrope turns all keys at another speed as soon as the text is longer than the model was first trained on (see
rope.py). Those in the cache are then wrong, so at that token everything is read once more.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from minift.model.cache import KVCache
from minift.model.decoder import CausalLM
from minift.model.sampling import GREEDY, Chooser, Sampling

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no whole character are decoded to


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer here (minift.data.tokenizer.Tokenizer has it)."""

    eos_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...
    def apply_chat_template(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str: ...


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
        ValueError: an empty prompt, a token without embedding, or prompt and new tokens exceed the model's context.
    """
    longest, context = max(map(len, prompts)), model.config.max_position_embeddings
    virtual = model.virtual_tokens
    if min(map(len, prompts)) == 0:
        raise ValueError("cannot generate from an empty prompt")
    highest, rows = max(map(max, prompts)), model.config.vocab_size
    if highest >= rows:
        raise ValueError(f"token {highest} of a prompt has no row in the embedding of {rows}: call resize_embeddings")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if virtual + longest + max_new_tokens > context:
        count = f"{longest} tokens{f', {virtual} virtual ones' if virtual else ''}"
        raise ValueError(f"a prompt of {count} and {max_new_tokens} new ones exceed the model's context of {context}")
    device, rope = model.device, model.config.rope
    restart = rope["original_max_position_embeddings"] + 1 - longest - virtual if rope["rope_type"] == "longrope" else 0
    choose = Chooser(sampling, prompts, device)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    for step in range(max_new_tokens):
        if step == 0 or step == restart:
            cache = KVCache(model.config, len(prompts), virtual + longest + max_new_tokens, model.dtype, device)
            input_ids_bs, positions_bs, documents_bs = _padded_left(prompts, tokens, device)
        else:
            input_ids_bs, positions_bs = tokens[-1].unsqueeze(1), positions_bs[:, -1:] + 1
            documents_bs = None if documents_bs is None else torch.zeros_like(input_ids_bs)
        chosen = choose(model.logits(model.hidden(input_ids_bs, positions_bs, documents_bs, cache)[:, -1]))
        token = torch.where(stopped, tokens[-1], chosen) if tokens else chosen
        tokens.append(token)
        stopped = stopped | (token.unsqueeze(1) == stops).any(dim=1)
        # Computed before the token goes out: whoever reads that waits for the GPU, and need not wait again for this.
        finished = stopped.all()
        yield token
        if len(stops) and finished:
            return


def _padded_left(
    prompts: Sequence[Sequence[int]], tokens: Sequence[Tensor], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, positions and documents of prompts and the tokens after them, each [b, s]; documents only with padding."""
    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    prompt_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    input_ids_bs = torch.cat([prompt_ids, *(token.unsqueeze(1) for token in tokens)], dim=1)
    pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device).unsqueeze(1)
    slots = torch.arange(input_ids_bs.shape[1], device=device)
    documents_bs = torch.where(slots < pads, -1, 0) if shortest < longest else None
    return input_ids_bs, (slots - pads).clamp(min=0), documents_bs


def generate_batch(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    conversations: Sequence[Sequence[dict[str, Any]]],
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
) -> list[str]:
    """The assistant's answer to each conversation, generated side by side.

    Args:
        model, tokenizer: of the same checkpoint.
        conversations: messages, each with "role" and "content".
        max_new_tokens: the longest answer.
        sampling: how to choose tokens; None is as the checkpoint's generation_config.json says.

    Raises:
        ValueError: a prompt that leaves no room for the answer, or settings in generation_config.json that are not
            supported.
    """
    sampling = sampling or Sampling.of(model.config)
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
    sampling: Sampling | None = None,
) -> str:
    """The assistant's answer to a conversation. Arguments and errors as `generate_batch`."""
    return generate_batch(model, tokenizer, [messages], max_new_tokens, sampling)[0]


def stream(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
) -> Iterator[str]:
    """The assistant's answer, piece by piece as it is generated. Arguments and errors as `generate_batch`.

    A token may be part of a character, so a piece is held back until it ends with a whole one. In each step the newest
    tokens are decoded together with the piece before them, not alone and not with everything: some tokenizers drop the
    space in front of what they decode, and the time would grow with the text.
    """
    sampling = sampling or Sampling.of(model.config)
    stops = _stops(model, tokenizer)
    ids: list[int] = []
    begin = shown = 0  # the piece before is ids[begin:shown]

    def news() -> str:
        before = tokenizer.decode(ids[begin:shown], skip_special_tokens=True)
        return tokenizer.decode(ids[begin:], skip_special_tokens=True)[len(before) :]

    for token in generate_tokens(model, [_prompt(tokenizer, messages)], max_new_tokens, stops, sampling):
        if token.item() in stops:
            break
        ids.append(int(token))
        piece = news()
        if piece and not piece.endswith(REPLACEMENT):
            yield piece
            begin, shown = shown, len(ids)
    rest = news()
    if rest:
        yield rest


def _prompt(tokenizer: ChatTokenizer, messages: Sequence[dict[str, Any]]) -> list[int]:
    return tokenizer.encode(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True), add_special_tokens=False
    )


def _stops(model: CausalLM, tokenizer: ChatTokenizer) -> set[int]:
    return set(model.config.eos_token_ids) | ({tokenizer.eos_id} if tokenizer.eos_id is not None else set())
