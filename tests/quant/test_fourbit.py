"""4-bit quantization against bitsandbytes on a CPU: packed bytes, scales and dequantized values, bit for bit.

What has to be known about bitsandbytes 0.50.2 on a CPU:

- It returns dequantized one-dimensional tensors as [1, n]; they are reshaped.
- Its FP4 table holds -0.0 where ours holds +0.0, so FP4 values are compared as numbers and NF4 values as bits.
- Its AVX-512 dequantizer takes wrong scales if there are several rows that do not hold whole blocks (it counts
  `row // blocksize` scales a row), so such a tensor is handed to it as one long row.
- Its nested (double-quantized) codes come from a coarse table, so there the two states are fed to each other's
  dequantizer, and the errors are compared.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace

import pytest
import torch
from bitsandbytes import functional as theirs_functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.quant import QuantState, codebook, dequantize_4bit, dynamic_map, quantize_4bit
from minift.quant.fourbit import BLOCKSIZES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Odd lengths, one value, one value more or less than a block, several blocks, rows that are no multiple of a block.
SHAPES = [
    (1,),
    (2,),
    (63,),
    (64,),
    (65,),
    (1000,),
    (4097,),
    (3, 64),
    (17, 65),
    (31, 128),
    (5, 7, 11),
    (2, 4100),
    (3, 4096),
]


def same(ours: Tensor, theirs: Tensor, quant_type: str = "nf4") -> bool:
    """Equal dtype and bits; for FP4 equal numbers."""
    if ours.dtype != theirs.dtype:
        return False
    if quant_type == "fp4" or not ours.is_floating_point():
        return torch.equal(ours, theirs)
    integer = torch.int32 if ours.dtype == torch.float32 else torch.int16
    return torch.equal(ours.contiguous().view(integer), theirs.contiguous().view(integer))


def quantize_both(x: Tensor, quant_type: str, blocksize: int, double_quant: bool = False):
    ours = quantize_4bit(x, quant_type, blocksize, double_quant)
    theirs = theirs_functional.quantize_4bit(
        x, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant
    )
    return *ours, *theirs


def to_theirs(state: QuantState) -> theirs_functional.QuantState:
    """Our state as bitsandbytes holds it."""
    nested = None
    if state.nested_absmax is not None:
        nested = theirs_functional.QuantState(
            state.nested_absmax, code=dynamic_map(True), blocksize=256, dtype=torch.float32
        )
    return theirs_functional.QuantState(
        state.absmax.clone(),
        shape=torch.Size(state.shape),
        code=codebook(state.quant_type),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=state.nested_offset,
        state2=nested,
    )


def from_theirs(theirs: theirs_functional.QuantState) -> QuantState:
    """bitsandbytes' state as we hold it."""
    shape, dtype, kind, blocksize = theirs.shape, theirs.dtype, theirs.quant_type, theirs.blocksize
    assert shape is not None and dtype is not None and kind is not None and blocksize is not None
    nested = theirs.state2
    return QuantState(
        tuple(shape), dtype, kind, blocksize, theirs.absmax, nested.absmax if nested else None, theirs.offset
    )


def dequantize_theirs(packed: Tensor, state: theirs_functional.QuantState) -> Tensor:
    shape = state.shape
    assert shape is not None
    if shape[-1] % state.blocksize:
        state = copy(state)
        state.shape = torch.Size([shape.numel()])
    with torch.compiler.set_stance("force_eager"):  # otherwise it spends 15 s on compiling its fallback for odd sizes
        return theirs_functional.dequantize_4bit(packed, state).reshape(shape)


