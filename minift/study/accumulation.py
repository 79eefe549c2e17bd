"""Gradient accumulation, right and wrong: the bug that transformers' Trainer had until the autumn of 2024.

A step of several micro-batches should lower the mean loss over all of its trained tokens. Dividing each micro-batch by
its own number of them, and the sum by the number of micro-batches, gives the mean of means:

    micro-batches    3 tokens, sum 9        11 tokens, sum 11       mean
    right            (9 + 11) / (3 + 11)                             1.43
    wrong            (9 / 3 + 11 / 11) / 2                           2.00

They agree only if all micro-batches hold equally many trained tokens. Otherwise a token of a short answer counts for
more than one of a long answer, and the same rows give another gradient as soon as they are divided differently: the
loss, which should not depend on how a step fits into memory, does.

`compare_accumulation` does both with the same model and rows, beside the truth, one batch of all rows.

Sources: transformers issue 34242 and pull request 34191; train/step.py is the right way.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.data.collate import Batch, collate
from minift.data.encode import Example
from minift.model.decoder import CausalLM
from minift.train.step import backward


@dataclass(frozen=True)
class Accumulated:
    """What one way of accumulating gives for a step.

    Attributes:
        name: of the way.
        loss: as that way reports it, in nats.
        grad_norm: Euclidean norm of all gradients.
        angle: between its gradient and that of one batch of all rows, in degrees.
        error: length of the difference of the two, relative to the length of the latter.
    """

    name: str
    loss: float
    grad_norm: float
    angle: float
    error: float


@dataclass(frozen=True)
class AccumulationStudy:
    """One batch, and the same rows in micro-batches, right and wrong; prints as a table."""

    trained_tokens: tuple[int, ...]
    ways: tuple[Accumulated, ...]

    def __str__(self) -> str:
        counts = ", ".join(map(str, self.trained_tokens))
        lines = [f"trained tokens of the micro-batches: {counts}", ""]
        lines.append(f"{'':<34}{'loss':>10}{'grad norm':>12}{'angle':>10}{'error':>10}")
        for way in self.ways:
            lines.append(f"{way.name:<34}{way.loss:>10.4f}{way.grad_norm:>12.4f}{way.angle:>9.2f}°{way.error:>10.1e}")
        return "\n".join(lines)


def compare_accumulation(
    model: CausalLM, examples: Sequence[Example], batch_size: int = 1, pad_id: int = 0
) -> AccumulationStudy:
    """The loss and the gradient of one step over `examples`, in one batch and in micro-batches of `batch_size` rows.

    The model's parameters stay as they are; gradients that it holds are dropped.

    Raises:
        ValueError: fewer than two micro-batches, one without a trained token, or nothing to train.
    """
    if batch_size < 1 or len(examples) <= batch_size:
        raise ValueError(f"{len(examples)} rows in batches of {batch_size} are not several: lower batch_size")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing to train: no parameter requires a gradient; call add_lora first")
    groups = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    batches = [collate(group, pad_id) for group in groups]
    counts = tuple(batch.trained_tokens for batch in batches)
    if 0 in counts:
        raise ValueError(f"micro-batch {counts.index(0) + 1} holds no trained token: the mean of its loss is 0 / 0")
    whole, total = collate(examples, pad_id), sum(counts)
    names = ("one batch of all rows", "right: sums over all tokens", "wrong: the mean of means")
    plans = ([(whole, total)], [(batch, total) for batch in batches],
             [(batch, count * len(batches)) for batch, count in zip(batches, counts, strict=True)])  # fmt: skip
    results = [_accumulate(model, plan) for plan in plans]
    truth = results[0][1]
    ways = tuple(_measure(name, loss, grad, truth) for name, (loss, grad) in zip(names, results, strict=True))
    return AccumulationStudy(counts, ways)


def _accumulate(model: CausalLM, plan: Sequence[tuple[Batch, int]]) -> tuple[float, Tensor]:
    """Loss and gradient, all parameters' behind each other in fp64, of batches with a divisor each."""
    model.zero_grad(set_to_none=True)
    loss = sum(float(backward(model, batch.to(model.device), divisor)) for batch, divisor in plan)
    grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss, torch.cat(grads)


def _measure(name: str, loss: float, grad: Tensor, truth: Tensor) -> Accumulated:
    norm, length = float(grad.norm()), float(truth.norm())
    error = float((grad - truth).norm()) / length
    # From the chord between the unit vectors: the arc cosine of a number near 1 has few digits.
    chord = float((grad / norm - truth / length).norm())
    return Accumulated(name, loss, norm, math.degrees(2 * math.asin(min(1.0, chord / 2))), error)
