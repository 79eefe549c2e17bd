"""The Triton kernel that multiplies by a packed 4-bit weight: which weight it multiplies by, and how exactly it sums.

A row of x with a single 1 picks one column of the weight, exactly: every other product is 0. So rows of the identity
give the decoded weight back, to be held against `dequantize_4bit`, bit for bit. The sums are held against float64.
"""

from dataclasses import replace

import pytest
import torch
from guards import DEVICES, DTYPES, UnreadablePages, guard_bands, on_cuda_path, skip_unless_pages_can_be_protected
from torch import Tensor

from minift.quant import QuantState, codebook, dequantize_4bit, dynamic_map, quantize_4bit
from minift.quant.matmul import matmul_4bit

# Rows of whole blocks (64): one, below and above a chunk of inputs; rows that begin anywhere: odd, even, one value.
SHAPES = [(1, 64), (33, 128), (5, 576), (17, 1088), (1, 1), (20, 65), (7, 130), (18, 513), (5, 1025)]

pytestmark = pytest.mark.parametrize("device", DEVICES)


def tables(quant_type: str) -> tuple[Tensor, Tensor]:
    return codebook(quant_type), dynamic_map(True)


def multiply_guarded(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None, device: str) -> Tensor:
    """Run the kernel between guard bands, check them, and return the product on the CPU."""
    from minift_kernels.matmul import matmul_4bit

    weight = (packed, state.absmax, state.nested_absmax, state.nested_offset, *tables(state.quant_type))
    rows, out_features = len(x), state.shape[0]
    with guard_bands(device) as guards:
        out = guards.output(rows * out_features, x.dtype).view(rows, out_features)
        x_in, *weight_in, bias_in = [guards.input(tensor) for tensor in (x, *weight, bias)]
        result = matmul_4bit(x_in, *weight_in, state.blocksize, out_features, bias_in, out=out)  # pyright: ignore
        assert result.data_ptr() == out.data_ptr() and result.shape == (rows, out_features)
    return result.cpu()


def columns_by_identity(packed: Tensor, state: QuantState, rows: int, dtype: torch.dtype, device: str) -> Tensor:
    """The weight as the kernel sees it: `rows` columns at a time, of at most 16 columns from each end."""
    _, in_features = state.shape
    picked = range(in_features) if in_features <= 65 else [*range(16), *range(in_features - 16, in_features)]
    identity = torch.eye(in_features, dtype=dtype)[list(picked)]
    found = [multiply_guarded(part, packed, state, None, device) for part in identity.split(rows)]
    wanted = dequantize_4bit(packed, state, dtype)[:, list(picked)]
    assert torch.equal(torch.cat(found).T, wanted)
    return wanted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_multiplies_by_the_decoded_weight(device: str, double_quant: bool, dtype: torch.dtype, shape: tuple[int, int]):
    packed, state = quantize_4bit(torch.randn(shape), "nf4", 64, double_quant)
    assert columns_by_identity(packed, state, 16, dtype, device).any()