# --- codes, scales, bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_bitsandbytes(dtype: torch.dtype, quant_type: str, blocksize: int):
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        ours, ours_state, theirs, theirs_state = quantize_both(x, quant_type, blocksize)
        assert ours.shape == theirs.shape == ((x.numel() + 1) // 2, 1), shape
        assert same(ours, theirs), shape
        assert same(ours_state.absmax, theirs_state.absmax), shape
        assert (ours_state.shape, ours_state.dtype) == (shape, dtype)
        assert (ours_state.quant_type, ours_state.blocksize) == (quant_type, blocksize)
        ours_values = dequantize_4bit(ours, ours_state)
        assert ours_values.shape == shape
        assert same(ours_values, dequantize_theirs(theirs, theirs_state), quant_type), shape


VIEWS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(70, 33).T,
    "every second": lambda: torch.randn(999)[::2],
    "columns": lambda: torch.randn(20, 130)[:, 1:66],
    "expanded": lambda: torch.randn(1, 64).expand(9, 64),
    "permuted": lambda: torch.randn(4, 5, 33).permute(2, 0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_views_are_read_in_logical_order(view: str, quant_type: str):
    x = VIEWS[view]()
    assert not x.is_contiguous()
    ours, ours_state, theirs, theirs_state = quantize_both(x, quant_type, 64)
    assert same(ours, theirs) and same(ours_state.absmax, theirs_state.absmax)
    contiguous, _ = quantize_4bit(x.contiguous(), quant_type)
    assert torch.equal(ours, contiguous)


FP32_ONLY, WIDE, ANY = [3.4028234663852886e38], [1e-30, 1.7e38, 3e38], [1.0, 2.0**-12, 0.37, 3.3, 65000.0]


@pytest.mark.parametrize(
    ("dtype", "absmax"),
    [(dtype, absmax) for dtype in DTYPES for absmax in ANY]
    + [(dtype, absmax) for dtype in DTYPES[:2] for absmax in WIDE]
    + [(torch.float32, absmax) for absmax in FP32_ONLY],
)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_on_the_thresholds(quant_type: str, dtype: torch.dtype, absmax: float):
    """Every midpoint x absmax with its neighbours, in full blocks and in a short last one.

    Full blocks are multiplied by the reciprocal of the scale, the short one is divided by the scale; here they differ.
    """
    rising = codebook(quant_type).sort().values
    midpoint = (rising[:-1] + rising[1:]) / 2 * absmax
    around = [midpoint, *(torch.nextafter(midpoint, torch.tensor(end)) for end in (-torch.inf, torch.inf))]
    block = torch.cat([torch.tensor([absmax]), *around, torch.zeros(18)])
    assert len(block) == 64
    x = torch.cat([block, block.flip(0), -block, block[:47]]).to(dtype)
    assert x.isfinite().all()
    ours, ours_state, theirs, theirs_state = quantize_both(x, quant_type, 64)
    assert same(ours, theirs) and same(ours_state.absmax, theirs_state.absmax)
    assert same(dequantize_4bit(ours, ours_state), dequantize_theirs(theirs, theirs_state), quant_type)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_zero_blocks(quant_type: str):
    """A zero block among others: scale 0, the code of zero (NF4: bytes 0x77), values exactly 0.

    In a short last zero block bitsandbytes stores the 1e-38 that guards its division; we store the true 0.
    """
    x = torch.cat([torch.randn(64), torch.zeros(64), torch.randn(64), torch.zeros(9)])
    ours, ours_state, theirs, theirs_state = quantize_both(x, quant_type, 64)
    assert same(ours, theirs)
    assert same(ours_state.absmax[:3], theirs_state.absmax[:3])
    assert (ours_state.absmax[[1, 3]] == 0).all()
    assert theirs_state.absmax[3] in (0, torch.tensor(1e-38))
    if quant_type == "nf4":
        assert (ours[32:64] == 0x77).all()
    assert (dequantize_4bit(ours, ours_state)[x == 0] == 0).all()
    for double_quant in (False, True):
        everywhere, state = quantize_4bit(torch.zeros(1000), quant_type, double_quant=double_quant)
        assert (dequantize_4bit(everywhere, state) == 0).all()


@pytest.mark.parametrize("scale", [1e-45, 1e-42, 9e-39, 1e-38, 1.2e-38, 1e-37])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [128, 128 + 15])
def test_denormal_blocks(n: int, quant_type: str, scale: float):
    """Around 1e-38, where the guard of the division takes over. A short last block: see test_zero_blocks."""
    x = torch.randn(n) * scale
    ours, ours_state, theirs, theirs_state = quantize_both(x, quant_type, 64)
    assert same(ours, theirs)
    assert same(ours_state.absmax[:2], theirs_state.absmax[:2])
    assert torch.equal(ours_state.absmax[2:].clamp(min=1e-38), theirs_state.absmax[2:])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([32, 64]),
)
def test_any_values_equal_bitsandbytes(x: list[float], quant_type: str, blocksize: int):
    """Hypothesis likes zeros, denormals, repeated and huge values."""
    ours, ours_state, theirs, theirs_state = quantize_both(torch.tensor(x), quant_type, blocksize)
    assert same(ours, theirs)
    full = len(x) // blocksize
    assert same(ours_state.absmax[:full], theirs_state.absmax[:full])
    # The short last block: see test_zero_blocks.
    assert torch.equal(ours_state.absmax[full:].clamp(min=1e-38), theirs_state.absmax[full:])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_high_nibble_comes_first(quant_type: str):
    """The layout in the module's picture, byte by byte, without the peer."""
    values = codebook(quant_type)
    codes = torch.randint(0, 16, (65,))
    codes[[0, 64]] = values.argmax()  # makes both scales 1
    packed, state = quantize_4bit(values[codes], quant_type, 64)
    low = torch.cat([codes[1::2], torch.tensor([0])])
    found = torch.stack([packed[:, 0] >> 4, packed[:, 0] & 0xF])
    assert torch.equal(values[found[0].int()], values[codes[::2]])
    assert torch.equal(values[found[1, :-1].int()], values[low[:-1]])
    assert values[int(found[1, -1])] == 0, "an odd tensor is padded with a zero"
    assert torch.equal(dequantize_4bit(packed, state), values[codes])


