"""The Triton kernel of stochastic rounding against the PyTorch body of its operator, bit for bit (see guards.py)."""

import math

import pytest
import torch
from guards import (
    DEVICES,
    INTERPRETED,
    UnreadablePages,
    bits,
    guard_bands,
    on_cuda_path,
    skip_unless_pages_can_be_protected,
)
from torch import Tensor

from minift.numerics.rounding import floor_quanta, random_words

DTYPES = [torch.bfloat16, torch.float16]
BLOCK = 2048  # elements of a program
# One value, around the four words of a counter, around a program, several programs with a rest.
SIZES = [1, 3, 4, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]
# Both of the key's words, its sign bit, and values for which Triton would compile a kernel of its own.
SEEDS = [0, 1, 16, 2**31, 2**32 + 5, 2**63 - 1, -(2**63), -1]

pytestmark = pytest.mark.parametrize("device", DEVICES)

if INTERPRETED or torch.cuda.is_available():  # else every test here is skipped, and Triton may not be installed
    import triton
    import triton.language as tl

    from minift_kernels.rounding import philox_words

    @triton.jit
    def _sixteen_counters_kernel(out_ptr, first_counter, seed):
        counter = tl.cast(first_counter, tl.int64) + tl.arange(0, 16)
        tl.store(out_ptr + tl.arange(0, 64), philox_words(counter, seed).to(tl.int64))


def round_guarded(x: Tensor, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    """Run the kernel between guard bands, check them, and return the result on the CPU."""
    from minift_kernels.rounding import COUNTERS, stochastic_round

    assert 4 * COUNTERS == BLOCK, "the sizes here were chosen for another kernel"
    with guard_bands(device) as guards:
        x_in, out = guards.input(x), guards.output(x.numel(), dtype)
        assert x_in is not None
        result = stochastic_round(x_in, dtype, seed, out=out)
    assert result.data_ptr() == out.data_ptr() and result.shape == x.shape and result.dtype == dtype
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
    assert torch.equal(bits(round_guarded(x, dtype, 99, device)), bits(reference(x, dtype, 99)))


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
    assert torch.equal(bits(round_guarded(x, dtype, seed, device)), bits(reference(x, dtype, seed)))


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
        assert torch.equal(bits(round_guarded(x, dtype, seed, device)), bits(reference(x, dtype, seed)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_range(device: str, dtype: torch.dtype):
    """Around the largest number and halfway beyond it; around 2^-14, 2^-24, 2^-33 and 2^-56."""
    largest = torch.finfo(dtype).max
    borders = [largest, 65519.996, 65520.0, 3.3961776e38, 3.4028235e38, 2**-14, 2**-24, 2**-33, 2**-56, 0.0, math.inf]
    x = torch.tensor(borders)
    x = torch.cat([torch.nextafter(x, torch.tensor(end)) for end in (0.0, math.inf)] + [x]).repeat(20)
    x = torch.cat([x, -x])
    assert torch.equal(bits(round_guarded(x, dtype, 8, device)), bits(reference(x, dtype, 8)))


@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(device: str, dtype: torch.dtype, shape: tuple[int, ...]):
    """No value, no launch (a grid of 0 programs is an error on a GPU)."""
    assert round_guarded(torch.zeros(shape), dtype, 1, device).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_hands_over_the_right_arguments(device: str, dtype: torch.dtype):
    """What the dispatcher calls for a CUDA tensor, without `out`, for views too: a new tensor of its own."""
    x = torch.randn(33, 65)
    for view in (lambda x: x, lambda x: x.T, lambda x: x[:, ::2], lambda x: x[:, :1].expand(33, 9)):
        ours = on_cuda_path("stochastic_round", view(x.to(device)), dtype, 7)
        assert ours.device.type == device and ours.dtype == dtype and ours.is_contiguous()
        assert torch.equal(bits(ours.cpu()), bits(reference(view(x), dtype, 7)))


@pytest.mark.parametrize("n", [1, 5, BLOCK + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_nothing_behind_its_input(device: str, dtype: torch.dtype, n: int):
    """A load without its mask touches the unreadable page and ends the process with a segmentation fault."""
    skip_unless_pages_can_be_protected(device)
    from minift_kernels.rounding import stochastic_round

    x = torch.randn(n)
    pages = UnreadablePages()
    x_in = pages.before_page(x)
    assert x_in is not None
    assert torch.equal(bits(stochastic_round(x_in, dtype, 2)), bits(reference(x, dtype, 2)))
    del pages  # held until here


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
        wanted = floor_quanta(torch.full((size,), 1.001), random_words(first, size, 6), torch.bfloat16)
        assert torch.equal(ours[first : first + size].cpu(), wanted)
