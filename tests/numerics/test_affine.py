"""Integers with a scale, and histogram bins, against torch's own quantization, exact fractions, float64 and the book.

torch's fake quantization multiplies by 1 / scale where ours divides, so at a tie, and within one fp32 rounding of it,
the codes may differ by one; tests that compare codes leave those values out.
"""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.numerics import (
    Quantized,
    histogram_quantize,
    histogram_quantize_book,
    quantize_absmax,
    quantize_affine,
    quantize_with,
)

ALL_BITS = list(range(2, 17))


def slack(bits: int) -> float:
    """What fp32 adds to half a step, in steps. Numbers of up to 2^bits steps, each rounding 2^-24 of them at most:
    dividing and decoding (2); at the ends of the range also the scale (2) and the zero point before it is rounded (3).
    """
    return 7 * 2**bits * 2**-24


def rmse(ours: Tensor, x: Tensor) -> float:
    return (ours - x).square().mean().sqrt().item()


def book_weights() -> Tensor:
    """1000 x N(0, 0.07^2), seed 11."""
    return torch.randn(1000, generator=torch.Generator().manual_seed(11)) * 0.07


def lines(x: Tensor, dim: int | None) -> list[tuple[tuple[int, ...], Tensor]]:
    """Index and values of every part of a matrix that has a scale of its own."""
    if dim is None:
        return [((), x)]
    return [((i, 0) if dim == 0 else (0, i), x.select(dim, i)) for i in range(x.shape[dim])]


# --- the scales and zero points ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_absmax_scales(dim: int | None, bits: int):
    x = torch.randn(7, 5)
    ours = quantize_absmax(x, bits, dim)
    assert ours.scale.shape == ours.zero_point.shape == {None: (), 0: (7, 1), 1: (1, 5)}[dim]
    assert (ours.zero_point == 0).all()
    for index, line in lines(x, dim):
        largest = max(abs(value) for value in line.flatten().tolist())
        wanted = Fraction(largest) / (2 ** (bits - 1) - 1)
        assert abs(Fraction(ours.scale[index].item()) - wanted) <= wanted / 2**24  # one division, rounded


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("shift", [-9.0, -0.5, 0.0, 0.5, 9.0])
def test_affine_scales_and_zero_points(shift: float, dim: int | None, signed: bool, bits: int):
    """A range that lies around, above or below zero always includes it.

    Scale: two divisions and a difference of terms of equal sign, each rounded, 2 x 2^-24. Zero point: within a half of
    -low / scale, plus 2^16 steps x 3 x 2^-24.
    """
    x = torch.randn(4, 6) + shift
    ours = quantize_affine(x, bits, signed, dim)
    lowest = -(2 ** (bits - 1)) if signed else 0
    for index, line in lines(x, dim):
        low, high = min(0.0, line.min().item()), max(0.0, line.max().item())
        wanted = (Fraction(high) - Fraction(low)) / (2**bits - 1)
        assert abs(Fraction(ours.scale[index].item()) - wanted) <= wanted * 2 / 2**24
        exact = lowest - Fraction(low) / wanted
        assert abs(ours.zero_point[index].item() - exact) <= Fraction(1, 2) + Fraction(3, 2**8)
        assert lowest <= ours.zero_point[index].item() <= lowest + 2**bits - 1


def test_observer_of_torch_agrees():
    """torch.ao's observers choose 8-bit scales and zero points by the same rule, in fp32."""
    from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

    for x in (torch.randn(20, 30), torch.rand(20, 30) + 1, -torch.rand(20, 30) * 5 - 0.1):
        whole = MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
        rows = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_affine)
        for observer, ours in ((whole, quantize_affine(x)), (rows, quantize_affine(x, signed=True, dim=0))):
            observer(x)
            scale, zero_point = observer.calculate_qparams()
            # Two roundings more or less: 3 x 2^-24 relative, below 2^-22.
            torch.testing.assert_close(ours.scale.flatten(), scale, rtol=2**-22, atol=0)
            assert torch.equal(ours.zero_point.flatten(), zero_point.int())


# --- the codes --------------------------------------------------------------------------------------------------------


