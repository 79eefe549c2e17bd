"""The states of an online softmax against the softmax of what was read so far."""

import pytest
import torch

from minift.study.online import online_softmax


@pytest.mark.parametrize("tile", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("shift", [0.0, 900.0])  # exp(900) is no number of float64
def test_each_state_is_the_result_of_the_row_so_far(tile: int, shift: float):
    scores = 3 * torch.randn(7, dtype=torch.float64) + shift
    values = torch.randn(7, 4, dtype=torch.float64)
    states = online_softmax(scores, values, tile)
    ends = [min(start + tile, 7) for start in range(0, 7, tile)]
    assert len(states) == len(ends)
    for end, state in zip(ends, states, strict=True):
        peak = scores[:end].max()
        assert state.peak == peak.item()
        assert state.total == pytest.approx((scores[:end] - peak).exp().sum().item(), rel=1e-12)
        assert (state.out_e - scores[:end].softmax(0) @ values[:end]).abs().max() <= 1e-12
        assert (state.acc_e - state.total * state.out_e).abs().max() <= 1e-12


def test_old_sums_are_restated_only_when_the_peak_grows():
    """exp of ln 2 - ln 4, then of nothing."""
    scores = torch.tensor([1.0, 2, 4, 1, 3, 4], dtype=torch.float64).log()
    decays = [state.decay for state in online_softmax(scores, torch.ones(6, 1, dtype=torch.float64), 2)]
    assert decays == pytest.approx([0.0, 0.5, 1.0], abs=1e-15)


def test_a_tile_needs_keys():
    with pytest.raises(ValueError, match="a tile of 0 keys: give at least 1"):
        online_softmax(torch.zeros(2), torch.zeros(2, 1), 0)
