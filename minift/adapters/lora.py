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

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.quant.linear import QuantizedLinear

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """LoRA's settings.

    Attributes:
        r: rank.
        alpha: the change is scaled by alpha / r.
        dropout: probability of dropping each number of the adapter's input while training.
        target_modules: "all-linear" (every linear layer but the head); a list of names, each the last part or parts of
        a
            module path; or one regular expression that must match a whole path.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {self.r!r}")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"LoRA alpha must be positive, got {self.alpha!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must be at least 0 and below 1, got {self.dropout!r}")
        if isinstance(self.target_modules, str):
            _check_pattern(self.target_modules)
        elif not isinstance(self.target_modules, list | tuple | set):
            raise ValueError(f"LoRA target_modules must be a string or a list of names, got {self.target_modules!r}")
        else:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scaling(self) -> float:
        return self.alpha / self.r


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"LoRA target_modules {pattern!r} is not a regular expression: {error}") from None


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


class LoraLinear(nn.Module):
    """A linear layer and the low-rank changes added to its output.

    Attributes:
        base: the layer it wraps, frozen.
        lora_A, lora_B: per adapter name, `nn.Linear` without bias.
        configs: per adapter name, its settings.
        active: names of the adapters that are added up.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.configs: dict[str, LoraConfig] = {}
        self.active: list[str] = []

    def add(self, adapter: str, config: LoraConfig) -> None:
        """Create and activate an adapter: A uniform in +-1/sqrt(in), B zero."""
        # On the CPU in fp32 and with PEFT's three draws (A, B, A again), so that one seed gives the same A everywhere.
        a, b = nn.Linear(self.in_features, config.r, bias=False), nn.Linear(config.r, self.out_features, bias=False)
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        nn.init.zeros_(b.weight)
        device = self.base.weight.device
        self.lora_A[adapter], self.lora_B[adapter] = (x.to(device).train(self.training) for x in (a, b))
        self.configs[adapter] = config
        self.active.append(adapter)

    def delta(self, adapter: str) -> Tensor:
        """The change of the weight that the adapter stands for, fp32 [out, in]."""
        a_ri, b_or = self.matrices(adapter)
        return (b_or @ a_ri) * self.configs[adapter].scaling

    def matrices(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, in] and B [out, r] of an adapter."""
        return self.lora_A.get_parameter(f"{adapter}.weight"), self.lora_B.get_parameter(f"{adapter}.weight")

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for name in self.active:
            config = self.configs[name]
            dropped = nn.functional.dropout(x, config.dropout, self.training) if config.dropout else x
            y = AddLowRank.apply(y, dropped, *self.matrices(name), config.scaling)
        return y
