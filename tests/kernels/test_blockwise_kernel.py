"""The Triton kernels of 8-bit blocks against the PyTorch bodies of the same operators, bit for bit (see guards.py).

The body searches a table, the kernel computes the code; quant/test_blockwise.py holds the body against float64.
"""

import pytest
import torch
from guards import DEVICES, DTYPES, UnreadablePages, bits, guard_bands, on_cuda_path, skip_unless_pages_can_be_protected
from torch import Tensor

from minift.quant import dequantize_blockwise, dynamic_map, quantize_blockwise
from minift.quant.codebooks import nearest_dynamic

BLOCK = 256
# One value, around a block, around a program (4096 values), several programs with a rest.
SIZES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 4095, 4097, 3 * 4096, 3 * 4096 + 5]
CPU = torch.device("cpu")

pytestmark = pytest.mark.parametrize("device", DEVICES)


def quantize_guarded(x: Tensor, signed: bool, blocksize: int, device: str) -> tuple[Tensor, Tensor]:
    """Run the kernel between guard bands, check them, and return codes and scales on the CPU."""
    from minift_kernels.blockwise import quantize_blockwise

    n = x.numel()
    with guard_bands(device) as guards:
        out = (guards.output(n, torch.uint8), guards.output(-(-n // blocksize), torch.float32))
        boundaries = guards.input(nearest_dynamic(signed, CPU).boundaries)
        codes, absmax = quantize_blockwise(guards.input(x), boundaries, signed, blocksize, out=out)  # pyright: ignore
        assert codes.data_ptr() == out[0].data_ptr() and codes.shape == x.shape
        assert absmax.data_ptr() == out[1].data_ptr()
    return codes.cpu(), absmax.cpu()


def assert_quantized_alike(x: Tensor, signed: bool, blocksize: int, device: str) -> None:
    codes, absmax = quantize_guarded(x, signed, blocksize, device)
    theirs_codes, theirs_absmax = torch.ops.minift.quantize_blockwise(x, signed, blocksize)
    wrong = torch.nonzero(codes != theirs_codes).flatten()[:5]
    assert len(wrong) == 0, (x[wrong].tolist(), codes[wrong].tolist(), theirs_codes[wrong].tolist())
    assert torch.equal(bits(absmax), bits(theirs_absmax))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
def test_quantize_equals_the_pytorch_body(device: str, signed: bool, dtype: torch.dtype, n: int):
    x = torch.randn(n) * torch.rand(n)
    assert_quantized_alike((x if signed else x.square()).to(dtype), signed, BLOCK, device)


@pytest.mark.parametrize("blocksize", [32, 64, 2048, 4096])
@pytest.mark.parametrize("n", [4 * 4096, 4096 + 31, 2 * 4096 + 1])
def test_quantize_block_sizes(device: str, n: int, blocksize: int):
    assert_quantized_alike(torch.randn(n), True, blocksize, device)


def in_blocks_of_scale_one(x: Tensor) -> Tensor:
    """Each block begins with 1.0, so its scale is 1 and the other values reach the search as they are."""
    x = torch.cat([x, x.new_zeros(-len(x) % (BLOCK - 1))]).view(-1, BLOCK - 1)
    return torch.cat([x.new_ones(len(x), 1), x], dim=1).flatten()


@pytest.mark.parametrize("signed", [True, False])
def test_every_boundary_and_decade(device: str, signed: bool):
    """Each boundary and entry, both edges of each decade, and eight fp32 neighbours of each on both sides.

    That is where the guess may be one entry off, and where two corrections must not add up.
    """
    boundaries = nearest_dynamic(signed, CPU).boundaries
    edges = torch.tensor([10.0**-power for power in range(9)])
    here = torch.cat([boundaries, dynamic_map(signed), edges, -edges])
    around = (here.view(torch.int32)[:, None] + torch.arange(-8, 9, dtype=torch.int32)).view(torch.float32).flatten()
    around = torch.cat([around[around.abs() <= 1], torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38])])
    assert len(around) > 8000
    assert_quantized_alike(in_blocks_of_scale_one(around), signed, BLOCK, device)


@pytest.mark.parametrize("signed", [True, False])
def test_random_values_of_all_decades(device: str, signed: bool):
    """Half a million values, evenly over nine decades and evenly over [-1, 1]."""
    sign = torch.randint(0, 2, (1 << 18,)) * 2 - 1
    decades = 10 ** (torch.rand(1 << 18) * -9) * sign
    assert_quantized_alike(
        in_blocks_of_scale_one(torch.cat([decades, torch.rand(1 << 18) * 2 - 1])), signed, BLOCK, device
    )


@pytest.mark.parametrize("absmax", [0.37, 3.3, 1e-30, 7e29])
@pytest.mark.parametrize("signed", [True, False])
def test_quantize_values_on_the_thresholds(device: str, signed: bool, absmax: float):
    """Every midpoint x absmax with its neighbours: a division, or another reciprocal, gives other codes."""
    code = dynamic_map(signed)
    midpoint = (code[:-1] + code[1:]) / 2 * absmax
    around = [midpoint, *(torch.nextafter(midpoint, torch.tensor(end)) for end in (-torch.inf, torch.inf))]
    block = torch.cat([torch.tensor([absmax]), *around])
    assert_quantized_alike(block.repeat(2), signed, 1024, device)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [5 * BLOCK, 5 * BLOCK + 9])
