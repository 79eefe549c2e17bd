"""LLM.int8() against bitsandbytes on a CPU: codes, scales, outputs and gradients, bit for bit.

What has to be known about bitsandbytes 0.50.2 on a CPU:

- Its output is multiplied by 6.200124e-05 instead of 1/127^2 = 6.2000124e-05. Where bits are compared, our constant is
  replaced by theirs; `test_product_unit_is_exact` measures the difference.
- `bitsandbytes.matmul` does not compute LLM.int8() in training on a CPU, so `MatMul8bitLt` is called directly.
- Without AVX-512 it multiplies the codes in fp32, so sums stay below 2^24 here: at most 1040 features.
- Its bias gradient sums over the first dimension only, so that one is compared for matrices.
"""

import os
import subprocess
import sys

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as theirs_functional
from bitsandbytes.autograd._functions import MatMul8bitLt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.quant import int8
from minift.quant.int8 import dequantize_rows, int8_linear, int8_matmul, quantize_rows, quantize_weight_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half the distance from 1 to the next number: the largest relative error of one rounding.
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Leading dimensions of x, in_features, out_features: one value, one row, odd sizes, 3-D, more than one tile.
SHAPES = [
    ((1,), 1, 1),
    ((1,), 70, 33),
    ((5,), 7, 3),
    ((17,), 65, 31),
    ((33,), 128, 96),
    ((1, 1), 33, 5),
    ((2, 3), 70, 33),
    ((3, 21), 1040, 19),
]
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
)


def activations(*shape: int, outliers: int = 2) -> Tensor:
    """Normal values with some columns 20 times as large, of which most values reach 6, but not all."""
    x = torch.randn(shape)
    x[..., torch.randperm(shape[-1])[:outliers]] *= 20
    return x


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal dtype, shape and numbers, NaN at the same places."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def theirs_linear(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    state = bitsandbytes.MatmulLtState(CB=codes, SCB=absmax)
    state.has_fp16_weights, state.threshold = False, threshold
    return MatMul8bitLt.apply(x, codes, None, bias, state)


@pytest.fixture
def their_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "PRODUCT_UNIT", 6.200124e-05)


# --- quantizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.5, 6.0, 1e9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_bitsandbytes(dtype: torch.dtype, threshold: float):
    found = 0
    for leading, features, _ in SHAPES:
        x = activations(*leading, features).to(dtype)
        before = x.clone()
        ours, ours_absmax, ours_columns = quantize_rows(x, threshold)
        assert torch.equal(x, before), "the input is the caller's"
        theirs, theirs_absmax, theirs_columns = theirs_functional.int8_vectorwise_quant(
            x.reshape(-1, features).clone(), threshold
        )
        assert same(ours, theirs.view(x.shape)), x.shape
        assert same(ours_absmax, theirs_absmax), x.shape
        assert same(ours_columns, torch.empty(0).long() if theirs_columns is None else theirs_columns), x.shape
        found += len(ours_columns)
    assert (found > 0) == (threshold in (0.5, 6.0)), "columns with outliers and columns without were meant to be there"


