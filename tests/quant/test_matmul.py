"""The product with a packed weight: against float64, against bitsandbytes' own, and its gradients against torch's."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as theirs_functional
from bitsandbytes import matmul_4bit as theirs_matmul_4bit
from torch import Tensor

from minift.quant import QuantState, dequantize_4bit, quantize_4bit
from minift.quant.matmul import matmul_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows of whole blocks and rows that begin anywhere; one row of x, more, and none.
WEIGHTS = [(1, 1), (33, 64), (64, 256), (7, 65), (129, 130)]
ROWS = [(), (1,), (5,), (2, 3), (16,), (40,), (0,)]


def summed_within(dtype: torch.dtype, terms: int, exact: Tensor, magnitude: Tensor) -> Tensor:
    """Largest error of an fp32 sum of `terms` products in any order, rounded to `dtype`.

    Each of the sum's terms and additions is off by 2^-24 of a partial sum at most, so by (terms + 1) x 2^-24 of the sum
    of magnitudes together. A product in a 16-bit type may be rounded before the bias is added and after: two roundings,
    each half a unit in the last place, or half the smallest number of fp16.
    """
    summed = (terms + 1) * 2**-24 * magnitude
    return summed + torch.finfo(dtype).eps * (magnitude + summed) + 2 * torch.finfo(dtype).smallest_normal * 2**-10


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_float64(has_bias: bool, dtype: torch.dtype, shape: tuple[int, int], rows: tuple[int, ...]):
    packed, state = quantize_4bit(torch.randn(shape), "nf4", 64, double_quant=True)
    x, bias = torch.randn(*rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if has_bias else None
    ours = matmul_4bit(x, packed, state, bias)
    assert ours.shape == (*rows, shape[0]) and ours.dtype == dtype
    weight = dequantize_4bit(packed, state, dtype).double()
    exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert ((ours.double() - exact).abs() <= summed_within(dtype, shape[1] + 1, exact, magnitude)).all()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_equals_bitsandbytes(quant_type: str, dtype: torch.dtype, rows: int, storage: torch.dtype):
    """On a CPU both decode to the dtype of x and call the same product, so the results are equal to the bit."""
    weight, x, bias = torch.randn(48, 128), torch.randn(rows, 128).to(dtype), torch.randn(48).to(dtype)
    packed, state = quantize_4bit(weight.to(dtype), quant_type, 64, quant_storage=storage)
    theirs_packed, theirs_state = theirs_functional.quantize_4bit(
        weight.to(dtype), blocksize=64, quant_type=quant_type, quant_storage=storage
    )
    # Its path for training: that for inference, without gradients, repacks the weight for the processor.
    theirs = theirs_matmul_4bit(x.requires_grad_(), theirs_packed.t(), theirs_state, bias=bias)
    assert torch.equal(matmul_4bit(x, packed, state, bias), theirs)


@pytest.mark.parametrize("rows", [(1,), (2, 3), (40,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: torch.dtype, rows: tuple[int, ...]):
    """dx = dy W and db = sum of dy, against torch's own linear with the decoded weight in float64."""
    packed, state = quantize_4bit(torch.randn(33, 130), "nf4", 64, double_quant=True)
    weight = dequantize_4bit(packed, state, dtype).double()
    x, bias = torch.randn(*rows, 130).to(dtype).requires_grad_(), torch.randn(33).to(dtype).requires_grad_()
    grad = torch.randn(*rows, 33).to(dtype)
    matmul_4bit(x, packed, state, bias).backward(grad)
    wide_x, wide_bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    F.linear(wide_x, weight, wide_bias).backward(grad.double())
    assert x.grad is not None and bias.grad is not None and wide_x.grad is not None and wide_bias.grad is not None
    assert x.grad.dtype == bias.grad.dtype == dtype
    magnitude = grad.double().abs() @ weight.abs()
    within = summed_within(dtype, 33, wide_x.grad, magnitude)
    assert ((x.grad.double() - wide_x.grad).abs() <= within).all()
    flat = grad.double().view(-1, 33).abs()
    within = summed_within(dtype, len(flat), wide_bias.grad, flat.sum(0))
    assert ((bias.grad.double() - wide_bias.grad).abs() <= within).all()


