"""AdamW8bit with stochastic rounding: the fp32 result of each step, rounded with the words that belong to the place.

The operator of numerics/rounding.py is held against exact fractions in its own tests; here it is the reference.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from minift import AdamW8bit

DTYPES = [torch.bfloat16, torch.float16]


def steps(p: Tensor, gradients: list[Tensor], **chosen: Any) -> AdamW8bit:
    optimizer = AdamW8bit([p], **({"lr": 1e-3, "weight_decay": 0.1, "stochastic_rounding": True} | chosen))
    for gradient in gradients:
        p.grad = gradient.to(p.dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("n", [70_001, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_rounding_operator(dtype: torch.dtype, n: int, seed: int):
    """The key is the seed above, step x streams + stream below; a group has a stream for its large tensors, one for
    its small ones; the place is that in the flat buffer."""
    p, wide = torch.nn.Parameter(torch.randn(n).to(dtype)), torch.nn.Parameter(torch.zeros(n))
    ours = AdamW8bit([p], lr=1e-3, stochastic_rounding=True, seed=seed)
    theirs = AdamW8bit([wide], lr=1e-3)
    for step in range(1, 6):
        p.grad = torch.randn(n).to(dtype)
        wide.data.copy_(p)
        wide.grad = p.grad.float()
        ours.step()
        theirs.step()
        key = (seed << 32) + 2 * step + (n < 4096)
        key -= (key >= 2**63) * 2**64
        assert torch.equal(p, torch.ops.minift.stochastic_round(wide.detach(), dtype, key))


def test_second_tensor_takes_the_words_of_its_place():
    """Behind the padding of the first one."""
    first, p, wide = (torch.nn.Parameter(torch.randn(n)) for n in (5000, 6000, 6000))
    p.data, wide.data = p.data.bfloat16(), p.data.bfloat16().float()
    for each in (first, p, wide):
        each.grad = torch.ones_like(each)
    AdamW8bit([first, p], lr=1e-3, stochastic_rounding=True, seed=9).step()
    AdamW8bit([wide], lr=1e-3).step()
    place = 20 * 256
    flat = torch.cat([torch.zeros(place), wide.detach()])
    assert torch.equal(p, torch.ops.minift.stochastic_round(flat, torch.bfloat16, (9 << 32) + 2)[place:])


@pytest.mark.parametrize("n", [8192, 4000])
def test_no_two_steps_groups_or_sizes_share_words(n: int):
    """Equal tensors with equal gradients, in two groups, and in the next step: their roundings differ."""
    a, b = (torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = AdamW8bit([{"params": [a]}, {"params": [b]}], lr=1e-3, stochastic_rounding=True)
    seen = []
    for _ in range(2):
        for p in (a, b):
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += [(p.detach() != 1.0).float() for p in (a, b)]
    for i, one in enumerate(seen):
        # An update of -0.001 is 0.256 of the distance to the neighbour below 1. Two independent draws differ with
        # 2 x 0.256 x 0.744 = 0.381, standard deviation 0.0077 for 4000; six of them on each side.
        assert all(0.335 < (one != other).float().mean() < 0.427 for other in seen[:i])


def test_it_is_right_on_average():
    """Values between two neighbours go to either; the mean over 400 seeds is the fp32 result.

    A mean of 400 draws from two values one quantum apart has a standard deviation of at most a quantum / 40; the mean
    of |error| over 4096 elements is then at most 0.02 quanta, and the mean error 6 x 1/40/64 at most.
    """
    start, gradient = torch.randn(4096).bfloat16(), [torch.randn(4096).bfloat16()]
    wide = torch.nn.Parameter(start.float())
    steps(wide, gradient)
    total = torch.zeros(4096)
    for seed in range(400):
        p = torch.nn.Parameter(start.clone())
        steps(p, gradient, seed=seed)
        total += p.detach().float()
    exact = wide.detach()
    quantum = 2.0 ** (torch.frexp(exact).exponent - 8)
    error = (total / 400 - exact) / quantum
    assert error.abs().mean() < 0.025 and abs(error.mean()) < 6 / 40 / 64


def test_small_updates_are_not_lost():
    """Steps of 0.001 at 1.0 are less than half the distance of bf16 numbers there: to nearest nothing ever moves."""
    gradients = [torch.ones(5000)] * 50
    chance, nearest = (torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2))
    steps(chance, gradients, weight_decay=0.0)
    steps(nearest, gradients, weight_decay=0.0, stochastic_rounding=False)
    assert torch.equal(nearest, torch.ones_like(nearest))
    # 50 steps of 0.001; each rounding has a standard deviation of at most 2^-9, their mean 2^-9 sqrt(50 / 5000).
    assert abs(chance.float().mean().item() - 0.95) < 6 * 2**-9 * 0.1


@pytest.mark.parametrize("n", [5000, 100])
def test_fp32_parameters_are_not_touched_by_it(n: int):
    gradients = [torch.randn(n) for _ in range(3)]
    ours, theirs = (torch.nn.Parameter(torch.ones(n)) for _ in range(2))
    steps(ours, gradients)
    steps(theirs, gradients, stochastic_rounding=False)
    assert torch.equal(ours, theirs)


def test_same_seed_same_bits_also_after_loading():
    start, gradients = torch.randn(5000).bfloat16(), [torch.randn(5000) for _ in range(6)]
    whole, parts, other = (torch.nn.Parameter(start.clone()) for _ in range(3))
    steps(whole, gradients, seed=4)
    steps(other, gradients, seed=5)
    state = steps(parts, gradients[:3], seed=4).state_dict()
    resumed = AdamW8bit([parts])
    resumed.load_state_dict(state)
    for gradient in gradients[3:]:
        parts.grad = gradient.bfloat16()
        resumed.step()
    assert torch.equal(whole, parts) and not torch.equal(whole, other)
