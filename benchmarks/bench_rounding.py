"""Stochastic rounding of fp32 to bf16 against the plain cast: what drawing random numbers costs.

There is no peer, and it cannot win: the row says how much a step that rounds by chance pays for moving at all.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Row, Setup
from minift.numerics.rounding import stochastic_round

VALUES = 1 << 22


def rows(setup: Setup) -> Iterator[Row]:
    n = setup.size(VALUES)
    x_n = torch.randn(n, device=setup.device)
    yield Row(
        name=f"stochastic fp32 -> bf16 against the cast, {n} values",
        inputs=setup.rotate(x_n, x_n.nbytes),
        ours=lambda x: stochastic_round(x, torch.bfloat16),
        theirs=lambda x: x.to(torch.bfloat16),
        check=check,
        bytes_moved=6 * n,
        honest=True,
    )


def check(ours: Tensor, theirs: Tensor) -> None:
    """Raise ValueError unless each value is the nearest or the next one, and the next one as often as chance has it.

    A value f quanta above its lower neighbour, f uniform in [0, 1), goes to the farther one with probability
    min(f, 1 - f): a quarter on average. From 200,000 values on, 0.01 is ten standard deviations of the share.
    """
    steps = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
    if steps.max() > 1:
        raise ValueError(f"a value is {int(steps.max())} steps from the nearest one")
    share = steps.double().mean().item()
    if not 0.24 < share < 0.26:
        raise ValueError(f"{share:.1%} of the values go to the farther neighbour, expected 25 %")
