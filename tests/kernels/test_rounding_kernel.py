"""The Triton kernel of stochastic rounding against the PyTorch body of the same operator, bit for bit.

One body serves two machines, as in test_fourbit_kernel.py: `cuda` is the compiled kernel, `cpu` Triton's interpreter,
which test_interpreter.py starts in a process of its own. What lies around the output must keep its pattern, so a
missing store mask shows. In one test an unreadable page follows the input, so a missing load mask ends the process.
"""

import ctypes
import math
import mmap
import os
import sys

import pytest
import torch
from torch import Tensor

from minift.numerics.rounding import _floor_quanta, random_words

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
DTYPES = [torch.bfloat16, torch.float16]
BLOCK = 2048  # elements of a program
# One value, around the four words of a counter, around a program, several programs with a rest.
SIZES = [1, 3, 4, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]
GUARD = 4096  # elements on each side: more than a program writes, so that a whole program astray is seen
# Both of the key's words, its sign bit, and values for which Triton would compile a kernel of its own.
SEEDS = [0, 1, 16, 2**31, 2**32 + 5, 2**63 - 1, -(2**63), -1]

pytestmark = pytest.mark.parametrize("device", DEVICES)

if INTERPRETED or torch.cuda.is_available():  # else every test here is skipped, and Triton may not be installed
    import triton
    import triton.language as tl

    from minift_kernels.rounding import _random_words

    @triton.jit
    def _sixteen_counters_kernel(out_ptr, first_counter, seed):
        counter = tl.cast(first_counter, tl.int64) + tl.arange(0, 16)
        tl.store(out_ptr + tl.arange(0, 64), _random_words(counter, seed).to(tl.int64))


def pattern(x: Tensor) -> Tensor:
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()])


def guarded(x: Tensor, poison: float, device: str) -> tuple[Tensor, Tensor]:
    """A copy of x between two bands of poison: the copy, and the whole buffer."""
    buffer = torch.full((x.numel() + 2 * GUARD,), poison, dtype=x.dtype, device=device)
    inside = buffer[GUARD : GUARD + x.numel()]
    inside.copy_(x.reshape(-1))
    return inside, buffer


def round_guarded(x: Tensor, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    """Run the kernel between guard bands, check them, and return the result on the CPU."""
    from minift_kernels.rounding import COUNTERS, stochastic_round

    assert 4 * COUNTERS == BLOCK, "the sizes here were chosen for another kernel"
    x_in, x_buffer = guarded(x, 123.0, device)
    before = x_buffer.clone()
    out, out_buffer = guarded(torch.full((x.numel(),), -777.0, dtype=dtype), -555.0, device)
    band = out_buffer[:GUARD].clone()

    result = stochastic_round(x_in.view(x.shape), dtype, seed, out=out)

    assert result.data_ptr() == out.data_ptr() and result.shape == x.shape and result.dtype == dtype
    assert torch.equal(pattern(out_buffer[:GUARD]), pattern(band)), "wrote before the output"
    assert torch.equal(pattern(out_buffer[GUARD + x.numel() :]), pattern(band)), "wrote behind the output"
    assert torch.equal(pattern(x_buffer), pattern(before)), "wrote into the input"
    return result.cpu()


def reference(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """The PyTorch body: the operator on CPU tensors."""
    return torch.ops.minift.stochastic_round(x, dtype, seed)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 3e-5, 1e-7])
