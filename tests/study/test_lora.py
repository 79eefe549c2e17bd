"""The four forms of LoRA's product in exact fractions, the pencil example, and the storage arithmetic."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from minift.adapters.config import LoraConfig
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


def test_one_layer_computes_equation_3_4():
    weight_oi, x_ni = torch.randn(5, 7), torch.randn(3, 7)
    layer = lora.one_layer(weight_oi, LoraConfig(r=2, alpha=6))
    assert torch.equal(layer(x_ni), x_ni @ weight_oi.T)
    a_ri, b_or = layer.matrices("default")
    with torch.no_grad():
        b_or.normal_()
        # Sums of 7 + 2 products of sizes below 10 in another order.
        assert (layer(x_ni) - lora.scaled_bottleneck(x_ni, weight_oi, a_ri, b_or, 6)).abs().max() <= 20 * 2**-24 * 100
    assert not weight_oi.requires_grad and [p.shape for p in layer.parameters() if p.requires_grad] == [(2, 7), (5, 2)]


def test_what_each_form_keeps():
    """By the chain rule: each product keeps its two factors, if both gradients are asked for; W is frozen."""
    x, w = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4)
    a, b = torch.randn(2, 4, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    factors = [(2, 4), (5, 2), (6, 4)]
    expected = {
        lora.merged_weight: [*factors, (5, 4)],  # the merged weight
        lora.two_products: [*factors, (5, 4), (5, 4)],  # W and B A
        lora.bottleneck: [*factors, (5, 4), (6, 2)],  # W, and what is between A and B
    }
    for form, shapes in expected.items():
        found = lora.kept_for_backward(lambda form=form: form(x, w, a, b))
        assert sorted(tuple(sorted(shape)) for shape in found) == sorted(tuple(sorted(shape)) for shape in shapes)
    assert lora.kept_for_backward(lambda: w @ w.T) == []


def test_the_counts_of_opt_350m():
    """The book's; but the head that came loose from the embedding, and was counted again there, counts once."""
    lines = lora.opt_counts().split("\n")[1:]
    assert [line.endswith("the same") for line in lines] == [True, True, True, False]
    for line, numbers in zip(
        lines,
        (("786,432", "331,982,848", "0.2369"), ("884,736", "332,081,152", "0.2664"),
         ("26,624,000", "357,820,416", "7.4406"), ("1,192,704", "332,389,120", "0.3588", "358,128,384", "0.3330")),
        strict=True,
    ):  # fmt: skip
        assert all(number in line for number in numbers)


def test_the_golden_numbers_of_the_book():
    """Chapter 3: A and B drawn with seed 11, the input with seed 19."""
    torch.manual_seed(11)
    a_ri, b_or = torch.nn.Linear(1024, 8, bias=False).weight, torch.nn.Linear(8, 1024, bias=False).weight
    assert (a_ri.numel(), b_or.numel(), torch.linalg.matrix_rank(b_or @ a_ri)) == (8192, 8192, 8)
    torch.manual_seed(19)
    x_ni, nothing = torch.randn(1, 1024), torch.zeros(1024, 1024)
    for form in (lora.merged_weight, lora.two_products, lora.bottleneck):
        added = form(x_ni, nothing, a_ri, b_or)[0, :3].tolist()
        assert added == pytest.approx([-0.0357, 0.0230, -0.4607], abs=5.1e-5)  # four decimals are printed
