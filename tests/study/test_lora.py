"""The four forms of LoRA's product in exact fractions, the pencil example, and the storage arithmetic."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from minift.study import lora


def exact(matrix: Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in matrix.tolist()]


def times(left: list[list[Fraction]], right: list[list[Fraction]]) -> list[list[Fraction]]:
    return [[sum((a * b for a, b in zip(row, column, strict=True)), Fraction()) for column in zip(*right, strict=True)]
            for row in left]  # fmt: skip


def flipped(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    return [list(column) for column in zip(*matrix, strict=True)]


@pytest.mark.parametrize(("n", "i", "o", "r", "alpha"), [(1, 1, 1, 1, 1), (3, 5, 4, 2, 6), (2, 7, 3, 5, 1)])
def test_the_four_forms_agree(n: int, i: int, o: int, r: int, alpha: int):
    """Small whole numbers, so that float64 is exact (alpha / r is not: one rounding of it, one of each sum)."""
    x, w, a, b = (torch.randint(-9, 10, size).double() for size in ((n, i), (o, i), (r, i), (o, r)))
    change = times(exact(b), exact(a))

    def expected(scaling: Fraction) -> Tensor:
        moved = [[p + scaling * q for p, q in zip(u, v, strict=True)] for u, v in zip(exact(w), change, strict=True)]
        return torch.tensor([[float(v) for v in row] for row in times(exact(x), flipped(moved))], dtype=torch.float64)

    for form in (lora.merged_weight, lora.two_products, lora.bottleneck):
        assert torch.equal(form(x, w, a, b), expected(Fraction(1)))
    value, scaled = expected(Fraction(alpha, r)), lora.scaled_bottleneck(x, w, a, b, alpha)
    # At most 9^3 * i * r in size, at most i + 4 roundings in float64.
    bound = (i + 4) * 2**-53 * 9**3 * i * r * max(alpha, 1)
    assert (scaled - value).abs().max() <= bound
    for form in (lora.merged_weight, lora.two_products):
        assert (form(x, w, a, b, alpha / r) - value).abs().max() <= bound


def test_the_pencil_example():
    """As printed; decimals such as 0.8 are rounded in float64, and the results by a few units of their last place."""
    found = lora.hand_example()
    assert found.t.tolist() == pytest.approx([-4.5], rel=1e-14)
    assert found.h.tolist() == pytest.approx([17.2, 30.1], rel=1e-14)
    assert found.dt.tolist() == pytest.approx([0.16], rel=1e-14)
    assert found.grad_b.flatten().tolist() == pytest.approx([-2.25, 0.9], rel=1e-14)
    assert found.grad_a.flatten().tolist() == pytest.approx([1.6, 3.2, 4.8], rel=1e-14)


def test_by_hand_is_what_autograd_finds():
    x, w, dh = torch.randn(5), torch.randn(3, 5), torch.randn(3)
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    h = w @ x + b @ (a @ x)
    grad_a, grad_b = torch.autograd.grad(h, (a, b), dh)
    with torch.no_grad():
        found = lora.by_hand(x, w, a, b, dh)
    # Sums of at most 5 + 2 products in another order: 2 * 7 roundings of 2^-24 of numbers of a size below 20.
    for mine, other in ((found.h, h), (found.grad_a, grad_a), (found.grad_b, grad_b)):
        assert mine.shape == other.shape and (mine - other).abs().max() <= 14 * 2**-24 * 20


def test_the_storage_of_a_hundred_customers():
    """The book's: 65,536 parameters an adapter, 1.68 billion against 23.3 million."""
    found = lora.customer_storage()
    assert (found.full, found.adapter) == (16_777_216, 65_536)
    assert (found.copies, found.shared) == (1_677_721_600, 23_330_816)
    assert lora.customer_storage(3, 10, 20, 1) == lora.Storage(200, 30, 600, 290)


@pytest.mark.parametrize("numbers", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, -2, 1), (1, 1, 1, 0)])
def test_sizes_below_one_are_refused(numbers: tuple[int, int, int, int]):
    with pytest.raises(ValueError, match="at least 1"):
        lora.customer_storage(*numbers)
