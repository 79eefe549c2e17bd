"""What happens to one row on its way through the library, recorded: the numbers that a trace shows (trace.py).

    encode -> pack -> trained_rows, head_loss -> backward -> train_step (AdamW8bit, paged) x steps -> generate_tokens

Nothing is computed a second time in another way: each number is a result of the functions that a run calls, seen at the
moment when it is there (the steps: steps.py).

Dropout is off, so that two looks at the same weights see the same numbers; trained parameters, gradients and the mode
of the model are put back at the end.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from minift.adapters.inject import lora_layers
from minift.adapters.lora import LoraLinear
from minift.data.collate import Batch, flatten
from minift.data.drafts import RowError
from minift.data.encode import IGNORE, Example, encode
from minift.data.formats import Row
from minift.data.packing import Layout, lay_out
from minift.data.tokenizer import Tokenizer
from minift.model.decoder import CausalLM
from minift.model.generate import generate_tokens
from minift.optim.adamw8bit import MIN_8BIT_SIZE
from minift.study.trace.steps import Matrix, Pair, Report, StepLook, paged_optimizer, take_steps
from minift.train.config import TrainConfig
from minift.train.step import head_loss, head_pieces, trained_rows

NEIGHBOURS = 8  # rows that are packed, the traced one among them
TOP = 5
LONGEST_ANSWER = 64  # tokens


@dataclass(frozen=True)
class Prediction:
    """What the model expects at one trained token.

    Attributes:
        column: of the token in its row; it is predicted from the one before.
        token: its id.
        loss: -log of its probability, in nats.
        probability: of the token.
        rank: 1 if no other token is likelier.
        top: the likeliest tokens and their probabilities.
    """

    column: int
    token: int
    loss: float
    probability: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Packed:
    """The row among others.

    Attributes:
        numbers: which rows were packed, counted from 0, in the order of the layout's documents.
        layout: where each of them lies.
        pack: number of the packed row that holds the traced one.
        batch: that packed row.
        document: number of the traced row within it.
        start, stop: its columns.
        difference: largest difference between a token's loss here and alone.
        unmasked: the same if the documents in front of it could be seen.
    """

    numbers: list[int]
    layout: Layout
    pack: int
    batch: Batch
    document: int
    start: int
    stop: int
    difference: float
    unmasked: float


@dataclass(frozen=True)
class Followed:
    """Everything that a trace shows, as numbers.

    Attributes:
        row, number: the row, and its number, counted from 0.
        layer: path of the layer whose A and B are looked at.
        before, after: a prediction for each trained token, around all steps.
        prompt: how many of the example's tokens the answers go on from.
        answers: what the model generates from there before and after, and how many tokens it may.
        page_bytes: size of a page of optimizer state; 0 without.
    """

    row: Row
    number: int
    example: Example
    packed: Packed
    layer: str
    a: Matrix
    b: Matrix
    steps: list[StepLook]
    before: list[Prediction]
    after: list[Prediction]
    prompt: int
    answers: tuple[str, str]
    longest_answer: int
    page_bytes: int


def follow(
    model: CausalLM, tokenizer: Tokenizer, rows: Sequence[Row], row: int, config: TrainConfig, steps: int, layer: str,
    report: Report,
) -> Followed:  # fmt: skip
    """Take the row through everything; arguments and errors as `minift.study.trace.trace`."""
    if not 0 <= row < len(rows):
        raise ValueError(f"no row {row}: the data hold {len(rows)} rows, counted from 0")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    path, matrices = _looked_at(model, layer)
    report("encoding")
    example = encode(tokenizer, rows[row], config.loss_on, config.max_length, f"row {row + 1}")
    batch = flatten([example]).to(model.device)
    prompt = _prompt(example)
    stops = set(model.config.eos_token_ids) | ({tokenizer.eos_id} if tokenizer.eos_id is not None else set())
    room = model.config.max_position_embeddings - prompt
    longest = max(0, min(2 * (len(example) - prompt) + 8, LONGEST_ANSWER, room))

    def answer() -> str:
        tokens = [int(t) for t in generate_tokens(model, [example.input_ids[:prompt]], longest, stops)]
        return tokenizer.decode([token for token in tokens if token not in stops], skip_special_tokens=True)

    with _put_back(model):
        before = predictions(model, batch)
        packed = _pack(model, tokenizer, rows, row, example, before, config)
        report("answering before")
        first_answer = answer()
        optimizer = paged_optimizer(model, config)
        a, b, looks = take_steps(model, batch, optimizer, matrices, config, steps, report)
        report("answering after")
        answers = first_answer, answer()
        after = predictions(model, batch)
    page_bytes = optimizer.pool.page_bytes if optimizer.pool is not None else 0
    return Followed(
        rows[row], row, example, packed, path, a, b, looks, before, after, prompt, answers, longest, page_bytes
    )


@torch.no_grad()
def predictions(model: CausalLM, batch: Batch) -> list[Prediction]:
    """What the model expects at every trained token of a batch of one row."""
    columns = ((batch.labels_bs[0, 1:] != IGNORE).nonzero().flatten() + 1).tolist()
    found: list[Prediction] = []
    for hidden_nd, target_n in head_pieces(model, *trained_rows(model, batch)):
        logits_nv = model.logits(hidden_nd)
        p_nv = logits_nv.float().softmax(-1)
        top = p_nv.topk(min(TOP, p_nv.shape[1]))
        for i, token in enumerate(target_n.tolist()):
            loss = head_loss(lambda logits: logits, logits_nv[i : i + 1], target_n[i : i + 1])
            best = list(zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True))
            rank = int((p_nv[i] > p_nv[i, token]).sum()) + 1
            found.append(Prediction(columns[len(found)], token, loss.item(), p_nv[i, token].item(), rank, best))
    return found


def _prompt(example: Example) -> int:
    """Tokens in front of the last trained range; at least one, since nothing follows from nothing."""
    start = max(column for column, label in enumerate(example.labels) if label != IGNORE)
    while start > 1 and example.labels[start - 1] != IGNORE:
        start -= 1
    return start


def _looked_at(model: CausalLM, layer: str) -> tuple[str, Pair]:
    """Path, A and B of a trained LoRA layer: the one asked for, or the last that is large enough for 8 bits."""
    found = {path: pair for path, place in lora_layers(model).items() if (pair := _trained(place))}
    if not found:
        raise ValueError("a trace looks at A and B of a trained LoRA, and the model has none: call add_lora first")
    if layer and layer not in found:
        raise ValueError(f"no trained LoRA at {layer!r}; the layers that have one end with {[*found][-1]!r}")
    large = [path for path, pair in found.items() if min(p.numel() for p in pair) >= MIN_8BIT_SIZE]
    path = layer or (large or [*found])[-1]
    return path, found[path]


def _trained(place: LoraLinear) -> Pair | None:
    pairs = [place.matrices(adapter) for adapter in place.active]
    return next((pair for pair in pairs if all(p.requires_grad for p in pair)), None)


@contextmanager
def _put_back(model: CausalLM) -> Iterator[None]:
    """Dropout off; afterwards everything that was trained is as before."""
    was_training = model.training
    kept = [(p, p.detach().clone(), p.grad) for p in model.parameters() if p.requires_grad]
    for p, _, _ in kept:
        p.grad = None
    model.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value, grad in kept:
                p.copy_(value)
                p.grad = grad
        model.train(was_training)


def _pack(
    model: CausalLM, tokenizer: Tokenizer, rows: Sequence[Row], row: int, example: Example, alone: list[Prediction],
    config: TrainConfig,
) -> Packed:  # fmt: skip
    """The row and those around it in packs four of the longest long; rows that cannot be trained on are left out."""
    first = max(0, min(row - 1, len(rows) - NEIGHBOURS))
    examples: dict[int, Example] = {}
    for number in range(first, min(first + NEIGHBOURS, len(rows))):
        try:
            examples[number] = encode(tokenizer, rows[number], config.loss_on, config.max_length, f"row {number + 1}")
        except RowError:
            continue
    numbers, documents = [*examples], [*examples.values()]
    lengths = [len(document) for document in documents]
    layout = lay_out(lengths, min(config.max_length, 4 * max(lengths)))
    ours = int((layout.document_p == numbers.index(row)).nonzero()[0][0])
    pack = next(r for r in range(len(layout)) if layout.bounds_r[r] <= ours < layout.bounds_r[r + 1])
    batch, document = layout.row(documents, pack), ours - int(layout.bounds_r[pack])
    (places,) = (batch.documents_bs[0] == document).nonzero(as_tuple=True)
    start = int(places[0])
    together = batch.to(model.device)
    positions_bs = torch.arange(batch.input_ids_bs.shape[1], device=model.device)[None]
    torn = replace(together, documents_bs=torch.zeros_like(together.documents_bs), positions_bs=positions_bs)

    def difference(batch: Batch) -> float:
        losses = {p.column - start: p.loss for p in predictions(model, batch)}
        return max(abs(p.loss - losses[p.column]) for p in alone)

    return Packed(
        numbers, layout, pack, batch, document, start, start + len(example), difference(together), difference(torn)
    )