def off_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Where x / scale is farther from a tie than two roundings of 2^-24 of at most 2^16 steps can carry it."""
    steps = x.double() / scale.double()
    return (steps - steps.floor() - 0.5).abs() > 2**-7


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("signed", [False, True])
def test_codes_equal_torchs_fake_quantization(signed: bool, bits: int):
    """Including values that saturate: the scale is that of half of the range."""
    x = torch.randn(1000)
    fitted = quantize_affine(x / 2, bits, signed)
    ours = quantize_with(x, fitted.scale, fitted.zero_point, bits, signed)
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    theirs = torch.fake_quantize_per_tensor_affine(x, fitted.scale, fitted.zero_point, lowest, highest)
    sure = off_ties(x, fitted.scale)
    assert sure.float().mean() > 0.9
    assert torch.equal(ours.dequantize()[sure], theirs[sure])
    assert {lowest, highest} <= set(ours.codes.tolist())


@pytest.mark.parametrize("dim", [0, 1])
def test_codes_of_rows_and_columns_equal_torchs(dim: int):
    x = torch.randn(20, 30) * torch.rand(20, 1) * torch.rand(1, 30)
    ours = quantize_affine(x, 8, signed=True, dim=dim)
    theirs = torch.fake_quantize_per_channel_affine(x, ours.scale.flatten(), ours.zero_point.flatten(), dim, -128, 127)
    sure = off_ties(x, ours.scale)
    assert torch.equal(ours.dequantize()[sure], theirs[sure])


@pytest.mark.parametrize("bits", ALL_BITS)
def test_dtype_and_range_of_the_codes(bits: int):
    x = torch.randn(100, 100)
    small = bits <= 8
    absmax, unsigned, signed = quantize_absmax(x, bits), quantize_affine(x, bits), quantize_affine(x, bits, signed=True)
    assert absmax.codes.dtype == signed.codes.dtype == (torch.int8 if small else torch.int16)
    assert unsigned.codes.dtype == (torch.uint8 if small else torch.int32)
    half = 2 ** (bits - 1)
    assert absmax.codes.int().abs().max() == half - 1, "the code -2^(bits-1) is not used"
    assert (unsigned.codes.int().min(), unsigned.codes.int().max()) == (0, 2 * half - 1)
    assert (signed.codes.int().min(), signed.codes.int().max()) == (-half, half - 1)
    assert torch.equal(signed.codes.int() + half, unsigned.codes.int()) or bits > 8
    assert absmax.codes.shape == x.shape and absmax.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_computed_in_fp32(dtype: torch.dtype):
    x = torch.randn(50, 5).to(dtype)
    for quantize in (quantize_absmax, quantize_affine):
        ours, wanted = quantize(x), quantize(x.float())
        assert torch.equal(ours.codes, wanted.codes) and torch.equal(ours.scale, wanted.scale)
        assert ours.dequantize().dtype == torch.float32


def test_negative_dim_and_other_ranks():
    x = torch.randn(3, 4, 5)
    for dim in range(3):
        ours = quantize_affine(x, dim=dim)
        shape = [1, 1, 1]
        shape[dim] = x.shape[dim]
        assert list(ours.scale.shape) == shape
        assert torch.equal(ours.codes, quantize_affine(x, dim=dim - 3).codes)
    vector = quantize_absmax(torch.tensor([1.0, -2.0, 0.5]), dim=0)  # a scale for each number: codes of +-127 only
    assert vector.codes.tolist() == [127, -127, 127]
    assert quantize_absmax(torch.tensor(-3.0)).codes.item() == -127


# --- properties -------------------------------------------------------------------------------------------------------

VALUES = st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=40)
METHODS = {
    "absmax": lambda x, bits: quantize_absmax(x, bits),
    "unsigned": lambda x, bits: quantize_affine(x, bits),
    "signed": lambda x, bits: quantize_affine(x, bits, signed=True),
}
any_method = settings(deadline=None, derandomize=True, max_examples=300)


@any_method
@given(values=VALUES, bits=st.integers(2, 16), method=st.sampled_from(list(METHODS)))
def test_error_is_half_a_step(values: list[float], bits: int, method: str):
    """Everywhere, the ends included: rounding the zero point moves the grid by half a step at most.

    In float64.
    """
    x = torch.tensor(values)
    ours = METHODS[method](x, bits)
    step = ours.scale.double()
    assert ((ours.dequantize().double() - x.double()).abs() <= (0.5 + slack(bits)) * step).all()


@any_method
@given(values=VALUES, bits=st.integers(2, 16), method=st.sampled_from(list(METHODS)))
def test_decoding_and_encoding_again_changes_nothing(values: list[float], bits: int, method: str):
    """With the scale found at first: codes x scale / scale is off by 2 x 2^-24 of 2^16, far from the next tie."""
    ours = METHODS[method](torch.tensor(values), bits)
    again = quantize_with(ours.dequantize(), ours.scale, ours.zero_point, bits, signed=method != "unsigned")
    assert torch.equal(ours.codes, again.codes)
    assert torch.equal(ours.dequantize(), again.dequantize())


@any_method
@given(values=VALUES, bits=st.integers(2, 16), method=st.sampled_from(list(METHODS)))
def test_larger_values_have_larger_codes(values: list[float], bits: int, method: str):
    ours = METHODS[method](torch.tensor(sorted(values)), bits)
    assert (ours.codes.int().diff() >= 0).all()


@any_method
@given(values=VALUES, bits=st.integers(2, 16), method=st.sampled_from(list(METHODS)))
def test_zero_stays_zero(values: list[float], bits: int, method: str):
    ours = METHODS[method](torch.tensor([*values, 0.0]), bits)
    assert ours.dequantize()[-1] == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-45, -1e-40, 3e38])
def test_constant_tensors(value: float, bits: int, method: str):
    """No division by zero. The range reaches from zero to the value, so all but subnormals come back (2 roundings)."""
    ours = METHODS[method](torch.full((4,), value), bits)
    assert (ours.scale > 0).all() and ours.codes.unique().numel() == 1
    wanted = torch.full((4,), value) if abs(value) > 1e-38 else torch.zeros(4)
    torch.testing.assert_close(ours.dequantize(), wanted, rtol=2 * 2**-24, atol=0)


def test_rows_that_are_zero_do_not_disturb_others():
    x = torch.randn(3, 8).clamp(-4, 4)
    x[1] = 0
    for ours in (quantize_absmax(x, dim=0), quantize_affine(x, dim=0)):
        assert torch.equal(ours.dequantize()[1], torch.zeros(8))
        assert (ours.dequantize() - x).abs().max() < 0.0158  # half a step: at most 4/127/2 or 8/255/2 = 0.0157


def test_a_scale_for_each_row_is_better():
    """One large row widens every step of the tensor."""
    x = torch.randn(16, 64)
    x[0] *= 1000
    for quantize in (quantize_absmax, quantize_affine):
        assert rmse(quantize(x, dim=0).dequantize()[1:], x[1:]) < rmse(quantize(x).dequantize()[1:], x[1:]) / 50


@any_method
@given(values=VALUES, bits=st.integers(2, 16))
def test_error_of_the_histogram_is_half_a_bin(values: list[float], bits: int):
    """In float64. Slack: x - first and first + product are rounded (2^-24 of the largest magnitude each, twice), and
    the position in bins is off by 3 x 2^-24 of 2^16 bins, so a value may lie 2^-7 outside its bin.
    """
    x = torch.tensor(values)
    ours = histogram_quantize(x, bits)
    assert ours.codes.min() >= 0 and ours.codes.max() < 2**bits
    bound = (0.5 + 2**-7) * ours.width.double() + 4 * 2**-24 * x.abs().max().double()
    assert ((ours.dequantize().double() - x.double()).abs() <= bound).all()


# --- the book's numbers -----------------------------------------------------------------------------------------------


def test_book_histogram_edges():
    x = book_weights()
    assert (f"{x.min():.4f}", f"{x.max():.4f}") == ("-0.2066", "0.2097")
    book = histogram_quantize_book(x, 2)
    assert f"{book.width:.4f}" == "0.1041"
    edges = [book.first + k * book.width for k in range(5)]
    assert [f"{edge:.4f}" for edge in edges] == ["-0.2066", "-0.1026", "0.0015", "0.1056", "0.2097"]


@pytest.mark.parametrize(
    ("bits", "printed", "wanted"),
    [(2, "0.0615", 0.06153), (4, "0.0152", 0.01523), (8, "0.0010", 0.000965), (16, "0.0001", 0.000143)],
)
def test_book_histogram_rmse(bits: int, printed: str, wanted: float):
    x = book_weights()
    found = rmse(histogram_quantize_book(x, bits).dequantize(), x)
    assert f"{found:.4f}" == printed
    digits = len(f"{wanted:.10f}".rstrip("0")) - 2
    assert f"{found:.{digits}f}" == f"{wanted:.{digits}f}"


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_book_histogram_index_of_the_smallest_value(bits: int):
    """The book's index, argmin(w > bins) - 1, value by value. The smallest lies in no bin."""
    x = book_weights()[:: 1 if bits < 16 else 50]
    x = torch.cat([x, book_weights().aminmax().min[None], book_weights().aminmax().max[None]])
    edges = torch.linspace(float(x.min()), float(x.max()), 2**bits + 1)
    wanted = [int((value > edges).int().argmin()) - 1 for value in x]
    ours = histogram_quantize_book(x, bits)
    assert ours.codes.tolist() == wanted
    assert (ours.codes == -1).sum() == (x == x.min()).sum()
    assert histogram_quantize(x, bits).codes.min() == 0