def matrices(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    """One to four rows of six."""
    return st.lists(st.lists(values, min_size=6, max_size=6), min_size=1, max_size=4)


FP32_VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)
FP16_VALUES = st.integers(-0x7BFF, 0x7BFF).map(  # magnitudes by bit pattern: as many tiny ones as large ones
    lambda pattern: float(np.uint16(abs(pattern)).view(np.float16)) * (1 if pattern > 0 else -1)
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(values=matrices(FP32_VALUES), threshold=st.sampled_from([0.0, 1.0, 6.0]))
def test_any_values_equal_numpy(values: list[list[float]], threshold: float):
    """Zeros, denormals, huge and repeated values, in NumPy's fp32, which divides and rounds to even like ours."""
    x = np.array(values, dtype=np.float32)
    outlier = (np.abs(x) >= threshold) & (threshold > 0)
    absmax = np.where(outlier, 0, np.abs(x)).max(axis=1).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = np.float32(1) / absmax * np.float32(127)
        scaled = np.rint(x * np.where(np.isinf(scale), 0, scale)[:, None])
    scaled[:, outlier.any(axis=0)] = 0
    codes, found_absmax, columns = quantize_rows(torch.from_numpy(x), threshold)
    assert np.array_equal(codes.numpy(), scaled)
    assert np.array_equal(found_absmax.numpy(), absmax)
    assert columns.tolist() == np.flatnonzero(outlier.any(axis=0)).tolist()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(values=matrices(FP16_VALUES))
def test_round_trip_bound(values: list[list[float]]):
    """Half a step, absmax/254, and roundings, each at most 2^-24 of the absmax.

    Before the code is chosen: the reciprocal, 127 x it, x times that. After: code x absmax, the constant 1/127, their
    product. Six, and a seventh for what they do to each other.
    """
    x = torch.tensor(values).half()
    codes, absmax, _ = quantize_rows(x)
    error = (dequantize_rows(codes, absmax).double() - x.double()).abs()
    assert (error <= absmax.double().unsqueeze(1) * (1 / 254 + 7 * 2**-24)).all()
    assert (codes.abs() <= 127).all()


@settings(deadline=None, derandomize=True, max_examples=50)
@given(values=matrices(FP16_VALUES), power=st.integers(-60, 60))
def test_powers_of_two_change_the_scale_only(values: list[list[float]], power: int):
    x = torch.tensor(values)  # fp32, where multiplying these by 2^-60 to 2^60 loses nothing
    codes, absmax, _ = quantize_rows(x)
    scaled_codes, scaled_absmax, _ = quantize_rows(x * 2.0**power)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(absmax * 2.0**power, scaled_absmax)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(values=matrices(FP16_VALUES), seed=st.integers(0, 99))
def test_permuted_rows_and_columns(values: list[list[float]], seed: int):
    x = torch.tensor(values)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in x.shape)
    codes, absmax, outliers = quantize_rows(x, 6.0)
    moved_codes, moved_absmax, moved_outliers = quantize_rows(x[rows][:, columns], 6.0)
    assert torch.equal(moved_codes, codes[rows][:, columns])
    assert torch.equal(moved_absmax, absmax[rows])
    assert sorted(columns[moved_outliers].tolist()) == outliers.tolist()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_zero_rows(threshold: float):
    """No NaN on the way: code 0, scale 0. With a threshold, a row of outliers only is one, too."""
    x = activations(5, 9, outliers=0)
    x[[1, 3]] = 0
    x[4] = 7
    codes, absmax, columns = quantize_rows(x, threshold)
    assert (codes[[1, 3]] == 0).all() and (absmax[[1, 3]] == 0).all()
    assert len(columns) == (9 if threshold else 0)
    assert (codes[4] == (0 if threshold else 127)).all()
    assert absmax[4] == (0 if threshold else 7)
    tiny, tiny_absmax, _ = quantize_rows(torch.tensor([[1e-40, -3e-37], [1e-36, -4e-37]]))
    assert tiny.tolist() == [[0, 0], [127, -51]], "127 / 3e-37 exceeds fp32; 127 * 0.4 = 50.8"
    assert tiny_absmax.tolist() == torch.tensor([3e-37, 1e-36]).tolist()


def test_views_are_read_in_logical_order():
    for x in (torch.randn(33, 17).T, torch.randn(40, 20)[::2, 1:8], torch.randn(1, 9).expand(4, 9)):
        assert not x.is_contiguous()
        for ours, contiguous in zip(quantize_rows(x, 1.5), quantize_rows(x.contiguous(), 1.5), strict=True):
            assert torch.equal(ours, contiguous)