def test_equals_the_pytorch_body(device: str, size: float, dtype: torch.dtype, n: int):
    """Ordinary numbers, and the subnormal range of fp16."""
    x = torch.randn(n) * size
    assert torch.equal(pattern(round_guarded(x, dtype, 99, device)), pattern(reference(x, dtype, 99)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first_counter", [0, 7, 2**32 - 9, 2**32, 3 * 2**40 + 1])
def test_words_beyond_32_bits(device: str, first_counter: int, seed: int):
    """Places that only a tensor of more than 2^34 elements has: the counter's second word."""
    ours = torch.zeros(64, dtype=torch.int64, device=device)
    _sixteen_counters_kernel[(1,)](ours, first_counter, seed)
    assert torch.equal(ours.cpu(), random_words(4 * first_counter, 64, seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds(device: str, dtype: torch.dtype, seed: int):
    x = torch.randn(3, 5, 7)
    assert torch.equal(pattern(round_guarded(x, dtype, seed, device)), pattern(reference(x, dtype, seed)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_exponent(device: str, dtype: torch.dtype):
    """From fp32's subnormals to infinity and NaN: 256 exponents x 32 fractions, both signs."""
    exponent = (torch.arange(256, dtype=torch.int32) << 23)[:, None]
    some = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0x7FE000, 0x7FEFFF, 0x7FF000, 0x7FFFFF])
    fraction = torch.cat([some, torch.randint(0, 1 << 23, (20,))]).int()
    magnitude = exponent | fraction
    x = torch.stack([magnitude, magnitude | -(2**31)]).view(torch.float32)
    assert x.isnan().any() and x.isinf().sum() == 2
    for seed in (3, 4):
        assert torch.equal(pattern(round_guarded(x, dtype, seed, device)), pattern(reference(x, dtype, seed)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_range(device: str, dtype: torch.dtype):
    """Around the largest number and halfway beyond it; around 2^-14, 2^-24, 2^-33 and 2^-56."""
    largest = torch.finfo(dtype).max
    borders = [largest, 65519.996, 65520.0, 3.3961776e38, 3.4028235e38, 2**-14, 2**-24, 2**-33, 2**-56, 0.0, math.inf]
    x = torch.tensor(borders)
    x = torch.cat([torch.nextafter(x, torch.tensor(end)) for end in (0.0, math.inf)] + [x]).repeat(20)
    x = torch.cat([x, -x])
    assert torch.equal(pattern(round_guarded(x, dtype, 8, device)), pattern(reference(x, dtype, 8)))


@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(device: str, dtype: torch.dtype, shape: tuple[int, ...]):
    """No value, no launch (a grid of 0 programs is an error on a GPU)."""
    assert round_guarded(torch.zeros(shape), dtype, 1, device).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_hands_over_the_right_arguments(device: str, dtype: torch.dtype):
    """What the dispatcher calls for a CUDA tensor, without `out`, for views too: a new tensor of its own."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # named, so that the interpreter's CPU tensors get there
    x = torch.randn(33, 65)
    for view in (lambda x: x, lambda x: x.T, lambda x: x[:, ::2], lambda x: x[:, :1].expand(33, 9)):
        ours = torch.ops.minift.stochastic_round.default.redispatch(cuda, view(x.to(device)), dtype, 7)
        assert ours.device.type == device and ours.dtype == dtype and ours.is_contiguous()
        assert torch.equal(pattern(ours.cpu()), pattern(reference(view(x), dtype, 7)))


def before_unreadable_page(x: Tensor) -> tuple[Tensor, mmap.mmap]:
    """A copy of x that ends where a page without any access rights begins, and the memory that holds it."""
    page = mmap.PAGESIZE
    readable = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, readable + page)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=readable - x.nbytes)
    copy.copy_(x)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(copy.data_ptr() + x.nbytes, page, 0) == 0, os.strerror(ctypes.get_errno())
    return copy, memory


@pytest.mark.parametrize("n", [1, 5, BLOCK + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_nothing_behind_its_input(device: str, dtype: torch.dtype, n: int):
    """A load without its mask touches the unreadable page and ends the process with a segmentation fault."""
    if device == "cuda" or sys.platform != "linux":
        pytest.skip("the pages are in this process's memory, and protected the Linux way")
    from minift_kernels.rounding import stochastic_round

    x = torch.randn(n)
    x_in, memory = before_unreadable_page(x)
    assert torch.equal(pattern(stochastic_round(x_in, dtype, 2)), pattern(reference(x, dtype, 2)))
    del memory  # held until here


@pytest.mark.gpu
def test_more_than_2_31_elements(device: str):
    """Offsets beyond 32 bits: the last elements, and those around 2^31, against the words of their places."""
    if device == "cpu":
        pytest.skip("the interpreter would take hours")
    from minift_kernels.rounding import stochastic_round

    n = 2**31 + 2 * BLOCK + 3
    if torch.cuda.mem_get_info()[0] < 7 * n:
        pytest.skip("needs 15 GB of free GPU memory")
    x = torch.full((n,), 1.001, device=device)
    ours = stochastic_round(x, torch.bfloat16, 6)
    for first, size in ((2**31 - BLOCK, 2 * BLOCK), (2**31 + BLOCK, BLOCK + 3), (0, BLOCK)):
        wanted = _floor_quanta(torch.full((size,), 1.001), random_words(first, size, 6), torch.bfloat16)
        assert torch.equal(ours[first : first + size].cpu(), wanted)
