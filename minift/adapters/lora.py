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
same seed gives the same A, and adapter files fit both ways (lora_files.py). `LowRank` is what it has in
common with an adapted embedding (embedding.py).

Sources: LoRA, arXiv 2106.09685; PEFT `tuners/lora/layer.py`.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.adapters.config import ALL_LINEAR, LoraConfig
from minift.adapters.dora import add_dora, dora_delta, row_norms
from minift.adapters.initialize import initialize
from minift.adapters.switched import Switched
from minift.quant.linear import QuantizedLinear

__all__ = ["ALL_LINEAR", "AddLowRank", "LoraConfig", "LoraLinear", "LowRank", "Magnitude"]


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


class LowRank(Switched):
    """A layer and the low-rank changes of its weight, seen as a matrix [out, in].

    Attributes:
        base: the layer it wraps, frozen.
        in_features, out_features: of the weight.
        lora_magnitude_vector: per adapter name, a `Magnitude`, if it is a DoRA.
        given: per adapter name, the settings as they were given for the whole model.
        configs: per adapter name, the settings of this layer, with its own rank and alpha.
        active: names of the adapters that are added up.
    """

    base: nn.Module
    part_names: ClassVar[tuple[str, str]]  # of A and B in files

    def __init__(self, base: nn.Module, in_features: int, out_features: int):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.lora_magnitude_vector = nn.ModuleDict()

    def add(self, adapter: str, config: LoraConfig, path: str = "") -> None:
        """Create and activate an adapter, with the initial values that the settings name.

        Args:
            path: of this layer in the model, which may have a rank and alpha of its own.

        Raises:
            ValueError: an initialization that changes the weight, of a layer that is quantized already.
        """
        raise NotImplementedError

    def finish(self, adapter: str, config: LoraConfig, own: LoraConfig) -> None:
        """Measure the rows for a DoRA, and let the new adapter take part."""
        self.accept(adapter, config, own)
        if own.use_dora:
            self.lora_magnitude_vector[adapter] = Magnitude(self.norms(adapter))

    def remove(self, adapter: str) -> None:
        """Forget an adapter."""
        super().remove(adapter)
        for modules in (*self.held(), self.lora_magnitude_vector):
            if adapter in modules:
                del modules[adapter]

    def held(self) -> tuple[nn.ModuleDict | nn.ParameterDict, ...]:
        """Where A and B are, by adapter name."""
        raise NotImplementedError

    def matrices(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, in] and B [out, r] of an adapter."""
        raise NotImplementedError

    def base_weight(self) -> Tensor:
        """The frozen weight that the adapters were trained on, decoded if it is quantized, fp32 [out, in]."""
        raise NotImplementedError

    def delta(self, adapter: str) -> Tensor:
        """The change of the weight that the adapter stands for, fp32 [out, in]."""
        a_ri, b_or = self.matrices(adapter)
        change_oi = (b_or @ a_ri) * self.configs[adapter].scaling
        if adapter not in self.lora_magnitude_vector:
            return change_oi
        return dora_delta(self.base_weight(), change_oi, self.magnitude(adapter))

    def magnitude(self, adapter: str) -> nn.Parameter:
        """The magnitudes [out] of a DoRA."""
        return self.lora_magnitude_vector.get_parameter(f"{adapter}.weight")

    @torch.no_grad()
    def norms(self, adapter: str) -> Tensor:
        """Sizes of the rows of the changed weight, fp32 [out]."""
        return row_norms(self.base_weight(), *self.matrices(adapter), self.configs[adapter].scaling)

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """What an adapter trains in this layer, by its name in PEFT's files."""
        found = dict(zip(self.part_names, self.matrices(adapter), strict=True))
        return found | ({"lora_magnitude_vector": self.magnitude(adapter)} if self.configs[adapter].use_dora else {})

    def forward(self, x: Tensor) -> Tensor:
        y = base_y = self.base(x)
        if self.route is not None:
            return self.route(self, x, base_y)
        for name in self.active:
            y = self.changed(name, x, base_y, y)
        return y

    def changed(self, name: str, x: Tensor, base_y: Tensor, y: Tensor) -> Tensor:
        """y and what an adapter adds to it, for the layer's input x and the base layer's output for that."""
        raise NotImplementedError


class LoraLinear(LowRank):
    """A linear layer and the low-rank changes added to its output.

    Attributes:
        lora_A, lora_B: per adapter name, `nn.Linear` without bias.
    """

    base: nn.Linear | QuantizedLinear
    part_names = ("lora_A.weight", "lora_B.weight")

    def __init__(self, base: nn.Linear | QuantizedLinear):
        super().__init__(base, base.in_features, base.out_features)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()

    def add(self, adapter: str, config: LoraConfig, path: str = "") -> None:
        own = config.at(path)
        self.base, a_ri, b_or = initialize(self.base, own)
        device = self.base.weight.device
        for matrices, value in zip(self.held(), (a_ri, b_or), strict=True):
            matrices[adapter] = _linear(value.to(device)).train(self.training)
        self.finish(adapter, config, own)

    def held(self) -> tuple[nn.ModuleDict, nn.ModuleDict]:
        return self.lora_A, self.lora_B

    def matrices(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, in] and B [out, r] of an adapter."""
        return self.lora_A.get_parameter(f"{adapter}.weight"), self.lora_B.get_parameter(f"{adapter}.weight")

    def base_weight(self) -> Tensor:
        base = self.base
        return (base.dequantize() if isinstance(base, QuantizedLinear) else base.weight.detach()).float()

    def changed(self, name: str, x: Tensor, base_y: Tensor, y: Tensor) -> Tensor:
        config = self.configs[name]
        drops = config.dropout > 0 and self.training
        dropped = nn.functional.dropout(x, config.dropout) if drops else x
        if not config.use_dora:
            return AddLowRank.apply(y, dropped, *self.matrices(name), config.scaling)
        seen = self.base(dropped) if drops else base_y
        return add_dora(
            y, seen, self.base.bias, dropped, *self.matrices(name), self.magnitude(name), self.base_weight(),
            config.scaling,
        )  # fmt: skip


def _linear(weight_oi: Tensor) -> nn.Linear:
    """A linear layer without bias around a weight that is to be trained."""
    linear = nn.Linear(weight_oi.shape[1], weight_oi.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_oi)
    return linear
