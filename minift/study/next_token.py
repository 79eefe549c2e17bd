"""What a language model does, one token at a time: guess the next, go on, and what each guess costs.

A model of any kind, base or instruct, computes one thing: from the tokens so far, a probability for every token of the
vocabulary to come next.

    text so far        ->  next token      p              label      cost in nats (SmolLM2-135M-Instruct)
    Once upon a        ->  time            0.15           time       -log 0.15 = 1.9
    Once upon a time   ->  ,               0.93           in         -log 0.015 = 4.2

Picking a token, appending it and asking again is generation; the mean cost over the tokens that have a label is the
loss. An instruct model differs in its weights only: it was trained on text in which every answer stands behind the same
few marks, so behind these marks it answers.

Left out: sampling (model/sampling.py); here the likeliest token is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minift.data.collate import collate
from minift.data.encode import Example, encode
from minift.data.formats import Row
from minift.data.tokenizer import Tokenizer
from minift.model.decoder import CausalLM
from minift.model.generate import generate_tokens
from minift.study.show import show_example
from minift.train.step import trained_rows

SHORT_ANSWERS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Say hello.", "Hello! How can I help you today?"),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("What is two plus two?", "Two plus two is four."),
    ("What colour is the sky on a clear day?", "The sky is blue on a clear day."),
    ("What do bees make?", "Bees make honey."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("Name a fruit that is yellow.", "A banana is a yellow fruit."),
)


@dataclass(frozen=True)
class Guess:
    """A token that may come next. `text` shows spaces and line breaks, and control tokens in «», as show.py does."""

    text: str
    id: int
    probability: float


@dataclass(frozen=True)
class Cost:
    """A trained token, and -log p of it in nats."""

    text: str
    id: int
    nats: float


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """How tokens look: ` Paris` is ·Paris, a line break ↵, an end-of-turn token «<|im_end|>»."""
    ((part,),) = [row.parts for row in show_example(tokenizer, Example([*ids], [-100] * len(ids))).rows]
    return [f"«{token.text}»" if token.is_control else token.text for token in part.tokens]


@torch.no_grad()
def next_tokens(model: CausalLM, tokenizer: Tokenizer, text: str, count: int = 5) -> list[Guess]:
    """The likeliest tokens to come next, likeliest first.

    Args:
        text: encoded as it stands: control tokens that it spells are control tokens, nothing is put around it.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    logits_v = model(torch.tensor([ids], device=model.device))[0, -1].float()
    found = logits_v.softmax(-1).topk(count)
    names = spell(tokenizer, found.indices.tolist())
    return [Guess(*row) for row in zip(names, found.indices.tolist(), found.values.tolist(), strict=True)]


def go_on(model: CausalLM, tokenizer: Tokenizer, text: str, max_new_tokens: int = 24) -> str:
    """The text that the model puts behind `text`, its control tokens included, up to the first end-of-text token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = generate_tokens(model, [ids], max_new_tokens, model.config.eos_token_ids)
    return tokenizer.decode([int(token) for token in tokens])


@torch.no_grad()
def token_costs(model: CausalLM, tokenizer: Tokenizer, example: Example) -> list[Cost]:
    """What each trained token of a document costs; their mean is its loss."""
    hidden_nd, target_n = trained_rows(model, collate([example], 0).to(model.device))
    nats = F.cross_entropy(model.logits(hidden_nd).float(), target_n, reduction="none").tolist()
    ids = target_n.tolist()
    return [Cost(*row) for row in zip(spell(tokenizer, ids), ids, nats, strict=True)]


def format_costs(costs: Sequence[Cost]) -> str:
    """A line for each token, and the mean."""
    if not costs:
        raise ValueError("no token is trained, so there is no cost")
    rows = [(cost.text, f"{math.exp(-cost.nats):.3f}", f"{cost.nats:.2f}") for cost in costs]
    rows.append(("mean = loss", "", f"{_mean([cost.nats for cost in costs]):.2f}"))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}  {p:>6}  {nats:>6}" for name, p, nats in [("token", "p", "-log p"), *rows])


@dataclass(frozen=True)
class AnswerCosts:
    """Mean costs over some rows, in nats: of all trained tokens, of each answer's first, of the token that ends it."""

    loss: float
    first: float
    end: float


def short_answers() -> list[Row]:
    """Eight questions with a short right answer, as rows of messages."""
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in SHORT_ANSWERS
    ]


def answer_costs(model: CausalLM, tokenizer: Tokenizer, rows: Sequence[Row]) -> AnswerCosts:
    """Where the loss of answers comes from.

    Raises:
        ValueError: a row without a token to train on, or an answer that no control token ends.
    """
    controls = set(tokenizer.controls.ids.values())
    found = [token_costs(model, tokenizer, encode(tokenizer, row)) for row in rows]
    ends = [[cost.nats for cost in costs if cost.id in controls][-1:] for costs in found]
    if not all(ends):
        raise ValueError(
            "no control token ends the answers, so the model would not learn to stop; use another template"
        )
    words = [cost.nats for costs in found for cost in costs]
    return AnswerCosts(_mean(words), _mean([costs[0].nats for costs in found]), _mean([end for (end,) in ends]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
