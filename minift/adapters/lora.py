"""LoRA: learn a low-rank change of a frozen linear layer.

    y = W x + (alpha / r) * B (A x)          A: [r, in], B: [out, r], r much smaller than in and out

Only A and B are trained: r * (in + out) numbers instead of in * out. B starts at zero, so training starts from the
unchanged model. The change is computed through the rank-r bottleneck, never as the full matrix B A.

The backward pass, written out for n rows of input, s = alpha / r and t = x A^T:

    dt = s * dy B      [n, r]        dB = s * dy^T t
    dx = dt A                        dA = dt^T x

It needs x, which is kept once however many layers read it, and t, which is only r numbers a token.

Precision: A and B are fp32; the two thin products run in the dtype of x (as PEFT's do under autocast), and their result
is added to the base layer's output before that is rounded.

`LoraLinear` holds any linear layer, quantized or not. Parameter names and the order of random draws are PEFT's: the
same seed gives the same A, and adapter files fit both ways (files.py).

Sources: LoRA, arXiv 2106.09685; PEFT `tuners/lora/layer.py`.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.adapters.config import ALL_LINEAR, LoraConfig
from minift.adapters.dora import add_dora, dora_delta, row_norms
from minift.adapters.initialize import initialize
from minift.quant.linear import QuantizedLinear

__all__ = ["ALL_LINEAR", "AddLowRank", "LoraConfig", "LoraLinear", "Magnitude"]


class AddLowRank(torch.autograd.Function):
    """y + scaling * (x A^T) B^T, with the backward pass of the module docstring."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, a_ri: Tensor, b_or: Tensor, scaling: float) -> Tensor:
        x_ni, y_no = x.flatten(0, -2), y.flatten(0, -2)
        t_nr = x_ni @ a_ri.to(x.dtype).T
        ctx.save_for_backward(x, t_nr, a_ri, b_or)
        ctx.scaling = scaling
        return torch.addmm(y_no, t_nr, b_or.to(x.dtype).T, alpha=scaling).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, t_nr, a_ri, b_or = ctx.saved_tensors
        dy_no, x_ni = grad_y.flatten(0, -2), x.flatten(0, -2)
        dt_nr = (dy_no @ b_or.to(x.dtype)).mul_(ctx.scaling)
        grad_a = (dt_nr.T @ x_ni).to(a_ri.dtype)
        grad_b = (dy_no.T @ t_nr).to(b_or.dtype).mul_(ctx.scaling)
        grad_x = (dt_nr @ a_ri.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        return grad_y, grad_x, grad_a, grad_b, None


class Magnitude(nn.Module):
    """The sizes of the rows of a weight, fp32 [out], which DoRA trains (dora.py)."""

    def __init__(self, weight_o: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight_o)


class LoraLinear(nn.Module):
    """A linear layer and the low-rank changes added to its output.

    Attributes:
        base: the layer it wraps, frozen.
        lora_A, lora_B: per adapter name, `nn.Linear` without bias.
        lora_magnitude_vector: per adapter name, a `Magnitude`, if it is a DoRA.
        given: per adapter name, the settings as they were given for the whole model.
        configs: per adapter name, the settings of this layer, with its own rank and alpha.
        active: names of the adapters that are added up.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B, self.lora_magnitude_vector = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.given: dict[str, LoraConfig] = {}
        self.configs: dict[str, LoraConfig] = {}
        self.active: list[str] = []

    def add(self, adapter: str, config: LoraConfig, path: str = "") -> None:
        """Create and activate an adapter, with the initial values that the settings name.

        Args:
            path: of this layer in the model, which may have a rank and alpha of its own.

        Raises:
            ValueError: an initialization that changes the weight, of a layer that is quantized already.
        """
        own = config.at(path)
        self.base, a_ri, b_or = initialize(self.base, own)
        device = self.base.weight.device
        for matrices, value in ((self.lora_A, a_ri), (self.lora_B, b_or)):
            matrices[adapter] = _linear(value.to(device)).train(self.training)
        self.given[adapter], self.configs[adapter] = config, own
        if own.use_dora:
            with torch.no_grad():
                norms_o = row_norms(self.base_weight(), *self.matrices(adapter), own.scaling)
            self.lora_magnitude_vector[adapter] = Magnitude(norms_o)
        self.active.append(adapter)

    def remove(self, adapter: str) -> None:
        """Forget an adapter."""
        for modules in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            if adapter in modules:
                del modules[adapter]
        del self.given[adapter], self.configs[adapter]
        self.active = [name for name in self.active if name != adapter]

    def base_weight(self) -> Tensor:
        """The frozen weight that the adapters were trained on, decoded if it is quantized, fp32 [out, in]."""
        base = self.base
        return (base.dequantize(base.dtype) if isinstance(base, QuantizedLinear) else base.weight.detach()).float()

    def delta(self, adapter: str) -> Tensor:
        """The change of the weight that the adapter stands for, fp32 [out, in]."""
        a_ri, b_or = self.matrices(adapter)
        change_oi = (b_or @ a_ri) * self.configs[adapter].scaling
        if adapter not in self.lora_magnitude_vector:
            return change_oi
        return dora_delta(self.base_weight(), change_oi, self.magnitude(adapter))

    def matrices(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, in] and B [out, r] of an adapter."""
        return self.lora_A.get_parameter(f"{adapter}.weight"), self.lora_B.get_parameter(f"{adapter}.weight")

    def magnitude(self, adapter: str) -> nn.Parameter:
        """The magnitudes [out] of a DoRA."""
        return self.lora_magnitude_vector.get_parameter(f"{adapter}.weight")

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """What an adapter trains in this layer, by its name in PEFT's files."""
        a_ri, b_or = self.matrices(adapter)
        found = {"lora_A.weight": a_ri, "lora_B.weight": b_or}
        return found | ({"lora_magnitude_vector": self.magnitude(adapter)} if self.configs[adapter].use_dora else {})

    def forward(self, x: Tensor) -> Tensor:
        y = base_y = self.base(x)
        for name in self.active:
            config = self.configs[name]
            drops = config.dropout > 0 and self.training
            dropped = nn.functional.dropout(x, config.dropout) if drops else x
            if config.use_dora:
                seen = self.base(dropped) if drops else base_y
                y = add_dora(
                    y, seen, self.base.bias, dropped, *self.matrices(name), self.magnitude(name), self.base_weight(),
                    config.scaling,
                )  # fmt: skip
            else:
                y = AddLowRank.apply(y, dropped, *self.matrices(name), config.scaling)
        return y


def _linear(weight_oi: Tensor) -> nn.Linear:
    """A linear layer without bias around a weight that is to be trained."""
    linear = nn.Linear(weight_oi.shape[1], weight_oi.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_oi)
    return linear
