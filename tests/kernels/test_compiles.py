"""Every kernel compiles ahead of time for two generations of GPUs, without one; what the machine code must look like.

The interpreter shows that a kernel computes the right thing. It does not show that the kernel compiles, that a division
is the exact one (`div.rn`; `/` becomes an approximate one), that products and sums stay separate, that nothing spills
to memory, or that weights are moved 16 bytes at a time. The PTX text and the resources of the binary do.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from guards import INTERPRETED

import minift_kernels

if sys.platform != "linux":
    pytest.skip("Triton is installed on Linux only", allow_module_level=True)
if INTERPRETED:
    pytest.skip("interpreted kernels cannot be compiled: needs a process without it", allow_module_level=True)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minift.quant.blockwise import TINY
from minift_kernels import adamw8bit, blockwise, flash, fourbit, matmul, rounding

# Arguments that are pointers to 32-bit floats, bytes, and sizes; x, bias and out differ from case to case.
BYTES = {"packed_ptr", "codes_ptr", "order_ptr"}
NESTED = {"absmax_ptr": "*u8"}
EXACT = {"enable_fp_fusion": False}
TILE_64 = {"BLOCKSIZE": 64, "BLOCKS": 64}
TILE_256 = {"BLOCKSIZE": 256, "BLOCKS": 16}


def matmul_case(rows: int, aligned: bool, dtype: str) -> tuple:
    out, chunk = matmul.TILES[rows]
    constants = {"HAS_BIAS": True, "NESTED": True, "ALIGNED": aligned, "BLOCKSIZE": 64, "T": rows, "OUT": out}
    constants |= {"CHUNK": chunk, "INTERPRETED": False, "ROUND_BY_BITS": False}
    types = NESTED | {"x_ptr": dtype, "bias_ptr": dtype, "out_ptr": dtype}
    return matmul._matmul_4bit_kernel, types, constants, EXACT | {"num_stages": 1}


def rounding_case(dtype: torch.dtype) -> tuple:
    constants = rounding.TARGETS[dtype] | {"COUNTERS": rounding.COUNTERS}
    return rounding._stochastic_round_kernel, {"x_ptr": "*i32", "out_ptr": "*i16", "seed": "i64"}, constants, {}


def adamw8bit_case(dtype: torch.dtype, eight_bit: bool = True, stochastic: bool = False) -> tuple:
    constants = adamw8bit.constants(dtype, dtype, True, eight_bit, stochastic)
    types: dict[str, str] = {"addresses_ptr": "*i64", "tiles_ptr": "*i64", "seed": "i64", "first": "i64"}
    types |= dict.fromkeys(["before", "after", "beta1", "rest1", "beta2", "rest2", "rate", "eps"], "fp32")
    if eight_bit:
        types |= {"m_ptr": "*u8", "v_ptr": "*u8"}
    else:
        constants |= dict.fromkeys(["m_absmax_ptr", "v_absmax_ptr"])
    return adamw8bit._adamw8bit_kernel, types, constants, EXACT | {"num_warps": 8}


def flash_cases(dtype: torch.dtype, width: int, cap: bool = False) -> dict[str, tuple]:
    """The three kernels of attention, for packed rows: they have more to keep in registers than plain causal ones."""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    fixed = {"first_ptr": "*i64", "last_ptr": "*i64", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    fixed |= dict.fromkeys(["scale", "cap", "grad_scale"], "fp32")
    cases = {}
    for name, kernel, table in (
        ("forward", flash._flash_forward_kernel, flash.FORWARD),
        ("dq", flash._flash_dq_kernel, flash.DQ),
        ("dk and dv", flash._flash_dkv_kernel, flash.DKV),
    ):
        types = {argument: f"*{kind}" for argument in kernel.arg_names if argument.endswith("_ptr")} | fixed
        tile, options = flash.tile_of(table, torch.empty(1, width, dtype=dtype))
        constants = tile | {"HAS_FIRST": True, "SOFTCAP": cap, "INTERPRETED": False, "ROUND_BY_BITS": False}
        cases[f"flash {name}, {kind}, {width}{', cap' if cap else ''}"] = (kernel, types, constants, options)
    return cases


# Name -> kernel, types of the arguments that are not fp32 pointers, constants, options: as the launchers pass them.
CASES = {
    "quantize 4 bit, bf16": (
        fourbit._quantize_4bit_kernel, {"x_ptr": "*bf16"}, TILE_64, EXACT | {"num_warps": 8}),
    "quantize 4 bit, fp32, large blocks": (
        fourbit._quantize_4bit_kernel, {}, {"BLOCKSIZE": 4096, "BLOCKS": 1}, EXACT | {"num_warps": 8}),
    "dequantize 4 bit, bf16": (
        fourbit._dequantize_4bit_kernel, {"out_ptr": "*bf16"},
        TILE_64 | {"NESTED": False, "ROUND_BY_BITS": False}, EXACT),
    "dequantize 4 bit, bf16, nested": (
        fourbit._dequantize_4bit_kernel, NESTED | {"out_ptr": "*bf16"},
        TILE_64 | {"NESTED": True, "ROUND_BY_BITS": False}, EXACT),
    "dequantize 4 bit, fp32, nested": (
        fourbit._dequantize_4bit_kernel, NESTED, TILE_64 | {"NESTED": True, "ROUND_BY_BITS": False}, EXACT),
    "quantize 8 bit, signed": (
        blockwise._quantize_blockwise_kernel, {}, TILE_256 | {"SIGNED": True}, EXACT | {"num_warps": 8}),
    "quantize 8 bit, unsigned, fp16": (
        blockwise._quantize_blockwise_kernel, {"x_ptr": "*fp16"}, TILE_256 | {"SIGNED": False},
        EXACT | {"num_warps": 8}),
    "dequantize 8 bit, bf16": (
        blockwise._dequantize_blockwise_kernel, {"out_ptr": "*bf16"}, TILE_256 | {"ROUND_BY_BITS": False}, EXACT),
    "adamw8bit, fp32": adamw8bit_case(torch.float32),
    "adamw8bit, bf16": adamw8bit_case(torch.bfloat16),
    "adamw8bit, bf16, stochastic": adamw8bit_case(torch.bfloat16, stochastic=True),
    "adamw8bit, fp16, stochastic": adamw8bit_case(torch.float16, stochastic=True),
    "adamw8bit, fp32 state": adamw8bit_case(torch.float32, eight_bit=False),
    "round to bf16": rounding_case(torch.bfloat16),
    "round to fp16": rounding_case(torch.float16),
    **{
        f"matmul, {rows} rows, {dtype[1:]}{', whole blocks' if aligned else ''}": matmul_case(rows, aligned, dtype)
        for rows in matmul.TILES for aligned in (True, False) for dtype in ("*bf16", "*fp16", "*fp32")
    },
    **flash_cases(torch.bfloat16, 64),
    **flash_cases(torch.float16, 128),
    **flash_cases(torch.bfloat16, 128, cap=True),
    **flash_cases(torch.float32, 64),
}  # fmt: skip
CAPABILITIES = [80, 90]  # A100; H100 and H200


@cache
def compile_case(name: str, capability: int):
    """The compiled kernel. Pointers and sizes are multiples of 16, as those of real weights are."""
    kernel, types, constants, options = CASES[name]
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        default = "*u8" if argument in BYTES else "*fp32" if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constants else types.get(argument, default)
        size = argument in ("n", "n_bytes", "in_features", "out_features")
        if size or argument.endswith("_ptr") or argument.startswith("stride_"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile anew, and leave nothing behind in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def resources(binary: bytes, folder: Path) -> dict[str, int]:
    """Bytes of stack and local memory of each thread: where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton comes without cuobjdump")
    (folder / "kernel.cubin").write_bytes(binary)
    listing = subprocess.run(
        [tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spilling(name: str, capability: int, tmp_path: Path):
    compiled = compile_case(name, capability)
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    used = resources(compiled.asm["cubin"], tmp_path)
    # The assembler may park one or two 8-byte addresses outside the loops, to fit one more program on a processor.
    assert used["REG"] > 0 and used["STACK"] <= 16 and used["LOCAL"] == 0, used


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("round", "flash"))])
def test_arithmetic_is_exact(name: str, capability: int):
    """Divisions are rounded correctly, denormals are not flushed, products and sums are fused only where asked for."""
    ptx = compile_case(name, capability).asm["ptx"]
    divisions = set(re.findall(r"\b(?:div|rcp)\.[\w.]+", ptx))
    assert divisions == ({"div.rn.f32"} if name.startswith(("quantize", "adamw8bit")) else set())
    assert set(re.findall(r"\bsqrt\.[\w.]+", ptx)) == ({"sqrt.rn.f32"} if name.startswith("adamw8bit") else set())
    assert ".ftz" not in ptx
    if not name.startswith("matmul"):
        assert "fma." not in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in CASES if "quantize" in name])
