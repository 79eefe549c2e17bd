"""RMS normalization and the gate of the MLP, each against its definition and against transformers."""

import pytest
import torch
from torch import Tensor

from minift.model.layers import ACTIVATIONS, GateAndMultiply, NormalizeRMS, RMSNorm, RMSNormPlusOne

llama = pytest.importorskip("transformers.models.llama.modeling_llama")
gemma2 = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")


# --- RMS normalization ------------------------------------------------------------------------------------------------


def normalized(x: Tensor, eps: float) -> Tensor:
    """The formula, for autograd."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (2, 3, 65), (2, 5, 576)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_gradient_equals_autograds_in_float64(shape: tuple[int, ...], scale: float, eps: float):
    """Ours in fp32 against autograd in float64 on the same numbers.

    With d terms in each mean, r is off by (d/2 + 4) u, n by (d/2 + 5) u; the mean of dn n adds d u of the mean of
    |dn n|, and a few roundings more: (2 d + 20) u of r (|dn| + |n| mean |dn n|) covers all of them.
    """
    x, dn = scale * torch.randn(shape), torch.randn(shape)
    ours_x, exact_x = x.clone().requires_grad_(), x.double().requires_grad_()
    ours, exact = NormalizeRMS.apply(ours_x, eps, torch.float32), normalized(exact_x, eps)
    (grad,) = torch.autograd.grad(ours, ours_x, dn)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, dn.double())
    assert grad.dtype == torch.float32
    u = (2 * shape[-1] + 20) * 2**-24
    with torch.no_grad():
        r = (exact_x.square().mean(-1, keepdim=True) + eps).rsqrt()
        assert ((ours - exact).abs() <= u * exact.abs()).all()
        size = r * (dn.abs() + exact.abs() * (dn * exact).abs().mean(-1, keepdim=True))
        assert ((grad - exact_grad).abs() <= u * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_in_16_bits_is_fp32_rounded_once(dtype: torch.dtype):
    x, dn = torch.randn(4, 65, dtype=dtype), torch.randn(4, 65, dtype=dtype)
    full = x.float().requires_grad_()
    expected = NormalizeRMS.apply(full, 1e-5, torch.float32)
    (expected_grad,) = torch.autograd.grad(expected, full, dn.float())
    for result in (dtype, torch.float32):  # Llama's norm rounds before its weight, Gemma's after
        half = x.clone().requires_grad_()
        ours = NormalizeRMS.apply(half, 1e-5, result)
        assert ours.dtype == result and torch.equal(ours, expected.to(result))
        (grad,) = torch.autograd.grad(ours, half, dn.to(result))
        assert grad.dtype == dtype and torch.equal(grad, expected_grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("ours_class", "theirs_class"), [(RMSNorm, llama.LlamaRMSNorm), (RMSNormPlusOne, gemma2.Gemma2RMSNorm)]
)
def test_rms_norm_equals_transformers(ours_class: type, theirs_class: type, dtype: torch.dtype):
    ours, theirs = ours_class(65, 1e-5).to(dtype), theirs_class(65, 1e-5).to(dtype)
    assert torch.equal(ours.weight, theirs.weight)  # 1, or 0 where 1 is added
    with torch.no_grad():
        ours.weight.copy_(torch.rand(65) + 0.5)
        theirs.weight.copy_(ours.weight)
    x = torch.randn(2, 7, 65, dtype=dtype)
    assert torch.equal(ours(x), theirs(x))


def test_rms_of_zeros_is_zero_and_has_a_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = NormalizeRMS.apply(x, 1e-4, torch.float32)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros(2, 8))
    assert torch.allclose(grad, torch.full((2, 8), 100.0))  # 1 / sqrt(eps)


def test_rms_keeps_one_number_a_row_for_the_backward_pass():
    """Left to autograd, fp32 copies of x would be kept: this is why NormalizeRMS exists."""
    x = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        NormalizeRMS.apply(x, 1e-5, torch.bfloat16)
    assert sorted(t.numel() for t in saved) == [16, 16 * 64]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


# --- the gate of the MLP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_gradient_is_that_of_finite_differences(activation: str):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: GateAndMultiply.apply(gate, up, activation), (gate, up))


# Our names of activations and those in config.json that transformers looks up.
THEIR_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_equals_autograd(activation: str, dtype: torch.dtype):
    """The same operations in the same order, only less is kept for them: equal bit for bit."""
    from transformers.activations import ACT2FN

    gate, up = (torch.randn(4, 65, dtype=dtype, requires_grad=True) for _ in range(2))
    dy = torch.randn(4, 65, dtype=dtype)
    ours = GateAndMultiply.apply(gate, up, activation)
    theirs = ACT2FN[THEIR_ACTIVATIONS[activation]](gate) * up
    assert torch.equal(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (gate, up), dy), torch.autograd.grad(theirs, (gate, up), dy), strict=True
    ):
        assert torch.equal(mine, other)


def test_gate_keeps_its_two_inputs():
    gate, up = (torch.randn(4, 64, requires_grad=True) for _ in range(2))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        GateAndMultiply.apply(gate, up)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}
