"""Linear4bit against F.linear with the dequantized weight, bit for bit, and against bitsandbytes' layers.

The comparison with bitsandbytes uses its training mode (in evaluation mode a CPU repacks the weight in place and rounds
the scales), fp32 compute and no double quantization (its nested codes differ on a CPU), and rows of whole blocks (its
AVX-512 dequantizer mistakes the scales of others).
"""

import copy
import io
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.quant import Linear4bit, Linear8bit, QuantConfig, QuantizedLinear, dequantize_4bit
from minift.quant.int8 import dequantize_rows, int8_linear, quantize_weight_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIGS = {
    "nf4 double": QuantConfig(),
    "nf4": QuantConfig(double_quant=False),
    "fp4 double": QuantConfig("fp4"),
    "nf4 blocks of 32": QuantConfig(blocksize=32, double_quant=False),
}
IN, OUT = 70, 33  # odd rows: blocks run across them, and the last one is short
INPUTS = [(IN,), (1, IN), (5, IN), (2, 3, IN), (0, IN), (2, 0, IN)]


def forward_and_gradients(function, x: Tensor, grad_y: Tensor, bias: Tensor | None) -> list[Tensor]:
    """y, dy/dx and, if it is trained, dy/dbias for a function of x."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    wanted = [x] if bias is None or not bias.requires_grad else [x, bias]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad_y)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_linear_with_the_decoded_weight(config: str, dtype: torch.dtype, bias: bool):
    """The same matmul on the same values, so the same bits, forward and backward."""
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT, bias).to(dtype), CONFIGS[config])
    weight_oi = dequantize_4bit(layer.weight, layer.quant_state)
    assert weight_oi.dtype == dtype and weight_oi.shape == (OUT, IN)
    for shape in INPUTS:
        x, grad_y = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], OUT).to(dtype)
        ours = forward_and_gradients(layer, x, grad_y, layer.bias)
        theirs = forward_and_gradients(lambda x: F.linear(x, weight_oi, layer.bias), x, grad_y, layer.bias)
        assert len(ours) == len(theirs) == 2
        for our, their in zip(ours, theirs, strict=True):
            assert our.dtype == dtype and torch.equal(our, their), shape


@pytest.mark.parametrize("shape", INPUTS[:4])
def test_bias_can_be_trained(shape: tuple[int, ...]):
    """Nothing freezes a bias for good; its gradient is the sum over all rows, one row without a batch included.

    The sum may run in another order: rounding is at most (rows - 1) x 2^-24 of the sum of magnitudes, here 5 rows.
    """
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT))
    assert layer.bias is not None
    layer.bias.requires_grad_()
    weight_oi = layer.dequantize()
    x, grad_y = torch.randn(shape), torch.randn(*shape[:-1], OUT)
    ours = forward_and_gradients(layer, x, grad_y, layer.bias)
    theirs = forward_and_gradients(lambda x: F.linear(x, weight_oi, layer.bias), x, grad_y, layer.bias)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    bound = 5 * 2**-24 * grad_y.abs().reshape(-1, OUT).sum(0)
    assert ((ours[2] - theirs[2]).abs() <= bound).all()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_compute_dtype(stored: torch.dtype, compute: torch.dtype, given: torch.dtype):
    """x is cast to the compute dtype, the weight decoded straight to it (not via the stored one), y cast back."""
    layer = Linear4bit(IN, OUT, bias=True, dtype=compute)
    layer.quantize_weight(torch.randn(OUT, IN).to(stored))
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.copy_(torch.randn(OUT))
    assert layer.stored_dtype == stored
    weight_oi = dequantize_4bit(layer.weight, layer.quant_state, torch.float32).to(compute)
    assert torch.equal(layer.dequantize(), weight_oi)
    x, grad_y = torch.randn(5, IN).to(given), torch.randn(5, OUT).to(given)
    ours = forward_and_gradients(layer, x, grad_y, None)
    theirs = forward_and_gradients(lambda x: F.linear(x.to(compute), weight_oi, layer.bias).to(given), x, grad_y, None)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == given and torch.equal(our, their)


def test_compute_dtype_can_be_changed():
    """compute_dtype is an attribute: the bias must follow it, as bitsandbytes' does."""
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT))
    layer.compute_dtype = torch.bfloat16
    assert layer.bias is not None
    x = torch.randn(5, IN)
    theirs = F.linear(x.bfloat16(), layer.dequantize(), layer.bias.bfloat16()).float()
    assert torch.equal(layer(x), theirs)


