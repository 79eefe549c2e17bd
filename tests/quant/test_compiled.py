"""The compiled forms give the bits of the eager ones, for every input that they accept, and only those.

In a process of its own: the compiler stays in memory, and whether it is used is one setting for the whole process.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minift.optim.adamw8bit import AdamW8bit
from minift.quant import (
    Linear4bit,
    QuantConfig,
    QuantState,
    codebook,
    compile_kernels,
    compiled,
    dequantize_4bit,
    dynamic_map,
    quantize_4bit,
    quantize_blockwise,
)

HAS_COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))
INSIDE = os.environ.get("MINIFT_TEST_COMPILED") == "1"
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler (g++ or clang++)")
inside = pytest.mark.skipif(not INSIDE, reason="runs in a process of its own: test_in_its_own_process")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@needs_compiler
@pytest.mark.skipif(INSIDE, reason="this is that process")
def test_in_its_own_process():
    command = [sys.executable, "-P", "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    environment = os.environ | {"MINIFT_TEST_COMPILED": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    last = done.stdout.strip().splitlines()[-1]
    assert int(last.split()[0]) >= 31 and "passed" in last and "failed" not in last, last


@pytest.fixture
def compiler() -> Iterator[None]:
    assert compile_kernels()
    yield
    assert not compile_kernels(False)


def eager_and_compiled(call) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results of a call without and with the compiled forms."""
    compile_kernels(False)
    eager = call()
    compile_kernels(True)
    return eager, call()


def assert_same_bits(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.view(integer), b.view(integer))


def awkward(blocksize: int) -> Tensor:
    """Whole blocks: values on every threshold and beside it, zero blocks, denormal blocks, huge and random ones."""
    rows = [torch.zeros(blocksize), torch.full((blocksize,), 1e-40), torch.randn(blocksize) * 3e38 / 5]
    for table in (codebook("nf4"), codebook("fp4"), dynamic_map(True)):
        rising = table.sort().values
        middle = (rising[:-1] + rising[1:]) / 2
        around = torch.cat([middle, *(torch.nextafter(middle, torch.tensor(end)) for end in (-9.0, 9.0))])
        for chunk in around.split(blocksize - 1):
            rows.append(torch.cat([torch.ones(1), chunk, torch.zeros(blocksize - 1 - len(chunk))]))
    return torch.cat([torch.stack(rows), torch.randn(300, blocksize)])


@inside
@needs_compiler
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_4bit(compiler: None, quant_type: str, dtype: torch.dtype, blocksize: int):
    x = awkward(blocksize).to(dtype)
    x = torch.where(x.isfinite(), x, torch.tensor(1.0, dtype=dtype))

    def call() -> tuple[Tensor, ...]:
        packed, state = quantize_4bit(x, quant_type, blocksize)
        return packed, state.absmax

    assert_same_bits(*eager_and_compiled(call))


@inside
@needs_compiler
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_4bit(compiler: None, quant_type: str, dtype: torch.dtype, double_quant: bool):
    """bf16 is compiled; the others must go on to work."""
    packed = torch.randint(0, 256, (64 * 700, 1), dtype=torch.uint8)
    _, state = quantize_4bit(awkward(64)[3:].repeat(5, 1)[:1400].to(dtype), quant_type, 64, double_quant)
    eager, ours = eager_and_compiled(lambda: (dequantize_4bit(packed, state),))
    assert_same_bits(eager, ours)


@inside
@needs_compiler
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ties_are_rounded_to_even(compiler: None, quant_type: str):
    """Scales exactly between two bf16 numbers, beside them, tiny and huge; the codes 1 and -1 keep them as they are."""
    middle = ((torch.arange(0x3F80, 0x3FC0, dtype=torch.int32) << 16) | 0x8000).view(torch.float32)
    beside = [torch.nextafter(middle, torch.tensor(end)) for end in (0.0, 9.0)]
    absmax = torch.cat([middle, *beside, torch.tensor([0.0, 1e-45, 1e-40, 1e-38, 3.38e38, 3.4e38])])
    packed = torch.arange(32, dtype=torch.uint8).mul(8).repeat(len(absmax))[:, None] | 1
    packed[0::8] = codebook(quant_type).argmax() * 17
    packed[1::8] = codebook(quant_type).argmin() * 17
    state = QuantState((64 * len(absmax),), torch.bfloat16, quant_type, 64, absmax)
    eager, ours = eager_and_compiled(lambda: (dequantize_4bit(packed, state),))
    assert_same_bits(eager, ours)
    assert (ours[0][:64].abs() == middle[0].bfloat16()).any()