# --- dequantizing ----------------------------------------------------------------------------------------------------

NESTED_SHAPES = [(1,), (65,), (4097,), (129, 128), (131, 300), (700, 64)]  # 1 to 1228 scales, so up to 5 nested blocks


@pytest.mark.parametrize("blocksize", [32, 64, 256, 2048])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_states_are_exchangeable(dtype: torch.dtype, quant_type: str, blocksize: int):
    """Our dequantizer on their nested state, theirs on ours: the same values as the other's own dequantizer."""
    for shape in NESTED_SHAPES:
        x = torch.randn(shape).to(dtype)
        ours, ours_state, theirs, theirs_state = quantize_both(x, quant_type, blocksize, double_quant=True)
        assert ours_state.absmax.dtype == torch.uint8 and ours_state.nested_absmax is not None
        assert same(ours, theirs), shape
        values = dequantize_4bit(theirs, from_theirs(theirs_state))
        assert same(values, dequantize_theirs(theirs, theirs_state), quant_type), shape
        values = dequantize_theirs(ours, to_theirs(ours_state))
        assert same(dequantize_4bit(ours, ours_state), values, quant_type), shape


def test_nested_scales_are_more_exact_than_bitsandbytes():
    """The same offset and nested scales; some codes differ; then ours is the nearer one.

    Allowed slack: the code is chosen on `(absmax - offset) / nested_absmax`, which is rounded twice (2^-23 relative to
    nested_absmax at most), and decoding rounds the product and the sum (2^-24 of each). 2^-21 x (nested_absmax +
    |offset|) covers the four for both sides.
    """
    x = torch.randn(1 << 20) * torch.rand(1 << 14).repeat_interleave(64)
    _, plain = quantize_4bit(x)
    _, ours, _, theirs = quantize_both(x, "nf4", 64, double_quant=True)
    assert ours.nested_absmax is not None and ours.nested_offset is not None
    assert theirs.offset is not None and theirs.state2 is not None
    assert same(ours.nested_offset, theirs.offset)
    assert same(ours.nested_absmax, theirs.state2.absmax)
    differ = ours.absmax != theirs.absmax
    assert 0 < differ.float().mean() < 0.1

    def error(codes: Tensor) -> Tensor:
        assert ours.nested_absmax is not None and ours.nested_offset is not None
        scale = ours.nested_absmax.repeat_interleave(256)[: len(codes)]
        return (dynamic_map(True)[codes.int()] * scale + ours.nested_offset - plain.absmax).abs()

    scale = ours.nested_absmax.repeat_interleave(256)[: len(differ)]
    ours_error, theirs_error = error(ours.absmax), error(theirs.absmax)
    assert (ours_error <= theirs_error + 2**-21 * (scale + ours.nested_offset.abs())).all()
    assert ours_error[differ].mean() < theirs_error[differ].mean()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", [*DTYPES, torch.float64])