@pytest.mark.parametrize(("bits", "wanted"), [(2, "0.0305"), (4, "0.00734"), (8, "0.000469"), (16, "1.84e-06")])
def test_book_histogram_without_its_defects(bits: int, wanted: str):
    x = book_weights()
    assert f"{rmse(histogram_quantize(x, bits).dequantize(), x):.3g}" == wanted


def test_book_histogram_width_of_16_bits():
    """The difference of two edges against the true width; 75 times the error."""
    x = book_weights()
    book, ours = histogram_quantize_book(x, 16), histogram_quantize(x, 16)
    assert f"{book.width:.4e}" == "6.3479e-06" and f"{ours.width:.4e}" == "6.3520e-06"
    exact = (x.max().double() - x.min().double()) / 2**16
    assert abs(ours.width.double() - exact) <= 2**-22 * exact
    ratio = rmse(book.dequantize(), x) / rmse(ours.dequantize(), x)
    assert 70 < ratio < 80


def test_book_float16_weights():
    x = book_weights()
    assert f"{rmse(x.half().float(), x):.4e}" == "1.4244e-05"


def test_book_float16_underflow():
    x = 1e-5 * torch.randn(1000, generator=torch.Generator().manual_seed(14))
    assert f"{(x.half().float() - x).square().mean():.4e}" == "2.8526e-16"
    assert (x.half() == 0).sum() == 4