def test_quantize_zero_and_denormal_blocks(device: str, n: int, signed: bool):
    x = torch.randn(n)
    x[BLOCK : 2 * BLOCK] = 0
    x[4 * BLOCK :] = 0
    assert_quantized_alike(x, signed, BLOCK, device)
    codes, absmax = quantize_guarded(x, signed, BLOCK, device)
    assert (absmax[[1, 4]] == 0).all() and (codes[x == 0] == (127 if signed else 0)).all()
    for scale in (1e-45, 1e-42, 9e-39, 1e-38, 1.2e-38, 1e-37):
        assert_quantized_alike(torch.randn(n) * scale, signed, BLOCK, device)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_lets_nan_and_infinity_through(device: str, dtype: torch.dtype, bad: float):
    """The scale shows them, and no code is looked for outside the tables."""
    x = torch.randn(3 * BLOCK + 5).to(dtype)
    x[[300, 3 * BLOCK + 2]] = bad
    _, absmax = quantize_guarded(x, True, BLOCK, device)
    assert absmax.isfinite().tolist() == [True, False, True, False]
    assert absmax[1].isnan() if bad != bad else absmax[1] == torch.inf


# --- dequantizing -----------------------------------------------------------------------------------------------------


def dequantize_guarded(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, device: str):
    from minift_kernels.blockwise import dequantize_blockwise

    with guard_bands(device) as guards:
        out = guards.output(codes.numel(), dtype)
        inputs = (guards.input(codes), guards.input(absmax), guards.input(code))
        result = dequantize_blockwise(*inputs, blocksize, dtype, out=out)  # pyright: ignore
        assert result.data_ptr() == out.data_ptr() and result.shape == codes.shape and result.dtype == dtype
    return result.cpu()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