def test_dtype_of_the_result(stored: torch.dtype, wanted: torch.dtype):
    """Any dtype can be asked for; the fp32 product is rounded once, straight to it."""
    packed, state = quantize_4bit(torch.randn(50, 33).to(stored), double_quant=True)
    exact = dequantize_4bit(packed, state, torch.float32)
    assert same(dequantize_4bit(packed, state, wanted), exact.to(wanted)) or wanted == torch.float64
    assert torch.equal(dequantize_4bit(packed, state, wanted), exact.to(wanted))
    assert dequantize_4bit(packed, state).dtype == stored


def test_round_trip_bound():
    """Half the widest gap of the codebook times the scale, plus three fp32 roundings (less than 2^-22 of the scale)."""
    for quant_type in ("nf4", "fp4"):
        x = torch.randn(1000, 64)
        packed, state = quantize_4bit(x, quant_type, 64)
        bound = (codebook(quant_type).sort().values.diff().max() / 2 + 2**-22) * state.absmax[:, None]
        assert ((dequantize_4bit(packed, state) - x).abs() <= bound).all()


# Values for the properties below: no scale so small or large that a product could leave the normal range.
VALUES = st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=200).filter(
    lambda x: max(map(abs, x)) >= 2**-20
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    x=VALUES,
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([32, 64]),
    double_quant=st.booleans(),
)
def test_round_trip_bound_of_any_values(x: list[float], quant_type: str, blocksize: int, double_quant: bool):
    """The bound of test_round_trip_bound, each value by the scale of its own block.

    Double quantization moves a scale by at most half the widest gap of its map times the nested scale (and three
    roundings of numbers up to nested scale + offset), and a value by no more than that.
    """
    x_n = torch.tensor(x)
    packed, state = quantize_4bit(x_n, quant_type, blocksize, double_quant)
    absmax = torch.stack([block.abs().max() for block in x_n.split(blocksize)]).double()
    bound = (codebook(quant_type).sort().values.diff().max().item() / 2 + 2**-22) * absmax
    if state.nested_absmax is not None and state.nested_offset is not None:
        nested, offset = state.nested_absmax.double(), state.nested_offset.double()
        widest = max((dynamic_map(True).diff().max() / 2).item(), 1 + dynamic_map(True)[0].item())
        bound = bound + widest * nested + 2**-21 * (nested + offset)
    error = (dequantize_4bit(packed, state).double() - x_n.double()).abs()
    assert (error <= bound.repeat_interleave(blocksize)[: len(x)]).all()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(x=VALUES, power=st.integers(-60, 60), quant_type=st.sampled_from(["nf4", "fp4"]))
def test_a_power_of_two_scales_the_scales_alone(x: list[float], power: int, quant_type: str):
    """Exact in floating point, so the codes must not change. (Values that vanish against the scale stay at zero.)"""
    x_n = torch.tensor([value if abs(value) >= 2**-60 else 0.0 for value in x])
    packed, state = quantize_4bit(x_n, quant_type, 32)
    moved, moved_state = quantize_4bit(x_n * 2.0**power, quant_type, 32)
    assert torch.equal(packed, moved)
    assert torch.equal(state.absmax * 2.0**power, moved_state.absmax)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(x=VALUES, quant_type=st.sampled_from(["nf4", "fp4"]))
