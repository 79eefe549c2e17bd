"""The small network against its gradients by hand, and what is drawn of it against its numbers."""

import re

import pytest
import torch
from matplotlib.figure import Figure
from pictures import texts

from minift.study.network import run_network
from minift.study.plots.network import backward_pass, forward_pass


def test_the_numbers_of_the_book():
    """Chapter 5: shapes (1, 2, 4), (4, 4), (4, 4), and a third layer to one number, (out, in) in torch."""
    run = run_network()
    assert [tuple(a.shape) for a in run.activations] == [(1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2, 1)]
    assert [tuple(w.shape) for w in run.weights] == [(4, 4), (4, 4), (1, 4)]
    assert run.kept == 24 and run.kept_by_loss == 4
    assert sum(grad.numel() for grad in run.weight_grads) == sum(w.numel() for w in run.weights) == 36


@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_by_hand(seed: int):
    """In float64: dW = dy^T x, dx = dy W, tanh' = 1 - y^2. An fp32 sum of 8 products is good to 8 * 2^-24 of its
    largest term; 1e-5 leaves room for three layers of them."""
    run = run_network(seed)
    x = [a[0].double() for a in run.activations]
    w = [weight.double() for weight in run.weights]
    dy = 2 * (x[3] - run.target[0].double()) / 2
    assert run.loss == pytest.approx(float((x[3] - run.target[0]).square().mean()), rel=1e-6)
    for layer in (2, 1, 0):
        torch.testing.assert_close(run.weight_grads[layer].double(), dy.T @ x[layer], rtol=1e-5, atol=1e-6)
        dx = dy @ w[layer]
        grad = run.activation_grads[layer]
        assert (grad is None) == (layer == 0)
        if grad is not None:
            torch.testing.assert_close(grad[0].double(), dx, rtol=1e-5, atol=1e-6)
        dy = dx * (1 - x[layer] ** 2)


def test_two_seeds_are_two_networks():
    first, again, other = run_network(0), run_network(0), run_network(1)
    assert torch.equal(first.weights[0], again.weights[0]) and first.loss == again.loss
    assert first.loss != other.loss


def test_the_forward_picture_shows_the_activations(figures: list[Figure]):
    run = run_network()
    forward_pass(run)
    written = texts(figures[0])
    for activations in run.activations:
        for value in activations.flatten().tolist():
            assert f"{value:.2f}" in written
    assert "24 activations are kept" in written and "16 weights" in written and "(1, 2, 4)\nkept" in written
    assert f"\n{run.loss:.2f}\n" in written


def test_the_backward_picture_shows_the_gradients(figures: list[Figure]):
    run = run_network()
    backward_pass(run)
    written = texts(figures[0])
    for grads in run.activation_grads[1:]:
        assert grads is not None
        for value in grads.flatten().tolist():
            assert f"{value:.2f}" in written
    assert "36 gradients of weights" in written and "inputs\nno gradient" in written
    numbers = re.findall(r"^-?\d+\.\d\d$", written, re.MULTILINE)
    assert len(numbers) == 8 + 8 + 2 + 1 + 2  # gradients, the loss, the targets; none for the inputs


def test_a_line_for_each_weight_dashed_if_negative(figures: list[Figure]):
    run = run_network()
    forward_pass(run)
    lines = [line for line in figures[0].axes[0].get_lines() if len(line.get_xdata()) == 2]  # pyright: ignore[reportArgumentType]
    numbers = [value for weight in run.weights for value in weight.flatten().tolist()]
    assert [line.get_linestyle() for line in lines] == ["-" if value >= 0 else "--" for value in numbers]
    first = [line.get_linewidth() for line in lines[:16]]
    sizes = [abs(value) for value in numbers[:16]]
    assert sorted(range(16), key=first.__getitem__) == sorted(range(16), key=sizes.__getitem__)