def test_the_picture():
    """The numbers in the module's docstring."""
    x = torch.tensor([[0.4, -61.0, 1.2, -0.3], [-1.1, -58.5, 0.2, 2.5]])
    codes, absmax, columns = quantize_rows(x, 6.0)
    assert codes.tolist() == [[42, 0, 127, -32], [-56, 0, 10, 127]]
    assert absmax.tolist() == torch.tensor([1.2, 2.5]).tolist()
    assert columns.tolist() == [1]
    codes, absmax, columns = quantize_rows(x)
    assert codes.tolist() == [[1, -127, 2, -1], [-2, -127, 0, 5]]
    assert absmax.tolist() == [61.0, 58.5]
    assert columns.tolist() == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_equals_bitsandbytes_layer(dtype: torch.dtype):
    """Cast to fp16 even from bf16: some of these values are below 2^-14, where fp16 has fewer bits than bf16."""
    linear = nn.Linear(70, 33).to(dtype)
    with torch.no_grad():
        linear.weight[::2] *= 2**-16
    theirs = bitsandbytes.nn.Linear8bitLt(70, 33, has_fp16_weights=False)
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu")
    assert theirs.weight.dtype == torch.int8
    codes, absmax = quantize_weight_int8(linear.weight)
    assert same(codes, theirs.weight.data)
    assert same(absmax, theirs.state_dict()["SCB"])
    if dtype != torch.float16:
        assert not torch.equal(codes, quantize_rows(linear.weight)[0]), "the cast was meant to matter here"


def test_book_layer():
    """Chapter 2 of the book: a 10 x 10 layer, seed 11; the scale is that of the fp16 weight."""
    torch.manual_seed(11)
    weight = nn.Linear(10, 10).weight
    codes, absmax = quantize_weight_int8(weight)
    assert codes[0].tolist() == [-92, -4, 127, -87, 22, 51, 22, -97, 19, 111]
    assert f"{absmax[0]:.4f}" == "0.3071"
    assert f"{weight[0].abs().max():.4f}" == "0.3072"


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_equals_bitsandbytes(dtype: torch.dtype):
    codes, absmax, _ = quantize_rows(activations(50, 71))
    theirs = theirs_functional.int8_vectorwise_dequant(codes, absmax)
    assert theirs.dtype == torch.float32
    assert same(dequantize_rows(codes, absmax, dtype), theirs.to(dtype))
    assert same(dequantize_rows(codes.view(5, 10, 71), absmax, dtype), theirs.to(dtype).view(5, 10, 71))


# --- the integer product ---------------------------------------------------------------------------------------------

PRODUCTS = [(1, 1, 1), (1, 7, 3), (5, 16, 16), (16, 17, 33), (17, 64, 8), (31, 65, 1), (40, 1041, 9), (0, 5, 4)]


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_product_equals_numpy(device: str):
    for rows, features, out_features in PRODUCTS:
        a, b = random_codes(rows, features), random_codes(out_features, features)
        ours = int8_matmul(a.to(device), b.to(device))
        assert ours.dtype == torch.int32 and ours.is_contiguous()
        assert np.array_equal(ours.cpu().numpy(), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_product_is_exact_up_to_its_limit(device: str):
    """1041 products of 127^2 pass 2^24 with an odd sum, which fp32 does not have; 131071 of 128^2 nearly fill int32."""
    ours = int8_matmul(*torch.full((2, 1, 1041), 127, dtype=torch.int8, device=device))
    assert ours.item() == 1041 * 127**2
    assert ours.item() != ours.float().item()
    ours = int8_matmul(*torch.full((2, 1, 2**17 - 1), -128, dtype=torch.int8, device=device))
    assert ours.item() == (2**17 - 1) * 2**14


@pytest.mark.parametrize(("rows", "features", "out_features"), PRODUCTS)
def test_product_by_floats_equals_numpy(rows: int, features: int, out_features: int):
    for a, b in ((random_codes(rows, features), random_codes(out_features, features)),
                 torch.full((2, max(rows, 1), features), -128, dtype=torch.int8)):  # fmt: skip
        ours = int8._int8_matmul_by_floats(a, b)
        assert ours.dtype == torch.int32
        assert np.array_equal(ours.numpy(), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)


def test_product_on_a_cpu_that_cuts_sums_of_pairs(monkeypatch: pytest.MonkeyPatch):
    """As oneDNN does without VNNI: (a + 128) b of two neighbours added in int16, then 128 sum(b) taken off."""

    def cutting(a: Tensor, b: Tensor) -> Tensor:
        products = (a.int() + 128).unsqueeze(-1) * b.int()
        pairs = products.view(len(a), -1, 2, b.shape[1]).sum(2).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(1) - 128 * b.int().sum(0)).int()

    monkeypatch.setattr(torch, "_int_mm", cutting)
    int8._has_byte_products.cache_clear()
    try:
        a, b = random_codes(5, 64), random_codes(7, 64)
        exact = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
        assert not np.array_equal(cutting(a, b.T).numpy(), exact)
        assert np.array_equal(int8_matmul(a, b).numpy(), exact)
    finally:
        int8._has_byte_products.cache_clear()


