"""8-bit blocks against an exact search in float64 (codes) and against bitsandbytes (dequantized values, bit for bit).

bitsandbytes' own codes are no reference on a CPU: it rounds to one of 65,536 cells first.
"""

import numpy as np
import pytest
import torch
from bitsandbytes import functional as theirs_functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.quant import dequantize_blockwise, dynamic_map, quantize_blockwise
from minift.quant.blockwise import BLOCKSIZES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 255, 256, 257, 4095, 4097, 10_000]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def nearest_even(x: np.ndarray, code: np.ndarray) -> np.ndarray:
    """The index of the nearest entry of a rising codebook, of two equally near ones the even one, in float64.

    The distances are differences of fp32 numbers. Near a tie the numbers have about the same size, so the differences
    are exact there, and elsewhere their rounding cannot matter.
    """
    x, code = x.astype(np.float64), code.astype(np.float64)
    below = np.clip(np.searchsorted(code, x, side="right") - 1, 0, len(code) - 1)
    above = np.clip(below + 1, 0, len(code) - 1)
    to_below, to_above = np.abs(x - code[below]), np.abs(code[above] - x)
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.where(up, above, below).astype(np.uint8)


def reference(x_n: np.ndarray, code: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """Block by block: scale with the reciprocal in fp32 (the kernel's arithmetic), then the nearest in float64."""
    codes, scales = [], []
    for start in range(0, len(x_n), blocksize):
        block = x_n[start : start + blocksize]
        absmax = np.abs(block).max()
        scales.append(absmax)
        codes.append(nearest_even(block * (np.float32(1) / max(absmax, np.float32(1e-38))), code))
    return np.concatenate(codes), np.array(scales, dtype=np.float32)


@pytest.mark.parametrize("blocksize", [64, 256, 4096])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(n: int, blocksize: int, signed: bool):
    x = torch.randn(n) * torch.rand(n)
    x = x if signed else x.square()
    codes, absmax = quantize_blockwise(x, dynamic_map(signed), blocksize)
    theirs_codes, theirs_absmax = reference(x.numpy(), dynamic_map(signed).numpy(), blocksize)
    np.testing.assert_array_equal(codes.numpy(), theirs_codes)
    np.testing.assert_array_equal(absmax.numpy(), theirs_absmax)


@pytest.mark.parametrize("absmax", [0.37, 3.3, 1e-30, 7e29])
@pytest.mark.parametrize("signed", [True, False])
def test_values_on_the_thresholds(signed: bool, absmax: float):
    """Every midpoint x absmax with its neighbours: here a division gives other codes than the reciprocal does."""
    code = dynamic_map(signed)
    midpoint = (code[:-1] + code[1:]) / 2 * absmax
    around = [midpoint, *(torch.nextafter(midpoint, torch.tensor(end)) for end in (-torch.inf, torch.inf))]
    block = torch.cat([torch.tensor([absmax]), *around])
    block = torch.cat([block, torch.zeros(1024 - len(block))])
    codes, _ = quantize_blockwise(block.repeat(2), code, 1024)
    theirs, _ = reference(block.repeat(2).numpy(), code.numpy(), 1024)
    np.testing.assert_array_equal(codes.numpy(), theirs)
    short, _ = quantize_blockwise(block, code, 4096)
    np.testing.assert_array_equal(short.numpy(), theirs[:1024])


@pytest.mark.parametrize("signed", [True, False])
def test_a_million_values_and_every_boundary(signed: bool):
    """Through the whole operator: each block begins with 1.0, so its other 255 values are not changed by the scaling.

    Every exact midpoint is tried with its fp32 neighbours, and more than a million values over nine decades.
    """
    random, code = np.random.default_rng(0), dynamic_map(signed).numpy()
    middle = ((code[:-1].astype(np.float64) + code[1:].astype(np.float64)) / 2).astype(np.float32)
    around = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    decades = 10 ** random.uniform(-9, 0, 1_100_000) * random.choice([-1, 1], 1_100_000)
    x = np.concatenate([middle, *around, code, decades]).astype(np.float32)
    x = np.concatenate([x, np.zeros(-len(x) % 255, np.float32)]).reshape(-1, 255)
    x = np.concatenate([np.ones((len(x), 1), np.float32), x], axis=1)
    codes, absmax = quantize_blockwise(torch.from_numpy(x), dynamic_map(signed))
    assert (absmax == 1).all()
    np.testing.assert_array_equal(codes.numpy(), nearest_even(x, code))


def test_a_codebook_of_ones_own():
    """Any 256 rising numbers: evenly spaced ones, say. These go through the table search, not the operator."""
    code = torch.linspace(-1, 1, 256)
    x = torch.randn(3000)
    codes, absmax = quantize_blockwise(x, code)
    theirs, scales = reference(x.numpy(), code.numpy(), 256)
    np.testing.assert_array_equal(codes.numpy(), theirs)
    np.testing.assert_array_equal(absmax.numpy(), scales)
    error = (dequantize_blockwise(codes, absmax, code) - x).abs()
    # Half a step of 2/255, and the four roundings of test_round_trip_bound.
    assert (error <= absmax.repeat_interleave(256)[:3000] * (1 / 255 + 2**-22)).all()


def test_ties_go_to_the_even_index():
    """With absmax 1 the midpoints pass the scaling unchanged; those that fp32 represents exactly are ties."""
    code = dynamic_map(True)
    exact = (code[:-1].double() + code[1:].double()) / 2
    x = torch.cat([torch.ones(1), exact[exact.float().double() == exact].float()])
    codes, _ = quantize_blockwise(x)
    assert len(codes) > 10
    assert (codes[1:] % 2 == 0).all()


def test_default_code_is_the_signed_map():
    x = torch.randn(1000)
    ours, theirs = quantize_blockwise(x), quantize_blockwise(x, dynamic_map(True), 256)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert torch.equal(dequantize_blockwise(*ours), dequantize_blockwise(*ours, dynamic_map(True), 256))


def worst_error(code: Tensor) -> float:
    """Largest distance of a number in [-1, 1] (unsigned: [0, 1]) from the codebook: half a gap, or beyond its ends."""
    lowest = -1.0 if code[0] < 0 else 0.0
    return max((code.diff().max() / 2).item(), code[0].item() - lowest, 1.0 - code[-1].item())


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    x=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300),
    blocksize=st.sampled_from([32, 64, 256]),
)
def test_round_trip_bound(x: list[float], blocksize: int):
    """No value is off by more than half the widest gap of the codebook times the scale of its block.

    Rounding adds: the reciprocal and the product with it (2 x 2^-24 of a number up to 1), the product on the way back
    (2^-24), each relative to absmax: less than 2^-22 together. Below TINY = 1e-38 the scale is not representable as a
    divisor; such a block may come back as zeros, 1e-38 off.
    """
    x_n = torch.tensor(x)
    codes, absmax = quantize_blockwise(x_n, blocksize=blocksize)
    error = (dequantize_blockwise(codes, absmax, blocksize=blocksize) - x_n).double().abs()
    scale = absmax.double().repeat_interleave(blocksize)[: len(x_n)]
    assert (error <= scale * (worst_error(dynamic_map(True)) + 2**-22) + 1e-38).all()


