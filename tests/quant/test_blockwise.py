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

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 255, 256, 257, 4095, 4097, 10_000]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def reference(x_n: np.ndarray, code: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """Block by block: scale with the reciprocal in fp32 (the kernel's arithmetic), then the nearest in float64."""
    codes, scales = [], []
    wide = code.astype(np.float64)
    for start in range(0, len(x_n), blocksize):
        block = x_n[start : start + blocksize]
        absmax = np.abs(block).max()
        scales.append(absmax)
        normalized = (block * (np.float32(1) / max(absmax, np.float32(1e-38)))).astype(np.float64)
        distance = np.abs(normalized[:, None] - wide[None, :])
        nearest = distance == distance.min(1, keepdims=True)  # one entry, or two in a tie
        first = nearest.argmax(1)
        last = len(code) - 1 - nearest[:, ::-1].argmax(1)
        codes.append(np.where(first % 2 == 0, first, last))
    return np.concatenate(codes).astype(np.uint8), np.array(scales, dtype=np.float32)


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
    codes, _ = quantize_blockwise(block.repeat(2), code, len(block))
    theirs, _ = reference(block.repeat(2).numpy(), code.numpy(), len(block))
    np.testing.assert_array_equal(codes.numpy(), theirs)
    short, _ = quantize_blockwise(block, code, 4096)
    np.testing.assert_array_equal(short.numpy(), theirs[: len(block)])


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
    blocksize=st.sampled_from([1, 2, 7, 64, 256]),
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
