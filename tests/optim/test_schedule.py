"""The factor of every step against transformers' `get_scheduler` with learning rate 1.

The rates of all updates are compared (a scheduler is asked once more after the last one, which moves nothing). Linear
is written as `1 - a/n` here and as `(n - a)/n` there: two roundings of numbers up to 1 against one, so up to 2^-52
apart. The others are the same formula.
"""

import pytest
import torch
from transformers import get_scheduler

from minift.optim.schedule import SCHEDULES, lr_factor

THEIR_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("total", "warmup"), [(1, 0), (2, 1), (10, 0), (10, 3), (10, 10), (10, 20), (97, 5), (1000, 100)]
)
def test_equals_transformers(schedule: str, total: int, warmup: int):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(THEIR_NAMES[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        theirs = optimizer.param_groups[0]["lr"]
        assert abs(lr_factor(schedule, step, total, warmup) - theirs) <= 2**-52, step
        optimizer.step()
        scheduler.step()


def test_constant_without_warmup():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler("constant", optimizer)
    for step in range(10):
        assert lr_factor("constant", step, 10) == optimizer.param_groups[0]["lr"] == 1.0
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 100])
def test_factors_lie_between_zero_and_one(schedule: str, warmup: int):
    factors = [lr_factor(schedule, step, 100, warmup) for step in range(130)]  # also beyond the planned end
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors[0] == (0.0 if warmup else 1.0)
    rising, falling = factors[: warmup + 1], factors[warmup:100]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="choose one of linear, cosine, constant"):
        lr_factor("polynomial", 0, 10)