@inside
@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
def test_quantize_blockwise(compiler: None, signed: bool, dtype: torch.dtype):
    x = awkward(256).to(dtype)
    x = torch.where(x.isfinite(), x, torch.tensor(1.0, dtype=dtype))
    x = x if signed else x.abs()
    assert_same_bits(*eager_and_compiled(lambda: quantize_blockwise(x, dynamic_map(signed))))


@inside
@needs_compiler
@pytest.mark.parametrize("start", [0, 1, 2])
def test_memory_at_any_address(compiler: None, start: int):
    """Two bf16 values are written as one int32, which needs an address that is a multiple of 4."""
    packed, state = quantize_4bit(torch.randn(64, 64).bfloat16())
    buffer = torch.zeros(64 * 64 + 4, dtype=torch.bfloat16)
    out = buffer[start : start + 64 * 64].view(64, 64)
    assert_same_bits(*eager_and_compiled(lambda: (dequantize_4bit(packed, state, out=out).clone(),)))
    assert not buffer[:start].any() and not buffer[start + 64 * 64 :].any()


@inside
@needs_compiler
def test_tensors_of_many_sizes(compiler: None):
    """More sizes than the compiler's limit of recompilations."""
    for n in range(1, 14):
        x = torch.randn(n * 64)
        assert_same_bits(*eager_and_compiled(lambda x=x: (dequantize_4bit(*quantize_4bit(x.bfloat16())),)))


@inside
@needs_compiler
def test_what_has_no_whole_blocks_stays_eager(compiler: None):
    for n in (1, 63, 65, 1000):
        x = torch.randn(n)
        assert not compiled.applies(x, n, 64)
        assert_same_bits(*eager_and_compiled(lambda x=x: (quantize_4bit(x)[0], quantize_blockwise(x)[0])))


@inside
@needs_compiler
def test_layer(compiler: None):
    """Forward, backward, inference mode, and bad weights are still found."""
    layer = Linear4bit.from_linear(torch.nn.Linear(128, 96).bfloat16())
    x = torch.randn(7, 128, dtype=torch.bfloat16, requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        y = layer(x)
        (grad,) = torch.autograd.grad(y.float().square().sum(), x)
        with torch.inference_mode():
            again = layer(x)
        return y.detach(), grad, again.clone()

    assert_same_bits(*eager_and_compiled(call))
    bad = torch.randn(128)
    bad[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_4bit(bad)
    with pytest.raises(ValueError, match="infinite"):
        quantize_blockwise(torch.full((256,), float("inf")))
    assert quantize_4bit(torch.randn(64, 64), QuantConfig().quant_type)[0].shape == (2048, 1)


@inside
@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"order": "bnb", "paged": True, "page_bytes": 52_000, "budget_bytes": 52_000}])
def test_steps_of_8_bit_adamw(compiler: None, options: dict, dtype: torch.dtype):
    """Sizes with padding, below a block, beyond a window; gradients that are zero, tiny, huge, infinite."""
    sizes = [4096, 4097, 5000, 300, 200_001]

    def call() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
        optimizer = AdamW8bit(params, lr=0.1, weight_decay=0.2, stochastic_rounding=dtype != torch.float32, **options)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            for p in params:
                grad = (torch.randn(p.shape) * torch.randint(-30, 4, p.shape).float().exp2()).to(dtype)
                grad[1000:2000] = 0
                grad[7] = [0.0, 1e-30, 1e4, float("inf")][step] if p is params[1] else 1.0
                p.grad = grad
            optimizer.step()
        state = optimizer.state_dict()["state"]["group0"]
        return *(p.detach() for p in params), *(state[name] for name in ("m_codes", "v_codes", "m_absmax", "v_absmax"))

    assert_same_bits(*eager_and_compiled(call))


def test_without_a_compiler_it_says_so(tmp_path):
    """An empty PATH and CXX that does not exist: a warning, False, and everything still works."""
    code = (
        "import warnings, torch\n"
        "from minift.quant import compile_kernels, quantize_4bit\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    print(compile_kernels())\n"
        "print(any('no working C++ compiler' in str(w.message) for w in caught))\n"
        "print(quantize_4bit(torch.ones(64))[0].shape)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    environment |= {"PATH": str(tmp_path), "CXX": str(tmp_path / "missing"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:3] == ["False", "True", "torch.Size([32, 1])"]