def test_dequantize_equals_the_pytorch_body(device: str, blocksize: int, dtype: torch.dtype, n: int):
    """Any 256 numbers may be the codebook; scales from denormal to large, rounded once to the wanted dtype."""
    codes, code = torch.randint(0, 256, (n,), dtype=torch.uint8), torch.randn(256)
    absmax = 10 ** (torch.rand(-(-n // blocksize)) * 44 - 40)
    ours = dequantize_guarded(codes, absmax, code, blocksize, dtype, device)
    theirs = torch.ops.minift.dequantize_blockwise(codes, absmax, code, blocksize, dtype)
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
def test_operators(device: str, signed: bool, dtype: torch.dtype):
    """What the dispatcher calls for a CUDA tensor: also for views, and for tensors without elements."""
    x = torch.rand(65, 33).to(dtype)
    for view in (x, x.T, x[:, ::2]):
        ours = on_cuda_path("quantize_blockwise", view.to(device), signed, BLOCK)
        theirs = torch.ops.minift.quantize_blockwise(view, signed, BLOCK)
        assert ours[0].device.type == device and ours[0].shape == view.shape
        assert all(torch.equal(mine.cpu(), other) for mine, other in zip(ours, theirs, strict=True))
        arguments = (dynamic_map(signed).to(device), BLOCK, dtype)
        values = on_cuda_path("dequantize_blockwise", *ours, *arguments)
        wanted = dequantize_blockwise(theirs[0], theirs[1], dynamic_map(signed), BLOCK, dtype)
        assert torch.equal(values.cpu(), wanted)
        transposed = on_cuda_path("dequantize_blockwise", ours[0].T, ours[1], *arguments)
        assert torch.equal(
            transposed.cpu(), dequantize_blockwise(theirs[0].T, theirs[1], dynamic_map(signed), BLOCK, dtype)
        )
    codes, absmax = on_cuda_path("quantize_blockwise", torch.empty(0, 4, device=device), signed, BLOCK)
    assert codes.shape == (0, 4) and absmax.shape == (0,)
    assert on_cuda_path("dequantize_blockwise", codes, absmax, dynamic_map(signed), BLOCK, dtype).shape == (0, 4)


@pytest.mark.parametrize("n", [1, 65, 4097])
def test_reads_nothing_behind_its_inputs(device: str, n: int):
    """A load without its mask touches the unreadable page and ends the process with a segmentation fault."""
    skip_unless_pages_can_be_protected(device)
    from minift_kernels import blockwise

    pages, x = UnreadablePages(), torch.randn(n)
    x[:4] = torch.tensor([1.0, -1.0, torch.nan, 0.0])[:n]  # the ends of the tables
    boundaries = nearest_dynamic(True, CPU).boundaries
    codes, absmax = blockwise.quantize_blockwise(pages.before_page(x), pages.before_page(boundaries), True, BLOCK)  # pyright: ignore
    absmax = absmax.nan_to_num(1.0)
    inputs = [pages.before_page(tensor) for tensor in (codes, absmax, dynamic_map(True))]
    ours = blockwise.dequantize_blockwise(*inputs, BLOCK, torch.float32)  # pyright: ignore
    assert torch.equal(ours, dequantize_blockwise(codes, absmax))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
def test_equals_bitsandbytes_on_the_gpu(device: str, signed: bool, dtype: torch.dtype):
    """The same codes but within 2^-20 of a boundary (its reciprocal is approximate), there a neighbour at most.

    bitsandbytes takes its codebook as an argument, so both maps can be compared. Decoded values agree everywhere.
    """
    from bitsandbytes import functional as theirs_functional

    x = torch.randn(1 << 20, device=device)
    x = (x if signed else x.square()).to(dtype)
    code = dynamic_map(signed).to(device)
    codes, absmax = quantize_blockwise(x, code, BLOCK)
    theirs, state = theirs_functional.quantize_blockwise(x, code=code, blocksize=BLOCK)
    assert torch.equal(absmax, state.absmax)
    normalized = x.double() / absmax.double().repeat_interleave(BLOCK)
    middle = (code[:-1].double() + code[1:].double()) / 2
    nearest = middle[torch.bucketize(normalized, middle).clamp(max=254)]
    below = middle[(torch.bucketize(normalized, middle) - 1).clamp(min=0)]
    close = torch.minimum((normalized - nearest).abs(), (normalized - below).abs()) <= 2**-20 * normalized.abs()
    assert torch.equal(codes[~close], theirs[~close])
    assert ((codes.int() - theirs.int()).abs() <= 1).all()
    ours_values = dequantize_blockwise(theirs, state.absmax, code, BLOCK, dtype)
    assert torch.equal(ours_values, theirs_functional.dequantize_blockwise(theirs, state))
