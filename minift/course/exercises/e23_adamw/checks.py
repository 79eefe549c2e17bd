"""e23: the oracle is torch.optim.AdamW, in float64."""

import torch

from minift.course.spec import Case, check

# A step has some ten roundings of float64 on weights of size 1; they add up over at most 50 steps.
TOLERANCE = 10 * 50 * torch.finfo(torch.float64).eps


def numbers(draw, *shape):
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def torch_trajectory(start, gradients, options):
    params = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = torch.optim.AdamW(params, foreach=False, **options)
    seen = []
    for row in gradients:
        for parameter, gradient in zip(params, row, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        seen.append([parameter.detach().clone() for parameter in params])
    return seen


def case(start, gradients, options, about, oracle_options=None):
    given = {"start": start, "gradients": gradients, "options": options}
    names = tuple(f"after step {i + 1}" for i in range(len(gradients)))
    expect = torch_trajectory(start, gradients, oracle_options or options)
    return Case("trajectory", given, expect, TOLERANCE, TOLERANCE, names=names, about=about)


@check(points=1)
def first_steps(draw):
    """The first steps are full steps: both averages are corrected for having started at zero."""
    gradients = [[numbers(draw, 3, 5)] for _ in range(4)]
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    yield case([numbers(draw, 3, 5)], gradients, options, "one parameter, 4 steps, no decay")
    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    about = "one parameter, 4 steps, nothing given but the parameters"
    yield case([numbers(draw, 3, 5)], gradients, {}, about, defaults)


@check(points=1)
def eps_outside_the_root(draw):
    """A large eps shows where it stands: it is added to the corrected root, not under it."""
    gradients = [[numbers(draw, 7) * 0.02] for _ in range(50)]
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.0}
    yield case([numbers(draw, 7)], gradients, options, "one parameter, 50 steps, eps 0.01, small gradients")


@check(points=1)
def decay_on_the_weight(draw):
    """Weight decay shrinks the weight itself, before the update, and does not pass through m and v."""
    gradients = [[numbers(draw, 5, 2)] for _ in range(6)]
    options = {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
    yield case([numbers(draw, 5, 2)], gradients, options, "one parameter, 6 steps, weight decay 0.1")


@check(points=1)
def every_parameter_for_itself(draw):
    """Parameters have their own state and step count; one without a gradient is left alone completely."""
    start = [numbers(draw, 4, 3), numbers(draw, 6), numbers(draw, 1)]
    gradients = [
        [numbers(draw, 4, 3), None if step in (0, 2, 3) else numbers(draw, 6), numbers(draw, 1)] for step in range(7)
    ]
    options = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.3}
    yield case(start, gradients, options, "three parameters, one without a gradient in steps 1, 3 and 4")
