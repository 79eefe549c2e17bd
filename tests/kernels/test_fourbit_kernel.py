"""The Triton kernel that decodes 4-bit weights against the PyTorch body of the same operator, bit for bit.

One body serves two machines. `cuda`: the compiled kernel, marked `gpu`. `cpu`: Triton's interpreter, which must be
chosen before the kernel is decorated, so these run only in a process started with TRITON_INTERPRET=1; the ordinary test
run does that in test_interpreter.py.

Guard bands: inputs and output are slices of larger buffers. What lies around the output must keep its pattern, so a
missing store mask shows. What lies around the inputs is poison (NaN scales, bytes of the largest code) and must stay as
it was, and in one test an unreadable page follows each input, so a missing load mask ends the process.
"""

import ctypes
import mmap
import os
import sys

import pytest
import torch
from torch import Tensor

from minift.quant import QuantState, codebook, dynamic_map, quantize_4bit

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start: test_interpreter.py runs it so"
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU, and no TRITON_INTERPRET"
            ),
        ],
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One value, odd numbers, around a block (64) and around a program (2048 values), several programs with a rest.
SIZES = [1, 2, 63, 64, 65, 2047, 2048, 2049, 3 * 2048, 3 * 2048 + 5]
GUARD = 4096  # elements on each side: more than a program decodes, so that a whole program astray is seen

pytestmark = pytest.mark.parametrize("device", DEVICES)


def bits(x: Tensor) -> Tensor:
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


def guarded(x: Tensor, poison: float, device: str) -> tuple[Tensor, Tensor]:
    """A copy of x between two bands of poison: the copy, and the whole buffer."""
    buffer = torch.full((x.numel() + 2 * GUARD,), poison, dtype=x.dtype, device=device)
    inside = buffer[GUARD : GUARD + x.numel()]
    inside.copy_(x.reshape(-1))
    return inside, buffer


def decode_guarded(packed: Tensor, state: QuantState, dtype: torch.dtype, device: str) -> Tensor:
    """Run the kernel between guard bands, check them, and return the values on the CPU."""
    from minift_kernels.fourbit import dequantize_4bit

    n = torch.Size(state.shape).numel()
    packed_in, packed_buffer = guarded(packed, 0xFF, device)
    absmax_in, absmax_buffer = guarded(state.absmax, 0xFF if state.absmax.dtype == torch.uint8 else torch.nan, device)
    inputs = [packed_buffer, absmax_buffer]
    nested_in, offset_in = None, None
    if state.nested_absmax is not None:
        assert state.nested_offset is not None
        nested_in, nested_buffer = guarded(state.nested_absmax, torch.nan, device)
        offset_in = state.nested_offset.to(device)
        inputs.append(nested_buffer)
    code, nested_code = codebook(state.quant_type).to(device), dynamic_map(True).to(device)
    inputs += [code, nested_code]
    before = [buffer.clone() for buffer in inputs]
    out, out_buffer = guarded(torch.full((n,), -777.0, dtype=dtype), -555.0, device)

    result = dequantize_4bit(
        packed_in, absmax_in, code, nested_in, offset_in, nested_code, state.blocksize, state.shape, dtype, out=out
    )

    assert result.data_ptr() == out.data_ptr() and result.shape == state.shape and result.dtype == dtype
    assert (out_buffer[:GUARD] == -555).all(), "wrote before the output"
    assert (out_buffer[GUARD + n :] == -555).all(), "wrote behind the output"
    for buffer, kept in zip(inputs, before, strict=True):
        assert torch.equal(bits(buffer), bits(kept)), "wrote into an input"
    return result.cpu()


