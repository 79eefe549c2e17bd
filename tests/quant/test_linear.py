"""Linear4bit against F.linear with the dequantized weight, bit for bit, and against bitsandbytes' Linear4bit.

The comparison with bitsandbytes uses its training mode (in evaluation mode a CPU repacks the weight in place and rounds
the scales), fp32 compute and no double quantization (its nested codes differ on a CPU), and rows of whole blocks (its
AVX-512 dequantizer mistakes the scales of others).
"""

import copy
import io
import weakref

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.quant import Linear4bit, QuantConfig, dequantize_4bit, dequantize_model, quantize_4bit, quantize_model
from minift.quant.linear import swap_linears

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
    """Neither x nor the decoded weight: no saved tensor is as large as either, and the decoded ones are freed."""
    layer = Linear4bit.from_linear(nn.Linear(IN, OUT))
    decoded: list[weakref.ref[Tensor]] = []
    dequantize = layer.dequantize

    def watched() -> Tensor:
        weight_oi = dequantize()
        decoded.append(weakref.ref(weight_oi))
        return weight_oi

    layer.dequantize = watched
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(8, IN, dtype=given, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
        assert len(decoded) == 1 and decoded[0]() is None
        y.sum().backward()
    assert len(decoded) == 2, "decoded once on the way forward, once on the way back"
    assert all(tensor.numel() < min(x.numel(), OUT * IN) for tensor in saved), [tensor.shape for tensor in saved]
    assert x.grad is not None


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


def test_quantized_inside_inference_mode():
    """Building a model under inference_mode is a habit; its layers must still pass gradients on."""
    linear = nn.Linear(IN, OUT)
    with torch.inference_mode():
        layer = Linear4bit.from_linear(linear)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_second_derivative_is_refused():
    """Rather an error than a wrong number: the backward pass is not differentiable."""
    x = torch.randn(3, IN, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        Linear4bit.from_linear(nn.Linear(IN, OUT))(x).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(OUT, IN + 1), (IN, OUT), (OUT * IN,)])
def test_weight_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="shape"):
        Linear4bit(IN, OUT).quantize_weight(torch.randn(shape))


def test_format_is_checked_early():
    with pytest.raises(ValueError, match="4-bit type"):
        QuantConfig("int4")
    with pytest.raises(ValueError, match="blocksize"):
        QuantConfig(blocksize=48)
    assert QuantConfig.named("fp4") == QuantConfig("fp4")
    assert QuantConfig.named(None) is None
    with pytest.raises(ValueError, match="4-bit type"):
        QuantConfig.named("int3")


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


# --- whole models -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=False)
        self.down_proj = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down_proj(self.q_proj(x).relu()) + x)


class Model(nn.Module):
    """An embedding, two blocks and a head; the head's name and whether it is tied are the caller's choice."""

    def __init__(self, head: str = "lm_head", tied: bool = False):
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = head
        self.add_module(head, nn.Linear(16, 40, bias=False))
        if tied:
            self.get_submodule(head).weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.get_submodule(self.head)(x)


PROJECTIONS = ["layers.0.q_proj", "layers.0.down_proj", "layers.1.q_proj", "layers.1.down_proj"]


@pytest.mark.parametrize(
    ("head", "tied", "skip", "replaced"),
    [
        ("lm_head", False, ("lm_head",), PROJECTIONS),
        ("lm_head", True, ("lm_head",), PROJECTIONS),
        ("lm_head", False, (), [*PROJECTIONS, "lm_head"]),
        ("lm_head", True, (), PROJECTIONS),
        ("output", True, ("lm_head",), PROJECTIONS),
        ("output", False, ("lm_head",), [*PROJECTIONS, "output"]),
        ("lm_head", False, ("lm_head", "q_proj"), [name for name in PROJECTIONS if "q_proj" not in name]),
        ("lm_head", False, ("lm_head", "layers.1.q_proj"), [name for name in PROJECTIONS if name != "layers.1.q_proj"]),
        ("lm_head", False, ("lm_head", "proj", "layers.0"), PROJECTIONS),  # parts of a name are no name
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_which_layers_are_swapped(head: str, tied: bool, skip: tuple[str, ...], replaced: list[str], device: str):
    with torch.device(device):
        model = Model(head, tied)
    before = dict(model.named_modules())
    names = swap_linears(model, QuantConfig(skip=skip))
    assert sorted(names) == sorted(replaced)
    after = dict(model.named_modules())
    assert {name for name, module in after.items() if isinstance(module, Linear4bit)} == set(replaced)
    assert all(after[name] is module for name, module in before.items() if name not in replaced)
    for name in replaced:
        layer, linear = after[name], before[name]
        assert isinstance(layer, Linear4bit) and isinstance(linear, nn.Linear)
        assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)
        assert (layer.bias is None) == (linear.bias is None)
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {device}


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.ModuleDict({"lm_head": nn.Linear(4, 4)})])
def test_nothing_to_swap_is_refused(model: nn.Module):
    with pytest.raises(ValueError, match="nothing to quantize"):
        swap_linears(model, QuantConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["nf4", "fp4", QuantConfig(blocksize=32, double_quant=False)])
def test_quantize_model(quantize: str | QuantConfig, dtype: torch.dtype):
    """Every layer holds what quantize_4bit makes of its weight; everything else is the same object."""
    model = Model().to(dtype)
    original = copy.deepcopy(model)
    untouched = {
        name: p for name, p in model.named_parameters() if "proj.weight" not in name and "proj.bias" not in name
    }
    assert sorted(quantize_model(model, quantize)) == sorted(PROJECTIONS)
    config = QuantConfig.named(quantize)
    assert config is not None
    for name in PROJECTIONS:
        layer, linear = model.get_submodule(name), original.get_submodule(name)
        assert isinstance(layer, Linear4bit) and isinstance(linear, nn.Linear)
        packed, state = quantize_4bit(linear.weight, config.quant_type, config.blocksize, config.double_quant)
        assert torch.equal(layer.weight, packed)
        assert torch.equal(layer.dequantize(), dequantize_4bit(packed, state))
        assert layer.compute_dtype == layer.stored_dtype == dtype
        assert (layer.bias is None) == (linear.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, linear.bias)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in untouched.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_model_gives_the_same_bits(quant_type: str, dtype: torch.dtype, tied: bool):
    model = Model(tied=tied).to(dtype)
    quantize_model(model, quant_type)
    ids = torch.randint(0, 40, (2, 9))
    wanted = model(ids)
    assert sorted(dequantize_model(model)) == sorted(PROJECTIONS)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    assert torch.equal(model(ids), wanted)
    linear = model.get_submodule(PROJECTIONS[1])
    assert isinstance(linear, nn.Linear) and linear.weight.dtype == dtype
    assert not linear.weight.requires_grad and (linear.out_features, linear.in_features) == (16, 16)
    assert dequantize_model(model) == []


def test_quantized_model_trains_what_is_left():
    """Gradients reach the embedding through both blocks, and equal those of the dequantized model."""
    model = Model()
    quantize_model(model)
    ids = torch.randint(0, 40, (2, 9))
    model(ids).square().sum().backward()
    ours = model.embed_tokens.weight.grad
    model.zero_grad()
    dequantize_model(model)
    model(ids).square().sum().backward()
    theirs = model.embed_tokens.weight.grad
    assert ours is not None and theirs is not None and ours.abs().sum() > 0
    assert torch.equal(ours, theirs)
