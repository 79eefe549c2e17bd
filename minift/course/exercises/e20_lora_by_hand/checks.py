"""e20: the oracle is autograd in float64 on the formula of the page."""

import math

import torch
import torch.nn.functional as F

from minift.course.spec import Case, check

R, IN, OUT, ALPHA = 4, 10, 7, 12.0  # alpha / r = 3: neither 1, nor alpha, nor r / alpha
# Sums of at most OUT * R, IN * R or 15 tokens * OUT products of size about ALPHA: 64 roundings of float64 on 105 terms.
TOLERANCE = 64 * torch.finfo(torch.float64).eps * math.sqrt(105) * ALPHA
NAMES = ("dx", "da", "db")


def numbers(draw, *shape):
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def formula(x, weight, a, b, mask):
    entered = x if mask is None else x * mask
    return F.linear(x, weight) + (ALPHA / R) * F.linear(F.linear(entered, a), b)


def inputs(draw, *front, dropout=False):
    given = {
        "x": numbers(draw, *front, IN),
        "weight": numbers(draw, OUT, IN),
        "a": numbers(draw, R, IN),
        "b": numbers(draw, OUT, R),
        "alpha": ALPHA,
    }
    if dropout:
        given["mask"] = (torch.rand(*front, IN, generator=draw) < 0.75).double() / 0.75
    return given


def forward_case(draw, *front, dropout=False):
    given = inputs(draw, *front, dropout=dropout)
    y = formula(given["x"], given["weight"], given["a"], given["b"], given.get("mask"))
    about = f"x of shape {tuple(given['x'].shape)}, r {R}, alpha {ALPHA:g}{', with a dropout mask' if dropout else ''}"
    return Case("forward", given, y, atol=TOLERANCE, rtol=TOLERANCE, about=about)


def backward_case(draw, *front, dropout=False):
    given = inputs(draw, *front, dropout=dropout)
    dy = numbers(draw, *front, OUT)
    leaves = [given[name].clone().requires_grad_() for name in ("x", "a", "b")]
    y = formula(leaves[0], given["weight"], leaves[1], leaves[2], given.get("mask"))
    expected = torch.autograd.grad(y, leaves, dy)
    about = f"x of shape {tuple(given['x'].shape)}, r {R}, alpha {ALPHA:g}{', with a dropout mask' if dropout else ''}"
    return Case("backward", {"dy": dy} | given, expected, atol=TOLERANCE, rtol=TOLERANCE, names=NAMES, about=about)


@check(points=1)
def starts_as_it_was(draw):
    """A new adapter changes nothing yet can learn: a is random within its bound, b is zero."""
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, (1,), generator=draw)))
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    bound = 1 / math.sqrt(IN)
    a = (torch.rand(R, IN, generator=twin) * 2 - 1) * bound
    given = {"in_features": IN, "out_features": OUT, "r": R, "generator": generator}
    # uniform_ scales its bits in one step, the line above in two: a few roundings of float32 on numbers below 1.
    yield Case("init", given, (a, torch.zeros(OUT, R)), atol=16 * torch.finfo(torch.float32).eps, names=("a", "b"))


@check(points=1)
def forward_is_scaled(draw):
    """The forward pass adds the detour times alpha / r, for x of any number of dimensions."""
    yield forward_case(draw, 5)
    yield forward_case(draw, 3, 5)


@check(points=1)
def dropout_on_the_detour_only(draw):
    """Dropout thins out what enters the adapter and never what the frozen weight sees."""
    yield forward_case(draw, 3, 5, dropout=True)


@check(points=1)
def gradients_of_the_adapter(draw):
    """Backward gives dx, da and db of a matrix of tokens."""
    yield backward_case(draw, 6)


@check(points=2)
def gradients_in_three_dimensions(draw):
    """Backward sums over batch and position, and the gradient of x has both paths, the mask on one of them."""
    yield backward_case(draw, 3, 5)
    yield backward_case(draw, 3, 5, dropout=True)
