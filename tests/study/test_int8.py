"""Outliers in what flows into a layer, and the product with and without them, against the arithmetic written out."""

import pytest
import torch
from torch import nn

from minift.study.int8 import input_outliers, split_errors

X = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
X[:, 7] += 40.0
X[2, 50] = -6.0  # exactly the threshold counts
WEIGHT = torch.randn(32, 96, generator=torch.Generator().manual_seed(2)) / 10


def test_inputs_are_seen_as_they_come():
    model = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))
    first, second = input_outliers(model, X)
    assert torch.equal(first.x_ni, X) and first.path == "0" and first.columns == 2
    assert first.largest == float(X.abs().max()) and first.typical == pytest.approx(float(X.pow(2).mean().sqrt()))
    assert torch.equal(second.x_ni, model[:2](X).detach()) and second.path == "2"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_split_against_plain_arithmetic():
    without, split = split_errors(X, WEIGHT, (0.0, 6.0))
    assert (without.columns, split.columns) == (0, 2)
    half, exact = X.half().float(), X @ WEIGHT.T
    scale_w = WEIGHT.half().float().abs().amax(1, keepdim=True) / 127
    decoded = (WEIGHT.half().float() / scale_w).round() * scale_w
    scale_x = half.abs().amax(1, keepdim=True) / 127
    y = ((half / scale_x).round() * scale_x) @ decoded.T
    error = float((y - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert without.error == pytest.approx(error, rel=1e-3) and without.worst_scale == pytest.approx(
        float(scale_x.max())
    )
    outlier = X.abs().amax(0) >= 6
    rest = half * ~outlier
    scale_x = half.masked_fill(half.abs() >= 6, 0).abs().amax(1, keepdim=True) / 127
    y = ((rest / scale_x).round() * scale_x) @ decoded.T + X[:, outlier] @ decoded[:, outlier].T
    error = float((y - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert split.error == pytest.approx(error, rel=1e-3) and split.error < without.error / 2
