"""e22: the oracle is autograd on the formula of drive.py's block, without any checkpointing."""

import math

import torch

from minift.course.spec import Case, check

BATCH, LENGTH, WIDTH, HIDDEN, FACTOR = 2, 3, 6, 5, 0.75
# Two blocks, each with sums of 6 products and then 5 of size up to 10: 64 roundings of float64 on 36 terms.
TOLERANCE = 64 * torch.finfo(torch.float64).eps * math.sqrt(36) * 10
NAMES = ("y", "dx", "d gate", "d weights", "the next random numbers")


def drawn(draw, blocks):
    def numbers(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {
        "x": numbers(BATCH, LENGTH, WIDTH),
        "gate": numbers(BATCH, 1, WIDTH),
        "factor": FACTOR,
        "weights": [[numbers(HIDDEN, WIDTH), numbers(WIDTH, HIDDEN)] for _ in range(blocks)],
        "dy": numbers(BATCH, LENGTH, WIDTH),
    }


def block_formula(x, gate, factor, w1, w2, drop, random):
    h = torch.tanh(x @ w1.T)
    if drop:
        h = h * (torch.rand(h.shape, dtype=h.dtype, generator=random) >= drop) / (1 - drop)
    h = h @ w2.T * factor
    return x + (h if gate is None else h * gate)


def plain_gradients(x, gate, factor, weights, dy, frozen=(), drop=0.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = x.clone().requires_grad_("x" not in frozen)
    gate = None if gate is None else gate.clone().requires_grad_("gate" not in frozen)
    weights = [
        [w.clone().requires_grad_(n not in frozen) for n, w in zip(("w1", "w2"), p, strict=True)] for p in weights
    ]
    y = x
    for w1, w2 in weights:
        y = block_formula(y, gate, factor, w1, w2, drop, random)
    (y * dy).sum().backward()
    of_weights = [[w.grad for w in pair] for pair in weights]
    return y.detach(), x.grad, None if gate is None else gate.grad, of_weights, torch.rand(3, generator=random)


def case(given, about):
    return Case("gradients", given, plain_gradients(**given), TOLERANCE, TOLERANCE, names=NAMES, about=about)


def forward_case(given, frozen, recording, needed, about):
    given = {name: given[name] for name in ("x", "gate", "factor", "weights")}
    ((w1, w2),) = given["weights"]
    y = block_formula(given["x"], given["gate"], FACTOR, w1, w2, 0.0, None)
    given |= {"frozen": frozen, "recording": recording}
    return Case("forward_only", given, (y, needed), TOLERANCE, TOLERANCE, names=("y", "y.requires_grad"), about=about)


@check(points=1)
def same_gradients(draw):
    """Answer and gradients are those of the block itself, for every tensor argument and every parameter."""
    yield case(drawn(draw, 1), "one block, x and gate want gradients")
    yield case(drawn(draw, 2) | {"gate": None}, "two blocks one after the other, an argument is None")
    yield case(drawn(draw, 1) | {"frozen": ["gate"]}, "one block, the second tensor wants no gradient")
    yield forward_case(drawn(draw, 1), [], True, True, "no backward pass")
    yield forward_case(drawn(draw, 1), [], False, False, "under torch.no_grad()")


@check(points=1)
def runs_twice_and_keeps_nothing(draw):
    """A block runs once in forward and once in backward; in between none of its activations is in memory."""
    for blocks in (1, 3):
        names = ("runs after forward", "activations kept", "runs after backward")
        expect = [1] * blocks, 0, [2] * blocks
        yield Case("runs_and_memory", drawn(draw, blocks), expect, names=names, about=f"{blocks} blocks in a row")


@check(points=1)
def same_random_numbers(draw):
    """The second run draws the random numbers of the first, and leaves no trace in those that come later."""
    for blocks in (1, 2):
        seed = int(torch.randint(1 << 30, (1,), generator=draw))
        about = f"{blocks} blocks with dropout"
        yield case(drawn(draw, blocks) | {"drop": 0.4, "seed": seed}, about)


@check(points=1)
def frozen_inputs(draw):
    """Parameters get their gradients although no argument wants one, also if some parameters are frozen."""
    yield case(drawn(draw, 1) | {"frozen": ["x", "gate"]}, "only the weights want gradients")
    yield case(drawn(draw, 2) | {"frozen": ["x", "gate", "w1"]}, "two blocks, only the second weight wants gradients")
    yield case(drawn(draw, 1) | {"frozen": ["w1", "w2", "gate"]}, "only x wants a gradient")
    yield forward_case(drawn(draw, 1), ["x", "gate", "w1", "w2"], True, False, "everything is frozen")