def reference(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The PyTorch body: the operator on CPU tensors."""
    return torch.ops.minift.dequantize_4bit(
        packed, state.absmax, state.nested_absmax, state.nested_offset, state.quant_type, state.blocksize, state.shape,
        dtype,
    )  # fmt: skip


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_equals_the_pytorch_body(device: str, quant_type: str, double_quant: bool, dtype: torch.dtype, n: int):
    packed, state = quantize_4bit(torch.randn(n), quant_type, 64, double_quant)
    ours, theirs = decode_guarded(packed, state, dtype, device), reference(packed, state, dtype)
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(8225,), (99, 101), (3, 5, 7, 79), (2 * 4096 + 1,)])
def test_block_sizes_and_shapes(device: str, shape: tuple[int, ...], double_quant: bool, blocksize: int):
    """Rows that are no multiple of a block; with blocks of 32 more than 256 scales, so a second nested block."""
    packed, state = quantize_4bit(torch.randn(shape), "nf4", blocksize, double_quant)
    ours, theirs = decode_guarded(packed, state, torch.float32, device), reference(packed, state, torch.float32)
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_empty(device: str, shape: tuple[int, ...], double_quant: bool):
    """No value, no launch (a grid of 0 programs is an error on a GPU)."""
    scales = {"nested_absmax": torch.ones(0), "nested_offset": torch.zeros(())} if double_quant else {}
    absmax = torch.zeros(0, dtype=torch.uint8 if double_quant else torch.float32)
    state = QuantState(shape, torch.float32, "nf4", 64, absmax, **scales)
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
    state = QuantState((64 * len(absmax),), dtype, quant_type, 64, absmax)
    ours, theirs = decode_guarded(packed[:, None], state, dtype, device), reference(packed[:, None], state, dtype)
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_byte(device: str, quant_type: str):
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    state = QuantState((512,), torch.float32, quant_type, 64, torch.rand(8) + 0.5)
    ours, theirs = decode_guarded(packed, state, torch.float32, device), reference(packed, state, torch.float32)
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nested_code(device: str, dtype: torch.dtype):
    """Scale = code x nested scale + offset with two roundings: a fused multiply-add would show in the last bit."""
    absmax = torch.arange(256, dtype=torch.uint8).repeat(3)
    n = 32 * len(absmax)
    packed = torch.randint(0, 256, (n // 2, 1), dtype=torch.uint8)
    state = QuantState((n,), dtype, "nf4", 32, absmax, torch.tensor([0.3, 7.7, 1e-3]), torch.tensor(1.2345678))
    ours, theirs = decode_guarded(packed, state, dtype, device), reference(packed, state, dtype)
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_hands_over_the_right_arguments(device: str, dtype: torch.dtype, double_quant: bool):
    """What the dispatcher calls for a CUDA tensor, without `out`: a new tensor of its own."""
    packed, state = quantize_4bit(torch.randn(33, 65), "nf4", 64, double_quant)
    theirs = reference(packed, state, dtype)
    scales = (state.absmax, state.nested_absmax, state.nested_offset)
    held = [None if tensor is None else tensor.to(device) for tensor in (packed, *scales)]
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # named, so that the interpreter's CPU tensors get there
    ours = torch.ops.minift.dequantize_4bit.default.redispatch(
        cuda, *held, state.quant_type, state.blocksize, state.shape, dtype
    )
    assert ours.device.type == device and ours.shape == (33, 65) and ours.dtype == dtype
    assert torch.equal(bits(ours.cpu()), bits(theirs))


# --- reading too far --------------------------------------------------------------------------------------------------


def before_unreadable_page(x: Tensor) -> tuple[Tensor, mmap.mmap]:
    """A copy of x that ends where a page without any access rights begins, and the memory that holds it."""
    page = mmap.PAGESIZE
    readable = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, readable + page)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=readable - x.nbytes)
    copy.copy_(x.reshape(-1))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    end = copy.data_ptr() + x.nbytes
    assert protect(end, page, 0) == 0, os.strerror(ctypes.get_errno())
    return copy, memory


@pytest.mark.parametrize("n", [1, 65, 2049])
@pytest.mark.parametrize("double_quant", [False, True])
def test_reads_nothing_behind_its_inputs(device: str, double_quant: bool, n: int):
    """A load without its mask touches the unreadable page and ends the process with a segmentation fault."""
    if device == "cuda" or sys.platform != "linux":
        pytest.skip("the pages are in this process's memory, and protected the Linux way")
    from minift_kernels.fourbit import dequantize_4bit

    packed, state = quantize_4bit(torch.randn(n), "nf4", 64, double_quant)
    packed_in, packed_memory = before_unreadable_page(packed)
    absmax_in, absmax_memory = before_unreadable_page(state.absmax)
    nested_in, nested_memory = None, None
    if state.nested_absmax is not None:
        nested_in, nested_memory = before_unreadable_page(state.nested_absmax)
    code, nested_code = codebook("nf4"), dynamic_map(True)
    ours = dequantize_4bit(
        packed_in, absmax_in, code, nested_in, state.nested_offset, nested_code, 64, state.shape, torch.float32
    )
    assert torch.equal(bits(ours), bits(reference(packed, state, torch.float32)))
    del packed_memory, absmax_memory, nested_memory  # held until here