@pytest.mark.parametrize("view", ["transposed", "expanded", "every second row"])
def test_views(view: str):
    """x and dy need not be contiguous (`loss.sum()` sends back an expanded one).

    For a transposed x, torch's own backward pass multiplies the transposed matrices, so it may sum in another order:
    two sums of 33 products differ by at most 2 x 33 x 2^-24 of the sum of their magnitudes.
    """
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT))
    x = {"transposed": torch.randn(IN, 6).T, "expanded": torch.randn(1, IN).expand(6, IN)}.get(
        view, torch.randn(12, IN)[::2]
    )
    weight_oi, bias = layer.dequantize(), layer.bias
    grad_y = torch.randn(()).expand(6, OUT)
    ours = forward_and_gradients(layer, x, grad_y, None)
    theirs = forward_and_gradients(lambda x: F.linear(x, weight_oi, bias), x, grad_y, None)
    assert torch.equal(ours[0], theirs[0])
    assert ((ours[1] - theirs[1]).abs() <= 2 * OUT * 2**-24 * (grad_y.abs() @ weight_oi.abs())).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_bitsandbytes_layer(quant_type: str, bias: bool):
    linear = nn.Linear(128, 96, bias)
    theirs = bitsandbytes.nn.Linear4bit(128, 96, bias, torch.float32, compress_statistics=False, quant_type=quant_type)
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu").train()
    assert theirs.weight.dtype == torch.uint8
    ours = Linear4bit.from_linear(linear, QuantConfig(quant_type, double_quant=False))
    assert torch.equal(ours.weight, theirs.weight.data)
    x, grad_y = torch.randn(4, 7, 128), torch.randn(4, 7, 96)
    for our, their in zip(
        forward_and_gradients(ours, x, grad_y, None), forward_and_gradients(theirs, x, grad_y, None), strict=True
    ):
        assert torch.equal(our, their)


# --- what is trained, what is kept ------------------------------------------------------------------------------------