def test_memory_is_moved_16_bytes_at_a_time(name: str, capability: int):
    """Reading for quantizing, writing for dequantizing: the larger side, which bounds the speed."""
    ptx = compile_case(name, capability).asm["ptx"]
    assert ("st.global.v4" if name.startswith("dequantize") else "ld.global.v4") in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("name", "width"), [("adamw8bit, fp32", "v4"), ("adamw8bit, bf16", "v4")])
def test_parameters_behind_addresses_are_moved_16_bytes_at_a_time(name: str, width: str, capability: int):
    """The compiler knows nothing of an address that it loads, but what the kernel tells it."""
    ptx = compile_case(name, capability).asm["ptx"]
    assert f"ld.global.{width}" in ptx and f"st.global.{width}" in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_several_rows_use_tensor_cores(dtype: str, capability: int):
    """And no software pipeline, which would fetch codebook entries through shared memory."""
    ptx = compile_case(f"matmul, 16 rows, {dtype}, whole blocks", capability).asm["ptx"]
    kind = {"bf16": "bf16", "fp16": "f16"}[dtype]
    assert re.search(rf"mma\.sync\.[\w.]+\.f32\.{kind}\.{kind}\.f32", ptx)
    assert "cp.async" not in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("flash")])
def test_attention_multiplies_as_intended(name: str, capability: int):
    """16 bits on tensor cores, summed in fp32 (`wgmma` is Hopper's instruction); fp32 as fp32, not as TF32.

    And within 99 KB of shared memory, what consumer GPUs have.
    """
    compiled = compile_case(name, capability)
    found = set(re.findall(r"\b(?:wg)?mma(?:_async)?\.(?:mma_async\.)?sync\.[\w.]+", compiled.asm["ptx"]))
    if "fp32" in name:
        assert not found and "fma.rn.f32" in compiled.asm["ptx"]
    else:
        kind = "bf16" if "bf16" in name else "f16"
        assert found and all(f".f32.{kind}.{kind}" in instruction for instruction in found)
    assert compiled.metadata.shared <= 99 * 1024


def test_least_divisor_is_that_of_the_pytorch_body():
    """One unit more is hardly seen in codes: only denormal blocks are divided by it."""
    assert blockwise.TINY_BITS.value == torch.tensor(TINY, dtype=torch.float32).view(torch.int32).item()


def test_every_kernel_is_compiled_here():
    """A kernel of a new file needs a case."""
    files = [importlib.import_module(f"minift_kernels.{found.name}") for found in pkgutil.iter_modules(
        minift_kernels.__path__)]  # fmt: skip
    kernels = {name for file in files for name in vars(file) if name.startswith("_") and name.endswith("_kernel")}
    assert len(kernels) >= 6
    assert kernels == {kernel.__name__ for kernel, *_ in CASES.values()}