# Blocks for the properties below: no scale so small or large that a product could leave the normal range.
BLOCKS = st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=200).filter(
    lambda x: max(map(abs, x)) >= 2**-20
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(x=BLOCKS, power=st.integers(-60, 60), signed=st.booleans())
def test_a_power_of_two_scales_the_scale_alone(x: list[float], power: int, signed: bool):
    """Exact in floating point, so the codes must not change. (Values that vanish against the scale stay at zero.)"""
    x_n = torch.tensor([value if abs(value) >= 2**-60 else 0.0 for value in x])
    codes, absmax = quantize_blockwise(x_n, dynamic_map(signed), 32)
    moved_codes, moved_absmax = quantize_blockwise(x_n * 2.0**power, dynamic_map(signed), 32)
    assert torch.equal(codes, moved_codes)
    assert torch.equal(absmax * 2.0**power, moved_absmax)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(x=BLOCKS, signed=st.booleans())
def test_codes_rise_with_the_values_of_a_block(x: list[float], signed: bool):
    codes, _ = quantize_blockwise(torch.tensor(sorted(x)), dynamic_map(signed), 256)
    assert (codes.int().diff() >= 0).all()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    codes=st.lists(st.integers(0, 255), min_size=1, max_size=200),
    absmax=st.floats(2.0**-60, 2.0**60, width=32),
    signed=st.booleans(),
)
def test_decoded_codes_come_back(codes: list[int], absmax: float, signed: bool):
    """decode, encode: the same codes, if one of them is 255, whose value is 1.

    Then the scale is found again exactly. An entry times the scale, times the reciprocal, is off by three roundings
    (3 x 2^-24 relative), the gaps of the map are thousands of times wider.
    """
    held = torch.tensor([*codes, 255], dtype=torch.uint8)
    code, scale = dynamic_map(signed), torch.tensor([absmax])
    again, absmax_again = quantize_blockwise(dequantize_blockwise(held, scale, code), code)
    assert torch.equal(again, held) and torch.equal(absmax_again, scale)