def test_weight_has_no_gradient():
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not layer(torch.randn(2, IN)).requires_grad, "nothing to train: no graph"
    layer(torch.randn(2, IN, requires_grad=True)).sum().backward()
    assert all(tensor.grad is None for tensor in [*layer.buffers(), *layer.parameters()])


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_for_the_backward_pass(given: torch.dtype):
    """Neither x nor the decoded weight: what is saved are the layer's own buffers."""
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(8, IN, dtype=given, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum().backward()
    held = {buffer.data_ptr() for buffer in layer.buffers()}
    assert saved and {tensor.data_ptr() for tensor in saved} <= held
    assert x.grad is not None


def test_the_decoded_weight_lives_in_memory_that_is_used_again():
    """Layers of one size decode to the same place one after the other; results and gradients do not mix."""
    layers = [Linear4bit.from_linear(nn.Linear(64, 64)) for _ in range(3)]
    x = torch.randn(5, 64, requires_grad=True)
    wanted_y = [F.linear(x, layer.dequantize(), layer.bias) for layer in layers]
    wanted = [torch.autograd.grad(y.square().sum(), x)[0] for y in wanted_y]
    ours_y = [layer(x) for layer in layers]
    assert all(torch.equal(a, b) for a, b in zip(ours_y, wanted_y, strict=True))
    for index in (1, 0, 2):  # in another order than forward
        (grad,) = torch.autograd.grad(ours_y[index].square().sum(), x)
        assert torch.equal(grad, wanted[index])


def test_hooks_do_see_an_ordinary_layer():
    """Guards the test above: nn.Linear does keep its weight."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nn.Linear(IN, OUT)(torch.randn(8, IN, requires_grad=True)).sum().backward()
    assert any(tensor.numel() >= OUT * IN for tensor in saved)


def test_inference_mode_then_training():
    """A layer that answered in inference mode can be trained through afterwards, and the other way round."""
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT))
    x = torch.randn(3, IN)
    with torch.inference_mode():
        before = layer(x)
    trained = layer(x.clone().requires_grad_())
    trained.sum().backward()
    with torch.inference_mode():
        after = layer(x)
    assert torch.equal(before, trained.detach()) and torch.equal(before, after)


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bit])
def test_quantized_inside_inference_mode(kind: type[Linear4bit] | type[Linear8bit]):
    """Building a model under inference_mode is a habit; its layers must still pass gradients on."""
    linear = nn.Linear(IN, OUT)
    with torch.inference_mode():
        layer = kind.from_linear(linear)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("shape", [(OUT, IN + 1), (IN, OUT), (OUT * IN,)])
def test_weight_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="shape"):
        Linear4bit(IN, OUT).quantize_weight(torch.randn(shape))


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_state_moves_and_travels(config: str):
    """All state moves with .to() (shown with the meta device), and survives state_dict, deepcopy and pickle."""
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT), CONFIGS[config])
    x = torch.randn(4, IN)
    wanted = layer(x)
    names = {"weight", "absmax", "bias"} | (
        {"nested_absmax", "nested_offset"} if CONFIGS[config].double_quant else set()
    )
    assert set(layer.state_dict()) == names
    assert {tensor.device.type for tensor in copy.deepcopy(layer).to("meta").state_dict().values()} == {"meta"}
    assert torch.equal(copy.deepcopy(layer).to("cpu")(x), wanted)

    empty = Linear4bit(IN, OUT, bias=True, config=CONFIGS[config], device="meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), wanted)

    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("config", CONFIGS)
def test_state_moves_to_the_gpu(config: str):
    """The weight decoded there (by the Triton kernel) has the same bits."""
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT), CONFIGS[config])
    wanted = layer.dequantize()
    layer.to("cuda")
    assert all(tensor.is_cuda for tensor in layer.state_dict().values())
    assert torch.equal(layer.dequantize().cpu(), wanted)
    x = torch.randn(4, IN, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.is_cuda


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_casting_a_model_keeps_the_scales(config: str, cast: torch.dtype):
    """`model.to(torch.bfloat16)` is meant for embeddings and norms; rounded scales would be another weight."""
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT), CONFIGS[config])
    before = dequantize_4bit(layer.weight, layer.quant_state, torch.float32)
    model = nn.Sequential(layer).to(cast)
    assert torch.equal(dequantize_4bit(layer.weight, layer.quant_state, torch.float32), before)
    assert model(torch.randn(3, IN, dtype=cast)).dtype == cast


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_keeps_packed_bytes_that_look_like_floats(storage: torch.dtype, cast: torch.dtype):
    """quant_storage: bytes seen as bf16 would be rounded, or become NaN, by `.to()`."""
    layer = Linear4bit.from_linear(nn.Linear(64, 32, bias=False), QuantConfig(quant_storage=storage))
    assert layer.weight.dtype == storage and layer.weight.shape == (64 * 32 // 2 // storage.itemsize, 1)
    plain = Linear4bit(64, 32)
    plain.set_packed(layer.weight.view(torch.uint8), layer.quant_state)
    before = layer.weight.view(torch.uint8).clone()
    nn.Sequential(layer).to(cast)
    assert torch.equal(layer.weight.view(torch.uint8), before)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), plain.to(cast)(x))


def test_compute_dtype_of_the_format():
    """QuantConfig.compute_dtype: the weight keeps its own dtype, the arithmetic has another."""
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT).bfloat16(), QuantConfig(compute_dtype=torch.float32))
    assert (layer.stored_dtype, layer.compute_dtype) == (torch.bfloat16, torch.float32)
    assert layer.dequantize().dtype == torch.float32
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    x = torch.randn(5, IN).bfloat16()
    wanted = F.linear(x.float(), layer.dequantize(), layer.bias.float()).bfloat16()
    assert torch.equal(layer(x), wanted)


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
def test_int8_layer_computes_llm_int8(threshold: float, bias: bool, dtype: torch.dtype):
    """The layer adds nothing to the functions: same codes, same products, same gradient."""
    linear = nn.Linear(IN, OUT, bias).to(dtype)
    layer = Linear8bit.from_linear(linear, QuantConfig("int8", threshold=threshold))
    codes, absmax = quantize_weight_int8(linear.weight)
    assert torch.equal(layer.weight, codes) and torch.equal(layer.absmax, absmax)
    assert torch.equal(layer.dequantize(), dequantize_rows(codes, absmax, dtype))
    for shape in INPUTS[:4]:
        x, grad_y = torch.randn(shape).to(dtype) * 3, torch.randn(*shape[:-1], OUT).to(dtype)
        ours = forward_and_gradients(layer, x, grad_y, None)
        theirs = forward_and_gradients(lambda x: int8_linear(x, codes, absmax, layer.bias, threshold), x, grad_y, None)
        assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))
        assert ours[0].dtype == dtype and ours[1].dtype == dtype


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_layer_is_close_to_bitsandbytes(dtype: torch.dtype, threshold: float):
    """In evaluation mode; its constant for 1/127^2 is 1.8e-5 too large (test_int8.py), and the result is rounded once
    more, to dtype: half a unit in the last place on each side."""
    linear = nn.Linear(128, 96).to(dtype)
    theirs: Any = bitsandbytes.nn.Linear8bitLt(128, 96, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu").eval()
    ours = Linear8bit.from_linear(linear, QuantConfig("int8", threshold=threshold))
    assert torch.equal(ours.weight, theirs.weight.CB) and torch.equal(ours.absmax, theirs.weight.SCB)
    x = torch.randn(40, 128)
    x[:, 17] *= 30
    x = x.to(dtype)
    with torch.no_grad():
        ours_y, theirs_y = ours(x), theirs(x)
    ulp = torch.finfo(dtype).eps
    bound = (2e-5 + 2 * ulp) * (x.abs().float() @ linear.weight.abs().float().T + 1)
    assert ((ours_y.float() - theirs_y.float()).abs() <= bound).all()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_casting_keeps_int8_scales(cast: torch.dtype):
    layer = Linear8bit.from_linear(nn.Linear(IN, OUT))
    before = layer.absmax.clone()
    model = nn.Sequential(layer).to(cast)
    assert torch.equal(layer.absmax, before) and layer.weight.dtype == torch.int8
    assert layer.bias is not None and layer.bias.dtype == cast
    assert model(torch.randn(3, IN, dtype=cast)).dtype == cast


def test_layers_refuse_the_other_kinds_format():
    with pytest.raises(ValueError, match="Linear8bit"):
        Linear4bit(IN, OUT, config=QuantConfig("int8"))
    with pytest.raises(ValueError, match="Linear4bit"):
        Linear8bit(IN, OUT, config=QuantConfig("nf4"))
    for kind in (Linear4bit, Linear8bit):
        with pytest.raises(ValueError, match="shape"):
            kind(IN, OUT).quantize_weight(torch.randn(IN, OUT))
        assert isinstance(kind(IN, OUT), QuantizedLinear)
