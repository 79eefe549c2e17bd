"""The Triton kernels of 4-bit blocks against the PyTorch bodies of the same operators, bit for bit (see guards.py)."""

import pytest
import torch
from guards import DEVICES, DTYPES, UnreadablePages, bits, guard_bands, on_cuda_path, skip_unless_pages_can_be_protected
from torch import Tensor

from minift.quant import QuantState, codebook, dequantize_4bit, dynamic_map, quantize_4bit
from minift.quant.codebooks import nearest_4bit

BLOCK = 64
# One value, odd numbers, around a block, around a program (4096 values), several programs with a rest.
SIZES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 4095, 4096, 4097, 3 * 4096, 3 * 4096 + 5]
CPU = torch.device("cpu")

pytestmark = pytest.mark.parametrize("device", DEVICES)


# --- quantizing -------------------------------------------------------------------------------------------------------


def quantize_guarded(x: Tensor, quant_type: str, blocksize: int, device: str) -> tuple[Tensor, Tensor]:
    """Run the kernel between guard bands, check them, and return packed codes and scales on the CPU."""
    from minift_kernels.fourbit import quantize_4bit

    n, nearest = x.numel(), nearest_4bit(quant_type, CPU)
    with guard_bands(device) as guards:
        out = (guards.output((n + 1) // 2, torch.uint8), guards.output(-(-n // blocksize), torch.float32))
        tables = (guards.input(nearest.boundaries), guards.input(nearest.order))
        packed, absmax = quantize_4bit(guards.input(x), *tables, blocksize, out=out)  # pyright: ignore
        assert packed.data_ptr() == out[0].data_ptr() and packed.shape == ((n + 1) // 2, 1)
        assert absmax.data_ptr() == out[1].data_ptr()
    return packed.cpu(), absmax.cpu()


def assert_quantized_alike(x: Tensor, quant_type: str, blocksize: int, device: str) -> None:
    packed, absmax = quantize_guarded(x, quant_type, blocksize, device)
    theirs_packed, theirs_absmax = torch.ops.minift.quantize_4bit(x, quant_type, blocksize)
    assert torch.equal(packed, theirs_packed)
    assert torch.equal(bits(absmax), bits(theirs_absmax))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_equals_the_pytorch_body(device: str, quant_type: str, dtype: torch.dtype, n: int):
    assert_quantized_alike(torch.randn(n).to(dtype), quant_type, BLOCK, device)


@pytest.mark.parametrize("blocksize", [32, 128, 2048, 4096])
@pytest.mark.parametrize("n", [4 * 4096, 4096 + 31, 2 * 4096 + 1])
def test_quantize_block_sizes(device: str, n: int, blocksize: int):
    assert_quantized_alike(torch.randn(n), "nf4", blocksize, device)


@pytest.mark.parametrize("absmax", [1.0, 0.37, 3.3, 65000.0, 2.0**-12, 1e-30, 3e38])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_values_on_the_thresholds(device: str, quant_type: str, absmax: float):
    """Every midpoint x absmax with its fp32 neighbours: multiplying by another reciprocal, or dividing, shows here."""
    rising = codebook(quant_type).sort().values
    midpoint = (rising[:-1] + rising[1:]) / 2 * absmax
    around = [midpoint, *(torch.nextafter(midpoint, torch.tensor(end)) for end in (-torch.inf, torch.inf))]
    block = torch.cat([torch.tensor([absmax]), *around, torch.zeros(18)])
    assert_quantized_alike(torch.cat([block, block.flip(0), -block, block[:47]]), quant_type, BLOCK, device)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_many_scales(device: str, quant_type: str):
    """Each scale has another reciprocal; the division must be the correctly rounded one for all of them.

    Blocks hold threshold x scale, rounded: whether that lies above the threshold depends on the last bit.
    """
    scale = torch.rand(1024, 1) * 4 + 0.01
    rising = codebook(quant_type).sort().values
    midpoint = (rising[:-1] + rising[1:]) / 2
    assert_quantized_alike(torch.cat([scale, midpoint * scale, -midpoint * scale, scale], 1), quant_type, 32, device)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [5 * BLOCK, 5 * BLOCK + 9])
def test_quantize_zero_and_denormal_blocks(device: str, n: int, quant_type: str):
    """Zero blocks among others, also as a short last one; blocks below 1e-38, where the guard of the division is."""
    x = torch.randn(n)
    x[BLOCK : 2 * BLOCK] = 0
    x[4 * BLOCK :] = 0
    assert_quantized_alike(x, quant_type, BLOCK, device)
    packed, absmax = quantize_guarded(x, quant_type, BLOCK, device)
    assert (absmax[[1, 4]] == 0).all() and (packed[32:64] == {"nf4": 0x77, "fp4": 0}[quant_type]).all()
    for scale in (1e-45, 1e-42, 9e-39, 1e-38, 1.2e-38, 1e-37):
        assert_quantized_alike(torch.randn(n) * scale, quant_type, BLOCK, device)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_lets_nan_and_infinity_through(device: str, dtype: torch.dtype, bad: float):
    """The scale of the block shows them, that of no other block does; the public function refuses such scales."""
    x = torch.randn(3 * BLOCK + 5).to(dtype)
    x[[70, 3 * BLOCK + 2]] = bad
    _, absmax = quantize_guarded(x, "nf4", BLOCK, device)
    assert absmax.isfinite().tolist() == [True, False, True, False]
    assert absmax[1].isnan() if bad != bad else absmax[1] == torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_operator(device: str, quant_type: str, dtype: torch.dtype):
    """What the dispatcher calls for a CUDA tensor: also for a transposed view, and for one without elements."""
    x = torch.randn(65, 33).to(dtype)
    for view in (x, x.T, x[:, ::2]):
        packed, absmax = on_cuda_path("quantize_4bit", view.to(device), quant_type, BLOCK)
        theirs_packed, theirs_absmax = torch.ops.minift.quantize_4bit(view, quant_type, BLOCK)
        assert packed.device.type == device and packed.shape == theirs_packed.shape
        assert torch.equal(packed.cpu(), theirs_packed) and torch.equal(absmax.cpu(), theirs_absmax)
    packed, absmax = on_cuda_path("quantize_4bit", torch.empty(0, 4, device=device), quant_type, BLOCK)
    assert packed.shape == (0, 1) and absmax.shape == (0,)


# --- dequantizing -----------------------------------------------------------------------------------------------------


def decode_guarded(packed: Tensor, state: QuantState, dtype: torch.dtype, device: str) -> Tensor:
    """Run the kernel between guard bands, check them, and return the values on the CPU."""
    from minift_kernels.fourbit import dequantize_4bit

    weight = (packed, state.absmax, state.nested_absmax, state.nested_offset)
    with guard_bands(device) as guards:
        out = guards.output(torch.Size(state.shape).numel(), dtype)
        inputs = [guards.input(x) for x in (*weight, codebook(state.quant_type), dynamic_map(True))]
        result = dequantize_4bit(*inputs, state.blocksize, state.shape, dtype, out=out)  # pyright: ignore
        assert result.data_ptr() == out.data_ptr() and result.shape == state.shape and result.dtype == dtype
    return result.cpu()


def reference(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The PyTorch body: the operator on CPU tensors."""
    return torch.ops.minift.dequantize_4bit(
        packed, state.absmax, state.nested_absmax, state.nested_offset, state.quant_type, state.blocksize, state.shape,
        dtype,
    )  # fmt: skip


def assert_decoded_alike(packed: Tensor, state: QuantState, dtype: torch.dtype, device: str) -> None:
    ours, theirs = decode_guarded(packed, state, dtype, device), reference(packed, state, dtype)
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_equals_the_pytorch_body(device: str, quant_type: str, double_quant: bool, dtype: torch.dtype, n: int):
    assert_decoded_alike(*quantize_4bit(torch.randn(n), quant_type, BLOCK, double_quant), dtype, device)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(8225,), (99, 101), (3, 5, 7, 79), (2 * 4096 + 1,)])
def test_block_sizes_and_shapes(device: str, shape: tuple[int, ...], double_quant: bool, blocksize: int):
    """Rows that are no multiple of a block; with blocks of 32 more than 256 scales, so a second nested block."""
    assert_decoded_alike(*quantize_4bit(torch.randn(shape), "nf4", blocksize, double_quant), torch.float32, device)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_empty(device: str, shape: tuple[int, ...], double_quant: bool):
    """No value, no launch (a grid of 0 programs is an error on a GPU)."""
    scales = {"nested_absmax": torch.ones(0), "nested_offset": torch.zeros(())} if double_quant else {}
    absmax = torch.zeros(0, dtype=torch.uint8 if double_quant else torch.float32)
    state = QuantState(shape, torch.float32, "nf4", BLOCK, absmax, **scales)
    packed = torch.zeros(0, 1, dtype=torch.uint8)
    assert decode_guarded(packed, state, torch.float32, device).shape == shape
    assert reference(packed, state, torch.float32).shape == shape


def ordinary_and_extreme_scales() -> Tensor:
    """Scales on which rounding is decided: ties in bf16 and fp16, zeros, denormals, the ends of each range."""
    mantissas = torch.arange(0x3F80, 0x3FC0, dtype=torch.int32)
    bf16_ties = ((mantissas << 16) | 0x8000).view(torch.float32)  # exactly between two bf16 numbers
    fp16_ties = ((mantissas << 16) | 0x1000).view(torch.float32)  # exactly between two fp16 numbers
    near = [torch.nextafter(bf16_ties, torch.tensor(end)) for end in (0.0, 9.0)]
    ends = torch.tensor(
        [0.0, 1e-45, 1e-40, 1e-38, 6e-8, 3e-8, 1e-5, 6.1e-5, 65504.0, 65519.9, 65520.0, 1e10, 3.38e38, 3.4e38]
    )
    return torch.cat([bf16_ties, fp16_ties, *near, ends])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rounding(device: str, quant_type: str, dtype: torch.dtype):
    """All 16 codes times scales where the last bit is in doubt. Codes 1.0 and -1.0 hit the ties themselves.

    The GPU flushes no denormals here: a product below 1.2e-38 must come out as on the CPU, too.
    """
    absmax = ordinary_and_extreme_scales()
    packed = torch.tensor([(2 * i << 4) | (2 * i + 1) for i in range(8)] * 4, dtype=torch.uint8).repeat(len(absmax))
    state = QuantState((BLOCK * len(absmax),), dtype, quant_type, BLOCK, absmax)
    assert_decoded_alike(packed[:, None], state, dtype, device)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_byte(device: str, quant_type: str):
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    state = QuantState((512,), torch.float32, quant_type, BLOCK, torch.rand(8) + 0.5)
    assert_decoded_alike(packed, state, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nested_code(device: str, dtype: torch.dtype):
    """Scale = code x nested scale + offset with two roundings: a fused multiply-add would show in the last bit."""
    absmax = torch.arange(256, dtype=torch.uint8).repeat(3)
    n = 32 * len(absmax)
    packed = torch.randint(0, 256, (n // 2, 1), dtype=torch.uint8)
    state = QuantState((n,), dtype, "nf4", 32, absmax, torch.tensor([0.3, 7.7, 1e-3]), torch.tensor(1.2345678))
    assert_decoded_alike(packed, state, dtype, device)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_operator(device: str, dtype: torch.dtype, double_quant: bool):
    """What the dispatcher calls for CUDA tensors, a strided one of packed codes among them."""
    packed, state = quantize_4bit(torch.randn(33, 65), "nf4", BLOCK, double_quant)
    theirs = reference(packed, state, dtype)
    scales = (state.absmax, state.nested_absmax, state.nested_offset)
    strided = packed.repeat(1, 2)[:, :1]
    for bytes_ in (packed, strided):
        held = [None if tensor is None else tensor.to(device) for tensor in (bytes_, *scales)]
        ours = torch.full((33, 65), 7.0, dtype=dtype, device=device)
        on_cuda_path("dequantize_4bit_out", *held, state.quant_type, state.blocksize, ours)
        assert torch.equal(bits(ours.cpu()), bits(theirs))


# --- reading too far --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 65, 4097])
@pytest.mark.parametrize("double_quant", [False, True])
def test_reads_nothing_behind_its_inputs(device: str, double_quant: bool, n: int):
    """A load without its mask touches the unreadable page and ends the process with a segmentation fault."""
    skip_unless_pages_can_be_protected(device)
    from minift_kernels import fourbit

    pages, x = UnreadablePages(), torch.randn(n)
    nearest = nearest_4bit("nf4", CPU)
    tables = [pages.before_page(table) for table in (nearest.boundaries, nearest.order)]
    ours, _ = fourbit.quantize_4bit(pages.before_page(x), *tables, BLOCK)  # pyright: ignore
    packed, state = quantize_4bit(x, "nf4", BLOCK, double_quant)
    assert torch.equal(ours, packed)

    weight = (packed, state.absmax, state.nested_absmax, state.nested_offset, codebook("nf4"), dynamic_map(True))
    inputs = [pages.before_page(tensor) for tensor in weight]
    ours = fourbit.dequantize_4bit(*inputs, BLOCK, state.shape, torch.float32)  # pyright: ignore
    assert torch.equal(bits(ours), bits(reference(packed, state, torch.float32)))


# --- on a GPU only ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_more_than_2_to_the_31_values(device: str):
    """The last blocks of a tensor that 32-bit offsets cannot address: as if they stood alone."""
    tail = torch.randn(4096 + 64 + 5)
    x = torch.zeros(2**31 + len(tail), dtype=torch.bfloat16, device=device)
    x[2**31 :] = tail
    packed, state = quantize_4bit(x)
    ours, theirs = quantize_4bit(tail.bfloat16()), (packed[2**30 :].cpu(), state.absmax[2**25 :].cpu())
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1].absmax, theirs[1])
    assert torch.equal(dequantize_4bit(packed, state)[2**31 :].cpu(), dequantize_4bit(*ours))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_equals_bitsandbytes_on_the_gpu(device: str, quant_type: str, dtype: torch.dtype):
    """The same codes but next to a threshold, and the same decoded values everywhere.

    Its library is compiled with fast math: the reciprocal may be off by one unit (2^-23 relative), and its FP4
    thresholds are printed with few digits (0.583333 for 7/12, 6e-7 relative). A value within 2^-20 of a threshold may
    become a neighbour; any other must not. FP4 has two zeros, so decoded values are compared. Blocks below 2^-126 are
    left out, since that library flushes them.
    """
    from bitsandbytes import functional as theirs_functional

    x = torch.randn(512, 1024).to(dtype).to(device)
    packed, state = quantize_4bit(x, quant_type)
    theirs, theirs_state = theirs_functional.quantize_4bit(x, blocksize=BLOCK, quant_type=quant_type)
    assert torch.equal(state.absmax, theirs_state.absmax)
    wide = dequantize_4bit(packed, state, torch.float32)
    theirs_wide = dequantize_4bit(theirs, state, torch.float32)
    normalized = (x.double().view(-1, BLOCK) / state.absmax.double()[:, None]).view(x.shape)
    rising = codebook(quant_type).double().sort().values.to(device)
    midpoints = (rising[:-1] + rising[1:]) / 2
    close = ((normalized[..., None] - midpoints).abs() <= 2**-20 * midpoints.abs()).any(-1)
    assert torch.equal(wide[~close], theirs_wide[~close])
    assert ((wide - theirs_wide).abs() <= 0.4 * x.abs().max())[close].all()
    assert torch.equal(dequantize_4bit(theirs, state), theirs_functional.dequantize_4bit(theirs, theirs_state))


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_zero_blocks_of_bitsandbytes_on_the_gpu(device: str, quant_type: str):
    """Its kernel writes bytes of 0x00, since 0 x (1 / 0) is NaN; they decode to zero, as ours do."""
    from bitsandbytes import functional as theirs_functional

    zeros = torch.zeros(4 * BLOCK, device=device)
    theirs, _ = theirs_functional.quantize_4bit(zeros, blocksize=BLOCK, quant_type=quant_type)
    packed, state = quantize_4bit(zeros, quant_type)
    assert (theirs == 0).all() and (packed == {"nf4": 0x77, "fp4": 0}[quant_type]).all()
    assert (dequantize_4bit(theirs, state) == 0).all() and (dequantize_4bit(packed, state) == 0).all()