def test_book_float16_overflow():
    x = 1e5 * torch.randn(1000, generator=torch.Generator().manual_seed(19))
    assert x.half().isinf().sum() == 500


def test_book_int8_layer():
    """A Linear(10, 10) of seed 11, cast to fp16 as on the GPU; one scale for each row."""
    torch.manual_seed(11)
    weight = torch.nn.Linear(10, 10).weight.detach()
    ours = quantize_absmax(weight.half(), 8, dim=0)
    assert ours.codes[0].tolist() == [-92, -4, 127, -87, 22, 51, 22, -97, 19, 111]
    assert f"{ours.scale[0, 0] * 127:.4f}" == "0.3071" and f"{weight[0].abs().max():.4f}" == "0.3072"


def test_book_note_on_the_zero_point():
    """Range -30 .. 100: scale 130/255, zero point 59. -50 lies outside and saturates."""
    fitted: Quantized = quantize_affine(torch.tensor([-30.0, -10.0, 0.0, 100.0]))
    assert f"{fitted.scale:.4f}" == "0.5098" and fitted.zero_point == 59
    assert fitted.codes.tolist() == [0, 39, 59, 255]
    outside = quantize_with(torch.tensor([-50.0, 150.0]), fitted.scale, fitted.zero_point)
    assert outside.codes.tolist() == [0, 255]
    # The other scale of the note: a range of 1000 in 8 bits.
    assert f"{quantize_affine(torch.tensor([0.0, 1000.0])).scale:.4f}" == "3.9216"


# --- what is refused --------------------------------------------------------------------------------------------------

FUNCTIONS = [quantize_absmax, quantize_affine, histogram_quantize, histogram_quantize_book]


@pytest.mark.parametrize("quantize", FUNCTIONS)
def test_bad_arguments_are_refused(quantize):
    for bits in (0, 1, 17, -8):
        with pytest.raises(ValueError, match=f"{bits} bits"):
            quantize(torch.ones(3), bits)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        quantize(torch.ones(3).int(), 8)
    with pytest.raises(ValueError, match="empty"):
        quantize(torch.ones(0, 3), 8)
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="infinite"):
            quantize(torch.tensor([1.0, bad]), 8)


@pytest.mark.parametrize("quantize", FUNCTIONS[:2])
@pytest.mark.parametrize("dim", [2, -3])
def test_dim_that_does_not_exist_is_refused(quantize, dim: int):
    with pytest.raises(ValueError, match=f"dim {dim}"):
        quantize(torch.ones(3, 3), dim=dim)