@pytest.mark.parametrize("blocksize", [32, 128, 256, 1024, 4096])
@pytest.mark.parametrize("shape", [(3, 4096), (9, 1024), (9, 160), (3, 333)])
@pytest.mark.parametrize("rows", [1, 16])
def test_block_sizes(device: str, rows: int, shape: tuple[int, int], blocksize: int):
    """Blocks smaller and larger than a chunk, rows of whole blocks, and blocks of several rows."""
    packed, state = quantize_4bit(torch.randn(shape), "fp4", blocksize)
    x = torch.zeros(rows, shape[1])
    x[0, [0, shape[1] // 2, shape[1] - 1]] = torch.tensor([1.0, 2.0**20, 2.0**40])
    ours = multiply_guarded(x, packed, state, None, device)
    weight = dequantize_4bit(packed, state)
    # Far apart, so that each of the three columns decides some of the bits; fp32 sums of three terms, in any order.
    exact = x.double() @ weight.double().T
    assert ((ours.double() - exact).abs() <= 3 * 2**-24 * (x.double() @ weight.double().abs().T)).all()
    for column in (0, shape[1] - 1):
        one = torch.zeros(rows, shape[1])
        one[rows - 1, column] = 1
        assert torch.equal(multiply_guarded(one, packed, state, None, device)[rows - 1], weight[:, column])


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_sums(device: str, has_bias: bool, dtype: torch.dtype, shape: tuple[int, int], rows: int):
    """Against float64 with the same weight.

    Products are exact in fp32 for 16-bit types and rounded once for fp32; a sum of i products and the bias in any order
    is off by at most (i + 1) x 2^-24 of the sum of magnitudes. Then comes one rounding to the dtype of x: half a unit
    in the last place, or half of the smallest number of fp16.
    """
    packed, state = quantize_4bit(torch.randn(shape), "nf4", 64, double_quant=True)
    x = torch.randn(rows, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    ours = multiply_guarded(x, packed, state, bias, device).double()
    weight = dequantize_4bit(packed, state, dtype).double()
    exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    summed = (shape[1] + 2) * 2**-24 * magnitude
    rounded = torch.finfo(dtype).eps / 2 * (exact.abs() + summed) + torch.finfo(dtype).smallest_normal * 2**-10
    assert ((ours - exact).abs() <= summed + rounded).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_bias_is_added_before_the_rounding(device: str, rows: int, dtype: torch.dtype):
    """Column + bias in fp32, rounded once. Rounding the column first would be exact here, too: it holds W's dtype.

    So x is 1 + 2^-7 (exact in all three types): then the product needs more bits than 16-bit types have.
    """
    packed, state = quantize_4bit(torch.randn(37, 64), "nf4", 64)
    x, bias = torch.zeros(rows, 64, dtype=dtype), torch.randn(37).to(dtype)
    x[:, 5] = 1 + 2**-7
    ours = multiply_guarded(x, packed, state, bias, device)
    column = dequantize_4bit(packed, state, dtype)[:, 5].double() * (1 + 2**-7)
    if dtype == torch.float32:
        wanted = torch.stack([column + bias.double(), (column.float() + bias).double()])
        assert ((ours.double() - wanted[0]).abs() <= (wanted[0] - wanted[1]).abs() + 2**-24 * column.abs()).all()
    else:
        assert torch.equal(ours, (column.float() + bias.float()).to(dtype).expand(rows, -1))
        assert not torch.equal(ours[0], (column.to(dtype) + bias)), "the case does not tell the two apart"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (16,), (17,), (0,), (3, 7)])
def test_operator(device: str, rows: tuple[int, ...], dtype: torch.dtype):
    """What the dispatcher calls for CUDA tensors: any leading dimensions; above 16 rows and for none, decode + linear.

    One-hot rows again, so both ways, and the PyTorch body, give the same to the bit.
    """
    packed, state = quantize_4bit(torch.randn(21, 130), "nf4", 64, double_quant=True)
    picked = torch.randint(0, 130, rows)
    x = torch.nn.functional.one_hot(picked, 130).to(dtype)
    bias = torch.zeros(21, dtype=dtype)
    weight = (packed, state.absmax, state.nested_absmax, state.nested_offset)
    x_in, *weight_in, bias_in = [None if tensor is None else tensor.to(device) for tensor in (x, *weight, bias)]
    y = on_cuda_path("matmul_4bit", x_in, *weight_in, "nf4", 64, state.shape, bias_in)
    assert y.device.type == device and y.dtype == dtype and y.shape == (*rows, 21)
    assert torch.equal(y.cpu(), dequantize_4bit(packed, state, dtype).T[picked])
    assert torch.equal(y.cpu(), matmul_4bit(x, packed, state, bias))


def test_operator_takes_views(device: str):
    packed, state = quantize_4bit(torch.randn(21, 128), "nf4", 64)
    x, bias = torch.randn(128, 5).T, torch.randn(42)[::2]
    absmax = torch.stack([state.absmax, state.absmax], 1)[:, 0]
    assert not (x.is_contiguous() or bias.is_contiguous() or absmax.is_contiguous())
    strided = [tensor.to(device) for tensor in (x, packed.repeat(1, 2)[:, 0], absmax, bias)]
    y = on_cuda_path("matmul_4bit", *strided[:3], None, None, "nf4", 64, state.shape, strided[3])
    plain = multiply_guarded(x.contiguous(), packed, state, bias.contiguous(), device)
    assert torch.equal(y.cpu(), plain)


@pytest.mark.parametrize("rows", [0, 17])
def test_wrong_number_of_rows_is_refused(device: str, rows: int):
    packed, state = quantize_4bit(torch.randn(4, 64), "nf4", 64)
    with pytest.raises(ValueError, match=f"{rows} rows"):
        multiply_guarded(torch.zeros(rows, 64), packed, state, None, device)


@pytest.mark.parametrize("rows", [1, 2])
def test_empty_weight(device: str, rows: int):
    """No output: no launch. No input: a sum of nothing, plus the bias."""
    state = QuantState((0, 64), torch.float32, "nf4", 64, torch.zeros(0))
    packed = torch.zeros(0, 1, dtype=torch.uint8)
    assert multiply_guarded(torch.ones(rows, 64), packed, state, None, device).shape == (rows, 0)
    bias = torch.randn(3)
    ours = multiply_guarded(torch.ones(rows, 0), packed, replace(state, shape=(3, 0)), bias, device)
    assert torch.equal(ours, bias.expand(rows, 3))


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("shape", [(1, 64), (5, 65), (17, 192)])
def test_reads_nothing_behind_its_inputs(device: str, shape: tuple[int, int], rows: int):
    """A load without its mask touches the unreadable page and ends the process with a segmentation fault."""
    skip_unless_pages_can_be_protected(device)
    from minift_kernels.matmul import matmul_4bit

    packed, state = quantize_4bit(torch.randn(shape), "nf4", 64, double_quant=True)
    pages, x, bias = UnreadablePages(), torch.randn(rows, shape[1]), torch.randn(shape[0])
    weight = (packed, state.absmax, state.nested_absmax, state.nested_offset, *tables("nf4"))
    x_in, *weight_in, bias_in = [pages.before_page(tensor) for tensor in (x, *weight, bias)]
    ours = matmul_4bit(x_in, *weight_in, 64, shape[0], bias_in)  # pyright: ignore
    assert torch.equal(ours, multiply_guarded(x, packed, state, bias, device))
