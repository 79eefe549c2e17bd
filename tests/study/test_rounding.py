"""The two rounding figures of the book, and a run that stalls with rounding to nearest."""

import numpy as np
import pytest
import torch

from minift.study.rounding import DECIMALS, FIGURES, stalled_run, walks

# Where the ten walks of each figure end, as in the pictures.
ENDS = {
    10_000: ([-4.2350, 0.2762, 0.7298, 0.7749, 0.7794], [0.7210, 0.7786, 0.7791, 0.7798, 0.7797]),
    100_000: ([-49.138, -4.6795, -0.1777, 0.2734, 0.3182], [0.3380, 0.3346, 0.3238, 0.3222, 0.3220]),
}


@pytest.mark.parametrize("updates", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_book_rounding_figures(updates: int):
    found = walks(updates)
    down, chance = ENDS[updates]
    assert found["exact"][0].item() == pytest.approx(0.33669, abs=5e-6)
    assert found["down"][-1].tolist() == pytest.approx(down, rel=2e-5, abs=6e-5)  # printed with 5 digits
    assert found["stochastic"][-1].tolist() == pytest.approx(chance, abs=6e-5)
    assert found["down"].shape == found["stochastic"].shape == (updates + 1, len(DECIMALS))


def test_rounding_down_drifts_half_a_unit_a_step():
    """Each step loses between 0 and 1 unit of the last place, evenly spread: standard deviation 0.29 a step."""
    found = walks(10_000)
    for column, decimals in enumerate(DECIMALS[:3]):
        lost = (found["exact"] - found["down"][:, column])[-1].item() / 10.0**-decimals
        assert lost == pytest.approx(5000, abs=6 * 0.29 * 100)


def test_only_the_figures_of_the_book():
    assert FIGURES == {10_000: 5e-3, 100_000: 5e-5}
    with pytest.raises(ValueError, match="10000, 100000"):
        walks(7)


def test_nearest_stalls_and_chance_learns():
    runs = stalled_run()
    start, exact = runs["fp32"].loss[0], runs["fp32"].loss[-1]
    assert exact < 1e-3 * start
    # To nearest: some weights move at first, then none, although the gradient is almost that of the beginning.
    assert runs["nearest"].loss[-1] > 0.8 * start
    assert runs["nearest"].moved[0] > 0
    assert (runs["nearest"].moved[-1000:] == 0).all()
    assert (runs["nearest"].loss[-1000:] == runs["nearest"].loss[-1]).all()
    # By chance: all the way down to what a bfloat16 can tell.
    assert runs["stochastic"].loss[-1] < 1e-3 * start
    assert 0 < runs["stochastic"].moved[-500:].mean() < 0.05
    for name in ("nearest", "stochastic"):
        weights = runs[name].weights
        assert torch.equal(weights, weights.bfloat16().float())


def test_the_stalled_weights_are_stuck_for_a_reason():
    """The next update, computed with numpy, is less than half the distance of neighbours: 2^-8 from 1 to 2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator).double().numpy()
    target = (1 + torch.rand(32, generator=generator)).double().numpy()
    run = stalled_run()["nearest"]
    weights = run.weights.double().numpy()
    error = x @ (weights - target)
    update = 2e-3 * 2 / 256 * error @ x
    assert np.abs(update).max() < 2.0**-8
    assert np.abs(update).max() > 2.0**-11  # and no small matter
    assert (error**2).mean() == pytest.approx(run.loss[-1].item(), rel=1e-4)


def test_the_run_is_reproducible():
    first, again, other = stalled_run(steps=50), stalled_run(steps=50), stalled_run(steps=50, seed=1)
    assert all(torch.equal(first[name].loss, again[name].loss) for name in first)
    assert not torch.equal(first["stochastic"].loss, other["stochastic"].loss)
    assert [len(run.loss) for run in first.values()] == [51] * 3
    assert first["fp32"].moved.tolist() == [1.0] * 50