def test_a_block_with_a_negative_largest_value_shrinks():
    """Why the property above asks for code 255: the signed map has no -1, so -1 comes back as -0.993, and so does the
    scale, at every round trip. bitsandbytes' map does the same; see dynamic_map."""
    lowest = dynamic_map(True)[0]
    x, scale = torch.tensor([-1.0, *torch.linspace(-0.9, 0.9, 100).tolist()]), torch.ones(1)
    for _ in range(3):
        codes, absmax = quantize_blockwise(x)
        assert codes[0] == 0 and torch.equal(absmax, scale)
        x, scale = dequantize_blockwise(codes, absmax), scale * lowest.abs()
    assert scale.item() == pytest.approx(0.993**3, abs=1e-3)


@pytest.mark.parametrize("blocksize", [64, 256])
def test_zero_blocks(blocksize: int):
    """A zero block keeps scale 0 and the code of zero, beside blocks that are not zero; also as a short last block."""
    x = torch.cat([torch.randn(blocksize), torch.zeros(blocksize), torch.randn(blocksize), torch.zeros(5)])
    codes, absmax = quantize_blockwise(x, blocksize=blocksize)
    assert (absmax[[1, 3]] == 0).all() and (absmax[[0, 2]] > 0).all()
    assert (codes[x == 0] == 127).all()
    assert (dequantize_blockwise(codes, absmax, blocksize=blocksize)[x == 0] == 0).all()
    unsigned, _ = quantize_blockwise(x.square(), dynamic_map(False), blocksize)
    assert (unsigned[x == 0] == 0).all()


@pytest.mark.parametrize("n", [257, 511, 512, 513])
def test_blocks_are_independent(n: int):
    """Quantizing the whole equals quantizing each block alone, the short last one included."""
    x = torch.randn(n)
    codes, absmax = quantize_blockwise(x)
    alone = [quantize_blockwise(block) for block in x.split(256)]
    assert torch.equal(codes, torch.cat([block[0] for block in alone]))
    assert torch.equal(absmax, torch.cat([block[1] for block in alone]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 300, 511])
def test_not_finite_is_refused(bad: float, position: int):
    x = torch.randn(512 - 100 if position == 300 else 512)  # position 300 lies in a short last block
    x[position] = bad
    with pytest.raises(ValueError, match="NaN" if bad != bad else "infinite"):
        quantize_blockwise(x)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_empty_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="empty"):
        quantize_blockwise(torch.empty(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 7), (2, 256)])
def test_shape_dtype_and_layout(shape: tuple[int, ...], dtype: torch.dtype):
    """Codes have the shape of x; 16-bit input is widened exactly; a transposed view is read in its logical order."""
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    codes, absmax = quantize_blockwise(x)
    wide_codes, wide_absmax = quantize_blockwise(x.float())
    assert codes.shape == x.shape and codes.dtype == torch.uint8 and absmax.dtype == torch.float32
    assert torch.equal(codes, wide_codes) and torch.equal(absmax, wide_absmax)
    assert torch.equal(x, before), "the input must not change"
    view = x.transpose(0, -1) if x.dim() > 1 else x
    assert torch.equal(quantize_blockwise(view)[0], quantize_blockwise(view.contiguous())[0])


