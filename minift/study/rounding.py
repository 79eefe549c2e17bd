"""Rounding in training: why 16-bit weights stand still, and why chance moves them.

A weight in bfloat16 has 8 significant bits: between 1 and 2 its neighbours are 0.0078 apart. An update of less than
half of that is rounded away, every time, however often it comes. Rounded by chance, up with the probability of the part
that is lost, the weight is right on average (numerics/rounding.py).

    update 0.001     nearest      1.0  1.0  1.0  1.0  1.0  1.0 ...          forever
                     by chance    1.0  1.0  1.0078  1.0078  1.0078 ...      up once in eight steps

`walks` are the two figures of the book: one weight, decimal places instead of bits. `stalled_run` is a training run: a
linear regression by gradient descent, its weights in bfloat16. With rounding to nearest it stops while the gradient
still points the way; with rounding by chance it goes on to the noise that the steps of a bfloat16 leave.

The walk of the book rounds down, not to nearest, so it shows a drift of half a unit of the last place a step, and not
the standing still. Left out: a copy of the weights in fp32, the usual way out, for 4 bytes a parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.numerics.rounding import round_nearest, rounding_walk, stochastic_round

DECIMALS = (3, 4, 5, 6, 7)
FIGURES = {10_000: 5e-3, 100_000: 5e-5}  # updates and learning rate of the book's two figures


def walks(updates: int = 10_000) -> dict[str, Tensor]:
    """The walks of a figure of the book (`rounding_walk`).

    Args:
        updates: 10000 or 100000.

    Raises:
        ValueError: the book has no such figure.
    """
    if updates not in FIGURES:
        raise ValueError(f"no figure with {updates} updates: choose one of {', '.join(map(str, FIGURES))}")
    return rounding_walk(updates, FIGURES[updates], DECIMALS)


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        loss: before each step and after the last, fp32 [steps + 1].
        moved: share of the weights that changed in each step, fp32 [steps].
        weights: at the end, fp32 [n].
    """

    loss: Tensor
    moved: Tensor
    weights: Tensor


def stalled_run(steps: int = 1500, lr: float = 2e-3, features: int = 32, seed: int = 0) -> dict[str, Run]:
    """Linear regression without noise, by gradient descent from weights of 1 to weights between 1 and 2.

    The arithmetic is fp32; the weights are rounded to bfloat16 after each step, but for "fp32".

    Args:
        lr: small enough that an update is less than half the distance of two bfloat16 numbers before the end.
        seed: of data, targets and rounding.

    Returns:
        "fp32", "nearest" and "stochastic".
    """
    generator = torch.Generator().manual_seed(seed)
    x_ni = torch.randn(256, features, generator=generator)
    target_i = 1 + torch.rand(features, generator=generator)
    y_n = x_ni @ target_i
    rounded = {
        "fp32": lambda w: w,
        "nearest": lambda w: round_nearest(w, torch.bfloat16).float(),
        "stochastic": lambda w: stochastic_round(w, torch.bfloat16, generator).float(),
    }
    return {name: _descend(x_ni, y_n, lr, steps, keep) for name, keep in rounded.items()}


def _descend(x_ni: Tensor, y_n: Tensor, lr: float, steps: int, keep: Callable[[Tensor], Tensor]) -> Run:
    weights_i = torch.ones(x_ni.shape[1])
    loss, moved = [], []
    for _ in range(steps):
        error_n = x_ni @ weights_i - y_n
        loss.append(error_n.square().mean())
        before_i, weights_i = weights_i, keep(weights_i - lr * 2 / len(y_n) * (error_n @ x_ni))
        moved.append((weights_i != before_i).float().mean())
    loss.append((x_ni @ weights_i - y_n).square().mean())
    return Run(torch.stack(loss), torch.stack(moved), weights_i)