def test_product_with_onednn_held_to_avx2():
    program = (
        "import torch; from minift.quant.int8 import int8_matmul; torch.manual_seed(0); "
        "a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((9, 300), (17, 300))); "
        "print(torch.equal(int8_matmul(a, b).long(), a.long() @ b.long().T))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_product_of_views():
    a, b = random_codes(65, 20).T, random_codes(9, 130)[:, ::2]
    assert np.array_equal(int8_matmul(a, b).numpy(), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)


def test_padding_for_cublas(monkeypatch: pytest.MonkeyPatch):
    """What runs on a GPU, on a CPU: sizes that cuBLAS takes, the same product, and no copy of a well-shaped weight."""
    seen = []
    multiply = torch._int_mm

    def strict(a: Tensor, b: Tensor) -> Tensor:
        seen.append(b)
        assert a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        assert a.is_contiguous() and b.T.is_contiguous()
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    for rows, features, out_features in PRODUCTS:
        a, b = random_codes(rows, features), random_codes(out_features, features)
        ours = int8._int8_matmul_padded(a, b)
        assert ours.is_contiguous()
        assert np.array_equal(ours.numpy(), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)
    assert len(seen) == len(PRODUCTS)
    weight = random_codes(48, 64)
    int8._int8_matmul_padded(random_codes(1, 64), weight)
    assert seen[-1].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(("rows", "features", "out_features"), PRODUCTS)
def test_operator_passes_opcheck(rows: int, features: int, out_features: int):
    """Schema, fake tensor, autograd registration and tracing with fixed and symbolic shapes."""
    arguments = (random_codes(rows, features), random_codes(out_features, features))
    torch.library.opcheck(torch.ops.minift.int8_matmul.default, arguments)


# --- the layer -------------------------------------------------------------------------------------------------------


def forward_and_gradients(linear, x: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor | None, threshold, grad_y):
    """y, dy/dx and, with a bias for a matrix x, dy/dbias."""
    x = x.detach().clone().requires_grad_()
    if bias is not None:
        bias = bias.detach().clone().requires_grad_(x.ndim == 2)
    y = linear(x, *weight, bias, threshold)
    wanted = [tensor for tensor in (x, bias) if tensor is not None and tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad_y)]