def test_decoded_values_rise_with_the_values_of_a_block(x: list[float], quant_type: str):
    decoded = dequantize_4bit(*quantize_4bit(torch.tensor(sorted(x)), quant_type, 256))
    assert (decoded.diff() >= 0).all()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    codes=st.lists(st.integers(0, 15), min_size=1, max_size=200),
    absmax=st.floats(2.0**-60, 2.0**60, width=32),
    quant_type=st.sampled_from(["nf4", "fp4"]),
)
def test_packing_is_undone(codes: list[int], absmax: float, quant_type: str):
    """unpack + decode, encode + pack: the same bytes, if each block holds a code of 1 or -1, which both types have.

    Then its scale is found again exactly, and three roundings (3 x 2^-24 relative) do not reach the next entry. What
    `quantize_4bit` makes is of that kind. FP4's second zero comes back as the first: there values are compared.
    """
    one = int(codebook(quant_type).argmax())
    held = torch.tensor([code for start in range(0, len(codes), 31) for code in [one, *codes[start : start + 31]]])
    padded = torch.cat([held, torch.full((len(held) % 2,), 7 if quant_type == "nf4" else 0)])
    packed = (padded[::2] * 16 + padded[1::2]).to(torch.uint8)[:, None]
    state = QuantState((len(held),), torch.float32, quant_type, 32, torch.full((-(-len(held) // 32),), absmax))
    values = dequantize_4bit(packed, state)
    assert torch.equal(values, codebook(quant_type)[held] * absmax)
    again, state_again = quantize_4bit(values, quant_type, 32)
    assert torch.equal(state_again.absmax, state.absmax)
    assert torch.equal(dequantize_4bit(again, state_again), values)
    if quant_type == "nf4":
        assert torch.equal(again, packed)


# --- storage dtype ----------------------------------------------------------------------------------------------------

STORAGES = [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_storage_equals_bitsandbytes(double_quant: bool, quant_type: str, storage: torch.dtype):
    """The same bytes in the same shape; each decodes the other's. NaN patterns among them must survive."""
    x = torch.randn(48, 64)
    ours, ours_state = quantize_4bit(x, quant_type, 64, double_quant, quant_storage=storage)
    theirs, theirs_state = theirs_functional.quantize_4bit(
        x, blocksize=64, quant_type=quant_type, compress_statistics=double_quant, quant_storage=storage
    )
    assert ours.dtype == theirs.dtype == storage and ours.shape == theirs.shape == (48 * 32 // storage.itemsize, 1)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    plain = dequantize_4bit(*quantize_4bit(x, quant_type, 64, double_quant))
    assert torch.equal(dequantize_4bit(ours, ours_state), plain)
    assert same(dequantize_4bit(theirs, from_theirs(theirs_state)), dequantize_theirs(theirs, theirs_state), quant_type)
    assert same(plain, dequantize_theirs(ours, to_theirs(ours_state)), quant_type)


@pytest.mark.parametrize(("n", "storage"), [(1, torch.float16), (6, torch.bfloat16), (13, torch.float32)])
def test_bytes_that_do_not_fill_an_element_are_refused(n: int, storage: torch.dtype):
    with pytest.raises(ValueError, match=f"{(n + 1) // 2} packed bytes"):
        quantize_4bit(torch.randn(n), quant_storage=storage)
    with pytest.raises(RuntimeError):
        theirs_functional.quantize_4bit(torch.randn(n), blocksize=64, quant_type="nf4", quant_storage=storage)


@pytest.mark.parametrize("n", [7, 8])
def test_bytes_that_fill_whole_elements_are_taken(n: int):
    """Odd or even: four bytes."""
    packed, state = quantize_4bit(torch.arange(n) / 10, quant_storage=torch.float32)
    assert packed.shape == (1, 1) and packed.dtype == torch.float32
    assert torch.equal(dequantize_4bit(packed, state), dequantize_4bit(*quantize_4bit(torch.arange(n) / 10)))


def test_cast_bytes_are_refused():
    """`.to(dtype)` keeps the number of elements, so the bytes become too many: noticed, not decoded to noise."""
    packed, state = quantize_4bit(torch.randn(64))
    with pytest.raises(ValueError, match="packed holds 128 bytes"):
        dequantize_4bit(packed.float(), state)


def test_size_of_double_quantization():
    """4.127 bits a value: 4, 8/64 for the nested codes, 32/(64 * 256) for their scales, and one offset."""
    packed, state = quantize_4bit(torch.randn(1024, 1024), double_quant=True)
    assert state.nested_absmax is not None and state.nested_offset is not None
    held = [packed, state.absmax, state.nested_absmax, state.nested_offset]
    assert sum(tensor.nbytes for tensor in held) == 2**19 + 2**14 + 4 * 2**6 + 4


def test_results_do_not_share_memory():
    """The scratch buffer is reused by the next call; what was returned before must not change."""
    packed, state = quantize_4bit(torch.randn(100))
    other, other_state = quantize_4bit(torch.randn(100))
    first = dequantize_4bit(packed, state)
    kept = first.clone()
    second = dequantize_4bit(other, other_state)
    assert torch.equal(first, kept)
    second.zero_()
    assert torch.equal(dequantize_4bit(packed, state), kept)
    packed_before = packed.clone()
    first.zero_()
    assert torch.equal(packed, packed_before)


def test_threads_do_not_share_scratch_memory():
    pairs = [quantize_4bit(torch.randn(1 << 16)) for _ in range(4)]
    wanted = [dequantize_4bit(*pair) for pair in pairs]
    start = threading.Barrier(4)

    def work(index: int) -> bool:
        start.wait()
        return all(torch.equal(dequantize_4bit(*pairs[index]), wanted[index]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_inference_mode_first():
    """Scratch memory that was born in inference mode must serve ordinary calls, too (a new thread has none yet)."""
    packed, state = quantize_4bit(torch.randn(1000))

    def work() -> Tensor:
        with torch.inference_mode():
            dequantize_4bit(packed, state)
        return dequantize_4bit(packed, state)

    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(work).result()
    assert not ours.is_inference()
    assert torch.equal(ours, dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(64, 65), (33,), (1,), (0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_operator_passes_opcheck(shape: tuple[int, ...], dtype: torch.dtype):
    """Schema, fake tensor, autograd registration and tracing with fixed and symbolic shapes."""
    torch.library.opcheck(torch.ops.minift.quantize_4bit.default, (torch.randn(shape).to(dtype), "nf4", 64))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 65), (33,), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_passes_opcheck(shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool):
    """Schema, fake tensor, autograd registration and tracing with fixed and symbolic shapes."""
    packed, state = quantize_4bit(torch.randn(shape), "nf4", 64, double_quant)
    torch.library.opcheck(
        torch.ops.minift.dequantize_4bit.default,
        (packed, state.absmax, state.nested_absmax, state.nested_offset, "nf4", 64, shape, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 65), (33,), (128, 64)])
def test_decoding_into_given_memory(shape: tuple[int, ...], double_quant: bool, dtype: torch.dtype):
    packed, state = quantize_4bit(torch.randn(shape).to(dtype), "nf4", 64, double_quant)
    buffer = torch.full((state_size(state) + 2,), 7.0, dtype=dtype)
    out = buffer[1:-1].view(shape)
    assert dequantize_4bit(packed, state, out=out) is out
    assert same(out, dequantize_4bit(packed, state))
    assert (buffer[0], buffer[-1]) == (7, 7)
    torch.library.opcheck(
        torch.ops.minift.dequantize_4bit_out.default,
        (packed, state.absmax, state.nested_absmax, state.nested_offset, "nf4", 64, torch.empty(shape, dtype=dtype)),
    )


def state_size(state: QuantState) -> int:
    return torch.Size(state.shape).numel()


@pytest.mark.parametrize(
    "out", [torch.empty(64, 31), torch.empty(2048), torch.empty(32, 64, dtype=torch.bfloat16), torch.empty(64, 32).T]
)
def test_memory_that_does_not_fit_is_refused(out: Tensor):
    packed, state = quantize_4bit(torch.randn(32, 64))
    with pytest.raises(ValueError, match=r"out is .*contiguous, \(32, 64\)"):
        dequantize_4bit(packed, state, out=out)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float64])
def test_wrong_dtype_is_refused(dtype: torch.dtype):
    """Only fp32, bf16 and fp16, as in bitsandbytes: a state that says float64 could not be read there."""
    x = torch.ones(64, dtype=dtype)
    with pytest.raises(ValueError):
        theirs_functional.quantize_4bit(x, quant_type="nf4")
    with pytest.raises(ValueError, match=str(dtype)):
        quantize_4bit(x)


@pytest.mark.parametrize("quant_type", ["int4", "NF4", "", "af4"])
def test_unknown_type_is_refused(quant_type: str):
    with pytest.raises(ValueError, match="4-bit type"):
        quantize_4bit(torch.randn(64), quant_type)


@pytest.mark.parametrize("blocksize", [0, -64, 1, 16, 63, 96, 8192])
def test_bad_blocksize_is_refused(blocksize: int):
    with pytest.raises(ValueError, match="blocksize"):
        quantize_4bit(torch.randn(64), "nf4", blocksize)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 64, 99])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_is_refused(bad: float, position: int, dtype: torch.dtype):
    x = torch.randn(100, dtype=dtype)
    x[position] = bad
    with pytest.raises(ValueError, match="NaN" if bad != bad else "infinite"):
        quantize_4bit(x)


def test_empty_is_refused():
    with pytest.raises(ValueError, match="empty"):
        quantize_4bit(torch.empty(0, 64))


N = 512 * 64  # 512 scales, so two nested blocks
MISMATCHES: dict[str, Callable[[Tensor, QuantState], tuple[Tensor, QuantState]]] = {
    "too few bytes": lambda packed, state: (packed[:-1], state),
    "too many bytes": lambda packed, state: (torch.cat([packed, packed[:1]]), state),
    "another shape": lambda packed, state: (packed, replace(state, shape=(N + 2,))),
    "another blocksize": lambda packed, state: (packed, replace(state, blocksize=128)),
    "too few scales": lambda packed, state: (packed, replace(state, absmax=state.absmax[:-1])),
    "too many scales": lambda packed, state: (packed, replace(state, absmax=state.absmax.repeat(2))),
    "unknown type": lambda packed, state: (packed, replace(state, quant_type="int4")),
}
NESTED_MISMATCHES: dict[str, Callable[[QuantState], QuantState]] = {
    # The last one would be spread over all nested blocks, silently.
    "too few nested scales": lambda state: replace(state, nested_absmax=state.nested_absmax[:1]),  # pyright: ignore
    "too many nested scales": lambda state: replace(state, nested_absmax=torch.ones(3)),
    # These would take the 8-bit codes for scales, silently.
    "no nested scales": lambda state: replace(state, nested_absmax=None, nested_offset=None),
    "no offset": lambda state: replace(state, nested_offset=None),
    # This would take fp32 scales for codes, silently.
    "scales that are not codes": lambda state: replace(state, absmax=torch.rand(512)),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_mismatched_state_is_refused(mismatch: str, double_quant: bool):
    packed, state = MISMATCHES[mismatch](*quantize_4bit(torch.randn(N), double_quant=double_quant))
    with pytest.raises(ValueError):
        dequantize_4bit(packed, state)


@pytest.mark.parametrize("mismatch", NESTED_MISMATCHES)
def test_mismatched_nested_state_is_refused(mismatch: str):
    packed, state = quantize_4bit(torch.randn(N), double_quant=True)
    with pytest.raises(ValueError):
        dequantize_4bit(packed, NESTED_MISMATCHES[mismatch](state))