def test_second_derivative():
    """Products with W on the way back are products with W^T on the way forth. As torch does with the decoded weight,
    up to rounding: sums of 64 and of 8 fp32 products of numbers around 1."""
    packed, state = quantize_4bit(torch.randn(8, 64))
    weight_oi, bias = dequantize_4bit(packed, state), torch.randn(8)
    results = []
    for product in (lambda x: matmul_4bit(x, packed, state, bias), lambda x: x @ weight_oi.T + bias):
        x = torch.linspace(-1, 1, 3 * 64).view(3, 64).requires_grad_()
        (gradient,) = torch.autograd.grad(product(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    assert results[0].abs().max() > 1
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4 * results[1].abs().max().item())


@pytest.mark.parametrize(("x_needs", "bias_needs"), [(True, False), (False, True), (False, False)])
def test_gradients_only_where_asked_for(x_needs: bool, bias_needs: bool):
    packed, state = quantize_4bit(torch.randn(8, 64))
    x, bias = torch.randn(3, 64, requires_grad=x_needs), torch.randn(8, requires_grad=bias_needs)
    y = matmul_4bit(x, packed, state, bias)
    assert y.requires_grad == (x_needs or bias_needs)
    if y.requires_grad:
        y.sum().backward()
    assert (x.grad is not None, bias.grad is not None) == (x_needs, bias_needs)


def test_the_decoded_weight_is_not_kept_for_the_backward_pass():
    """It keeps the packed weight only: neither x nor W, each of which is larger."""
    packed, state = quantize_4bit(torch.randn(64, 128))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        matmul_4bit(torch.randn(3, 128, requires_grad=True), packed, state)
    assert sum(tensor.nbytes for tensor in kept) == packed.nbytes + state.absmax.nbytes


@pytest.mark.parametrize("rows", [(1,), (2, 3), (17,)])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_passes_opcheck(dtype: torch.dtype, double_quant: bool, rows: tuple[int, ...]):
    """Schema, fake tensor, autograd registration and tracing with fixed and symbolic shapes."""
    packed, state = quantize_4bit(torch.randn(9, 65), "nf4", 64, double_quant)
    x, bias = torch.randn(*rows, 65).to(dtype).requires_grad_(), torch.randn(9).to(dtype)
    scales = (state.absmax, state.nested_absmax, state.nested_offset)
    torch.library.opcheck(
        torch.ops.minift.matmul_4bit.default, (x, packed, *scales, "nf4", 64, state.shape, bias),
    )  # fmt: skip
    grad_y = torch.randn(*rows, 9).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.minift.matmul_4bit_dx.default, (grad_y, packed, *scales, "nf4", 64, state.shape))


X, BIAS = torch.ones(2, 64), torch.ones(8)
REFUSED: dict[str, tuple[Callable[[], tuple], str]] = {
    "another width": (lambda: (torch.ones(2, 63), BIAS), "cannot be multiplied"),
    "a number": (lambda: (torch.ones(()), BIAS), "cannot be multiplied"),
    "whole numbers": (lambda: (X.int(), None), "int32"),
    "float64": (lambda: (X.double(), None), "float64"),
    "a bias too long": (lambda: (X, torch.ones(9)), "bias"),
    "a bias to be spread": (lambda: (X, torch.ones(1)), "bias"),
    "a bias of another type": (lambda: (X, BIAS.half()), "bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str):
    make, sentence = REFUSED[case]
    packed, state = quantize_4bit(torch.randn(8, 64))
    x, bias = make()
    with pytest.raises(ValueError, match=sentence):
        matmul_4bit(x, packed, state, bias)


def test_a_weight_that_is_no_matrix_is_refused():
    packed, state = quantize_4bit(torch.randn(64))
    with pytest.raises(ValueError, match="cannot be multiplied"):
        matmul_4bit(torch.ones(2, 64), packed, state)
    with pytest.raises(ValueError, match="packed holds"):
        matmul_4bit(X, packed[:-1], QuantState((8, 64), torch.float32, "nf4", 64, torch.ones(8)))