@pytest.mark.usefixtures("their_constant")
@pytest.mark.parametrize("threshold", [0.0, 6.0, 1e-3, 1e3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_equals_bitsandbytes(dtype: torch.dtype, bias: bool, threshold: float):
    """Some outlier columns, nearly all, none (1000), and no split; forward and every gradient."""
    for leading, features, out_features in SHAPES:
        weight = quantize_weight_int8(torch.randn(out_features, features).to(dtype))
        x, grad_y = activations(*leading, features).to(dtype), torch.randn(*leading, out_features).to(dtype)
        bias_o = torch.randn(out_features).to(dtype) if bias else None
        ours = forward_and_gradients(int8_linear, x, weight, bias_o, threshold, grad_y)
        theirs = forward_and_gradients(theirs_linear, x, weight, bias_o, threshold, grad_y)
        assert len(ours) == len(theirs) == (3 if bias and len(leading) == 1 else 2)
        for our, their in zip(ours, theirs, strict=True):
            assert same(our, their), (leading, features, out_features)


@pytest.mark.usefixtures("their_constant")
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_layer_equals_bitsandbytes_module(threshold: float):
    """From the floating-point weight on, through their module in evaluation mode."""
    linear = nn.Linear(70, 33)
    theirs = bitsandbytes.nn.Linear8bitLt(70, 33, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu").eval()
    x = activations(4, 7, 70)
    ours = int8_linear(x, *quantize_weight_int8(linear.weight), linear.bias, threshold)
    assert same(ours.detach(), theirs(x).detach())


def test_product_unit_is_exact():
    """Against float64: three fp32 products and the constant are rounded: 4 x 2^-24, and one more for cross terms.

    The sum of codes is below 2^24, so that turning it into fp32 is exact. bitsandbytes' constant is 1.8e-5 too large.
    """
    codes, absmax = quantize_weight_int8(torch.randn(31, 65))
    x = activations(17, 65)
    x_codes, x_absmax, _ = quantize_rows(x.half())
    sums = x_codes.numpy().astype(np.float64) @ codes.numpy().astype(np.float64).T
    exact = torch.from_numpy(sums) * x_absmax.double().unsqueeze(1) * absmax.double() / 127**2
    slack = 5 * 2**-24 * exact.abs()
    ours, theirs = int8_linear(x, codes, absmax).double(), theirs_linear(x, codes, absmax, None, 0.0).double()
    assert ((ours - exact).abs() <= slack).all()
    assert ((theirs - exact * (6.200124e-05 * 127**2)).abs() <= 2 * slack).all()
    assert (theirs - exact).abs().sum() > 1.7e-5 * exact.abs().sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_is_added_before_the_only_rounding(dtype: torch.dtype):
    """Without outliers: fp32 up to the end, whatever the dtypes of x and the bias are."""
    codes, absmax = quantize_weight_int8(torch.randn(31, 65))
    x = torch.randn(17, 65).half()  # exact in fp32; casting it to bf16 would change x itself
    x = x.bfloat16().half() if dtype == torch.bfloat16 else x
    bias = torch.randn(31)
    wide = int8_linear(x.float(), codes, absmax, bias)
    assert same(int8_linear(x.to(dtype), codes, absmax, bias), wide.to(dtype))
    assert same(wide, int8_linear(x.float(), codes, absmax) + bias)


@pytest.mark.parametrize("shape", [(65,), (1, 65), (2, 3, 65), (2, 1, 3, 65), (0, 65), (2, 0, 65)])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_leading_dimensions(shape: tuple[int, ...], threshold: float):
    """Any number of them, none included, gives the rows of the matrix product; and gradients of the same shapes."""
    codes, absmax = quantize_weight_int8(torch.randn(31, 65))
    bias = torch.randn(31, requires_grad=True)
    x = activations(*shape).requires_grad_()
    y = int8_linear(x, codes, absmax, bias, threshold)
    assert y.shape == (*shape[:-1], 31)
    grad_y = torch.randn(y.shape)
    grad_x, grad_bias = torch.autograd.grad(y, [x, bias], grad_y)
    flat = x.detach().reshape(-1, 65).clone().requires_grad_()
    flat_y = int8_linear(flat, codes, absmax, bias, threshold)
    flat_grad_x, flat_grad_bias = torch.autograd.grad(flat_y, [flat, bias], grad_y.reshape(-1, 31))
    assert torch.equal(y, flat_y.view(y.shape)) and torch.equal(grad_x, flat_grad_x.view(shape))
    assert torch.equal(grad_bias, flat_grad_bias)
    # 6 rows at most, summed in any order: five additions, each 2^-24 of the sum of magnitudes.
    rows = grad_y.reshape(-1, 31).double()
    assert ((grad_bias - rows.sum(0)).abs() <= 5 * 2**-24 * rows.abs().sum(0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_column_an_outlier(dtype: torch.dtype):
    """A threshold below every |x| leaves nothing in 8 bits: plain x W^T with the decoded weight.

    Sums of 65 products in fp32 (at most 66 roundings of 2^-24 of the sum of magnitudes), then a rounding to the dtype
    of x for the product and one for adding it to the (zero) integer part.
    """
    weight = torch.randn(31, 65)
    codes, absmax = quantize_weight_int8(weight)
    x = (torch.rand(17, 65) + 0.5).to(dtype)
    decoded = theirs_functional.int8_vectorwise_dequant(codes, absmax).to(dtype).double()
    exact = F.linear(x.double(), decoded)
    bound = 66 * 2**-24 * F.linear(x.double(), decoded.abs()) + 2.01 * ROUNDOFF[dtype] * exact.abs()
    assert ((int8_linear(x, codes, absmax, threshold=0.5).double() - exact).abs() <= bound).all()


def test_outlier_columns_save_the_others():
    """The error against the full-precision product with the decoded weight, when two columns hold values of 60.

    With the split, every other value of x is off by at most half a step (5.9/254, since 5.9 is the largest) and its
    cast to fp16 (2^-11 relative), which the weights of its features multiply. Those, the scales and the two outlier
    columns are rounded fewer than 16 times, each 2^-24 of the sum of magnitudes.
    """
    x = torch.randn(40, 200).clamp(-5.9, 5.9)
    x[:, [3, 77]] = 60 * torch.randn(40, 2).sign()
    codes, absmax = quantize_weight_int8(torch.randn(50, 200))
    decoded = theirs_functional.int8_vectorwise_dequant(codes, absmax).double()
    exact = F.linear(x.double(), decoded)
    split, plain = ((int8_linear(x, codes, absmax, threshold=t) - exact).abs() for t in (6.0, 0.0))
    bound = 5.9 * (1 / 254 + 2**-11) * decoded.abs().sum(1) + 16 * 2**-24 * F.linear(x.double().abs(), decoded.abs())
    assert (split <= bound).all()
    assert split.mean() < plain.mean() / 5


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 2**31), power=st.integers(-5, 5))
def test_symmetries_of_the_layer(seed: int, power: int):
    """Rows, outputs and features may be permuted and x scaled by a power of two, to the bit.

    Without a split: its sums of floating-point products depend on the order.
    """
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(6, 20, generator=generator), torch.randn(9, 20, generator=generator)
    # Multiples of 2^-8, so that neither fp16 cast rounds, and 2^-5 of them is still a normal number of fp16.
    x, weight = (x * 2**8).round() / 2**8, (weight * 2**8).round() / 2**8
    rows, features, outputs = (torch.randperm(size, generator=generator) for size in (6, 20, 9))
    y = int8_linear(x, *quantize_weight_int8(weight))
    moved = int8_linear(x[rows][:, features], *quantize_weight_int8(weight[outputs][:, features]))
    assert torch.equal(moved, y[rows][:, outputs])
    assert torch.equal(int8_linear(x * 2.0**power, *quantize_weight_int8(weight)), y * 2.0**power)


@pytest.mark.usefixtures("their_constant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_beyond_fp16(dtype: torch.dtype):
    """The cast to fp16 makes them infinite: an outlier like any other, or without a threshold a row of NaN."""
    codes, absmax = quantize_weight_int8(torch.randn(31, 65))
    x = torch.randn(5, 65).to(dtype)
    x[2, 7], x[3, 8] = 1e5, -3e38
    split, plain = (int8_linear(x, codes, absmax, threshold=threshold) for threshold in (6.0, 0.0))
    assert same(split, theirs_linear(x, codes, absmax, None, 6.0))
    assert split[2].isfinite().all()
    # 1e5 times a decoded weight that is not 0, so 1/127 of its row's absmax at least, outweighs 64 ordinary products.
    assert (split[2].sign() == codes[:, 7].sign())[codes[:, 7] != 0].all()
    assert same(plain, theirs_linear(x, codes, absmax, None, 0.0))
    assert plain.isnan().all(dim=1).tolist() == [False, False, True, True, False]
    assert plain[[0, 1, 4]].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_values_that_are_not_finite_spoil_their_row_only(bad: float, threshold: float):
    codes, absmax = quantize_weight_int8(torch.randn(31, 65))
    x = torch.randn(5, 65)
    x[2, 7] = bad
    y = int8_linear(x, codes, absmax, threshold=threshold)
    assert not y[2].isfinite().any()
    if threshold == 0:
        assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


def test_codes_of_an_infinite_row_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    """What a cast makes of NaN is up to the processor: with any other integer sums, the row is NaN all the same."""
    codes, absmax = quantize_weight_int8(torch.randn(31, 65))
    x = torch.randn(5, 65)
    x[2, 7] = 1e5
    monkeypatch.setattr(int8, "int8_matmul", lambda a, b: torch.full((len(a), len(b)), -7, dtype=torch.int32))
    assert int8_linear(x, codes, absmax).isnan().all(dim=1).tolist() == [False, False, True, False, False]


def test_zeros_give_the_bias():
    weight = torch.randn(31, 65)
    weight[4] = 0
    codes, absmax = quantize_weight_int8(weight)
    bias, x = torch.randn(31), activations(5, 65)
    x[1] = 0
    for threshold in (0.0, 6.0):
        y = int8_linear(x, codes, absmax, bias, threshold)
        assert torch.equal(y[1], bias)
        assert torch.equal(y[:, 4], bias[4].expand(5))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("device", [CUDA])
def test_layer_on_a_gpu(device: str, threshold: float):
    """The CPU's numbers: without a split to the bit (elementwise fp32 operations on an exact integer sum).

    With it, up to the order in which two columns are multiplied and added to it: at most 6 roundings a side, each 2^-24
    of the sum of magnitudes.
    """
    for leading, features, out_features in SHAPES:
        codes, absmax = quantize_weight_int8(torch.randn(out_features, features))
        x = activations(*leading, features)
        cpu = int8_linear(x, codes, absmax, threshold=threshold)
        gpu = int8_linear(x.to(device), codes.to(device), absmax.to(device), threshold=threshold).cpu()
        magnitude = F.linear(x.abs(), dequantize_rows(codes, absmax).abs())
        assert ((gpu - cpu).abs() <= (12 * 2**-24 if threshold else 0) * magnitude).all()


# --- what is trained, what is kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_nothing_is_kept_but_the_codes(threshold: float):
    codes, absmax = quantize_weight_int8(torch.randn(31, 65))
    x, bias = activations(17, 65).requires_grad_(), torch.randn(31, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = int8_linear(x, codes, absmax, bias, threshold)
    assert [tensor.data_ptr() for tensor in kept] == [codes.data_ptr(), absmax.data_ptr()]
    before = codes.clone(), absmax.clone()
    y.sum().backward()
    assert torch.equal(codes, before[0]) and torch.equal(absmax, before[1])


def test_only_what_is_asked_for_gets_a_gradient():
    codes, absmax = quantize_weight_int8(torch.randn(31, 65))
    assert not int8_linear(torch.randn(2, 65), codes, absmax, torch.randn(31)).requires_grad
    bias = torch.randn(31, requires_grad=True)
    int8_linear(torch.randn(2, 65), codes, absmax, bias).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((31,), 2.0))
    x = torch.randn(2, 65, requires_grad=True)
    int8_linear(x, codes, absmax, bias.detach()).sum().backward()
    assert x.grad is not None and absmax.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gradient_has_the_dtype_of_the_bias(dtype: torch.dtype):
    codes, absmax = quantize_weight_int8(torch.randn(31, 65))
    bias = torch.randn(31).requires_grad_()
    grad_y = torch.randn(4, 31).to(dtype)
    (grad,) = torch.autograd.grad(int8_linear(torch.randn(4, 65).to(dtype), codes, absmax, bias), [bias], grad_y)
    assert grad.dtype == torch.float32
    # Four numbers summed in fp32, in any order: three additions.
    assert ((grad - grad_y.double().sum(0)).abs() <= 3 * 2**-24 * grad_y.double().abs().sum(0)).all()


def test_codes_changed_before_the_backward_pass_are_noticed():
    codes, absmax = quantize_weight_int8(torch.randn(31, 65))
    y = int8_linear(torch.randn(2, 65, requires_grad=True), codes, absmax)
    codes.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64, torch.float64])
def test_wrong_dtype_is_refused(dtype: torch.dtype):
    x, codes, absmax = torch.ones(2, 4, dtype=dtype), torch.ones(3, 4, dtype=torch.int8), torch.ones(3)
    for call in (quantize_rows, quantize_weight_int8, lambda x: int8_linear(x, codes, absmax)):
        with pytest.raises(ValueError, match=str(dtype)):
            call(x)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0)])