def test_no_gradient_is_recorded():
    codes, absmax = quantize_blockwise(torch.randn(300, requires_grad=True))
    assert not absmax.requires_grad and not codes.requires_grad


@pytest.mark.parametrize("blocksize", [64, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
def test_dequantize_equals_bitsandbytes(blocksize: int, dtype: torch.dtype, signed: bool):
    code = dynamic_map(signed)
    for n in SIZES:
        codes = torch.randint(0, 256, (n,), dtype=torch.uint8)
        absmax = torch.rand(-(-n // blocksize)) * 100
        ours = dequantize_blockwise(codes, absmax, code, blocksize, dtype)
        theirs = theirs_functional.dequantize_blockwise(
            codes, theirs_functional.QuantState(absmax, code=code, blocksize=blocksize, dtype=dtype)
        )
        assert ours.dtype == dtype
        assert torch.equal(bits(ours), bits(theirs)), n


def test_dequantize_keeps_the_shape_and_takes_a_view():
    codes = torch.randint(0, 256, (6, 100), dtype=torch.uint8)
    absmax = torch.rand(3)
    ours = dequantize_blockwise(codes.T, absmax)
    assert ours.shape == (100, 6)
    assert torch.equal(ours, dequantize_blockwise(codes.T.contiguous(), absmax))


@pytest.mark.parametrize(("n", "scales"), [(600, 2), (600, 4), (1024, 1), (1024, 3), (1024, 5)])
def test_wrong_number_of_scales_is_refused(n: int, scales: int):
    """In blocks of 256, 600 codes have three scales and 1024 have four; a single one must not be spread over all."""
    with pytest.raises((ValueError, RuntimeError)):
        dequantize_blockwise(torch.zeros(n, dtype=torch.uint8), torch.ones(scales))


@pytest.mark.parametrize("blocksize", [0, -256, 1, 16, 31, 96, 255, 8192])
def test_bad_blocksize_is_refused(blocksize: int):
    with pytest.raises(ValueError, match="blocksize"):
        quantize_blockwise(torch.randn(64), blocksize=blocksize)
    with pytest.raises(ValueError, match="blocksize"):
        dequantize_blockwise(torch.zeros(64, dtype=torch.uint8), torch.ones(1), blocksize=blocksize)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_good_blocksizes(blocksize: int):
    codes, absmax = quantize_blockwise(torch.randn(2 * blocksize + 1), blocksize=blocksize)
    assert codes.shape == (2 * blocksize + 1,) and absmax.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float64])
def test_wrong_dtype_is_refused(dtype: torch.dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        quantize_blockwise(torch.ones(64, dtype=dtype))


@pytest.mark.parametrize("code", [torch.ones(255), torch.ones(256, dtype=torch.float64), torch.ones(16, 16)])
def test_wrong_codebook_is_refused(code: Tensor):
    """A short one would be read behind its end by a kernel."""
    with pytest.raises(ValueError, match="codebook"):
        quantize_blockwise(torch.ones(64), code)
    with pytest.raises(ValueError, match="codebook"):
        dequantize_blockwise(torch.zeros(64, dtype=torch.uint8), torch.ones(1), code)


def test_wrong_types_of_codes_and_scales_are_refused():
    codes, absmax = torch.zeros(64, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(ValueError, match="int32"):
        dequantize_blockwise(codes.int(), absmax)
    with pytest.raises(ValueError, match="float16"):
        dequantize_blockwise(codes, absmax.half())


@pytest.mark.parametrize("shape", [(1,), (33,), (3, 100), (4, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_pass_opcheck(shape: tuple[int, ...], dtype: torch.dtype):
    """Schema, fake tensor, autograd registration and tracing with fixed and symbolic shapes."""
    x = torch.randn(shape).to(dtype)
    torch.library.opcheck(torch.ops.minift.quantize_blockwise.default, (x, True, 256))
    codes, absmax = quantize_blockwise(x)
    arguments = (codes, absmax, dynamic_map(True), 256, dtype)
    torch.library.opcheck(torch.ops.minift.dequantize_blockwise.default, arguments)