def test_empty_is_refused(shape: tuple[int, ...]):
    for call in (quantize_rows, quantize_weight_int8):
        with pytest.raises(ValueError, match="at least one row"):
            call(torch.ones(shape)[..., :0] if shape else torch.ones(()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_is_refused(bad: float, dtype: torch.dtype):
    x = torch.randn(4, 9).to(dtype)
    x[3, 8] = bad
    for call in (quantize_rows, quantize_weight_int8):
        with pytest.raises(ValueError, match="NaN" if bad != bad else "infinite"):
            call(x)
    if bad != bad:
        with pytest.raises(ValueError, match="NaN"):
            quantize_rows(x, 6.0)
    else:
        assert quantize_rows(x, 6.0)[2].tolist() == [8], "an infinity is an outlier"


def test_weight_beyond_fp16_is_refused():
    """Up to 65519 the cast rounds down to 65504; from 65520 on it is infinite."""
    weight = torch.ones(2, 3)
    weight[1, 1] = -65519.0
    assert quantize_weight_int8(weight)[1].tolist() == [1, 65504]
    weight[1, 1] = -65520.0
    with pytest.raises(ValueError, match=r"65520.*65504"):
        quantize_weight_int8(weight)
    with pytest.raises(ValueError, match="65504"):
        quantize_weight_int8(torch.full((2, 3), 1e38, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="matrix"):
        quantize_weight_int8(torch.ones(3))


@pytest.mark.parametrize("threshold", [-1.0, -float("inf"), float("nan")])
def test_bad_threshold_is_refused(threshold: float):
    with pytest.raises(ValueError, match="threshold"):
        quantize_rows(torch.ones(2, 3), threshold)
    with pytest.raises(ValueError, match="threshold"):
        int8_linear(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int8), torch.ones(4), threshold=threshold)


def test_parts_that_do_not_fit_are_refused():
    x, codes, absmax, bias = torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int8), torch.ones(4), torch.ones(4)
    int8_linear(x, codes, absmax, bias)
    wrong = [
        ((torch.ones(2, 4), codes, absmax, bias), "does not fit"),
        ((torch.ones(()), codes, absmax, bias), "does not fit"),
        ((x, codes[0], absmax[:1], bias), "does not fit"),
        ((x, codes.float(), absmax, bias), "codes must be int8"),
        ((x, codes.int(), absmax, bias), "codes must be int8"),
        ((x, codes, absmax[:3], bias), "absmax is"),
        ((x, codes, absmax.double(), bias), "absmax is"),
        ((x, codes, absmax.unsqueeze(1), bias), "absmax is"),
        ((x, codes, absmax, bias[:3]), "bias has shape"),
        ((x, codes, absmax, bias.unsqueeze(0)), "bias has shape"),
    ]
    for arguments, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            int8_linear(*arguments)
    with pytest.raises(ValueError, match="absmax is"):
        dequantize_rows(codes, absmax[:3])


def test_products_that_do_not_fit_are_refused():
    a = random_codes(2, 3)
    for b, sentence in [
        (random_codes(4, 2), "cannot multiply"),
        (random_codes(3), "cannot multiply"),
        (torch.ones(4, 3), "torch.float32"),
        (torch.ones(4, 3, dtype=torch.uint8), "torch.uint8"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            int8_matmul(a, b)
    with pytest.raises(ValueError, match="131071"):
        int8_matmul(*random_codes(2, 1, 2**17))
