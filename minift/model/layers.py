"""The parts of a decoder block: norms, MLP, self-attention, and the block itself.

One block for all families (families.py says which choices each makes):

    x = x + after(attention(before(x)))        `before` and `after` are norms, either may be missing: Llama has only
    x = x + after(mlp(before(x)))              `before`, Gemma 2 both; opt-350m normalizes the sum: x = norm(x + ...)

Attribute names are the parameter names of Hugging Face checkpoints (`self_attn.q_proj.weight`, ...), so loading needs
no key map, and an adapter written here finds its place there. Where families disagree about a name, `Part` keeps the
module under the family's name and lets the code below speak of its role.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.model.cache import LayerCache
from minift.model.config import ModelConfig
from minift.model.rope import Rotation, apply_rope

# Attention with everything but q, k and v decided: which kernel, who may see whom (see decoder.py).
QKV = Callable[[Tensor, Tensor, Tensor], Tensor]


class Part(nn.Module):
    """A module whose children have the names that they have in the family's checkpoints.

    `self.o_proj = ...` in an OPT model stores the child as `out_proj`; reading `self.o_proj` finds it again. So
    parameters, targets and files have the names that everybody knows, and the code has one name for each role.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.__dict__["role_name"] = config.family.name  # role -> name

    def __setattr__(self, role: str, value: Any) -> None:
        path = self.role_name(role).split(".") if isinstance(value, nn.Module) else [role]
        home = self
        for container in path[:-1]:  # "model.decoder": a module within a module
            if container not in home._modules:
                nn.Module.__setattr__(home, container, nn.Module())
            home = home.get_submodule(container)
        nn.Module.__setattr__(home, path[-1], value)

    def __getattr__(self, role: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if role in modules:  # the name itself; before all else, since every token of generated text passes here
            return modules[role]
        if "role_name" not in self.__dict__:  # the module is being copied
            return super().__getattr__(role)
        *containers, name = self.role_name(role).split(".")
        home = self.get_submodule(".".join(containers)) if containers else self
        return nn.Module.__getattr__(home, name)


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dimension (arXiv 1910.07467).

    The quotient is computed in fp32, rounded to the dtype of x and only then multiplied by the weight, the order that
    transformers uses for Llama.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_bsd: Tensor) -> Tensor:
        return self.weight * normalize_rms(x_bsd, self.eps, x_bsd.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNormPlusOne(RMSNorm):
    """y = (1 + weight) * x / sqrt(mean(x^2) + eps): Gemma's, whose weights begin at 0.

    All of it in fp32 and rounded once at the end, the order that transformers uses for Gemma.
    """

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x_bsd: Tensor) -> Tensor:
        normal = normalize_rms(x_bsd, self.eps, torch.float32)
        return (normal * (1.0 + self.weight.float())).to(x_bsd.dtype)


def norm(config: ModelConfig, width: int) -> nn.Module:
    """A normalization layer of the family's kind."""
    if config.family.norm == "layer":
        return nn.LayerNorm(width, eps=config.norm_eps, elementwise_affine=config.norm_affine)
    return (RMSNormPlusOne if config.family.norm == "rms + 1" else RMSNorm)(width, config.norm_eps)


def normalize_rms(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """n = x * r, r = 1 / sqrt(mean(x^2) + eps), computed in fp32 and rounded to `dtype`."""
    if torch.is_grad_enabled():
        return NormalizeRMS.apply(x, eps, dtype)
    return _normalize_rms(x, eps, dtype)[0]  # without the bookkeeping, which costs as much for one token


def _normalize_rms(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x_fp32 = x.float()
    r = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return (x_fp32 * r).to(dtype), r


class NormalizeRMS(torch.autograd.Function):
    """`normalize_rms`, keeping only x and one r a row for the backward pass.

    With dn the incoming gradient:  dx = r * (dn - n * mean(dn * n)).
    Left to autograd, the fp32 copies of x and of its square would stay in memory until then: 4 times as much.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        n, r = _normalize_rms(x, eps, dtype)
        ctx.save_for_backward(x, r)
        return n

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, r = ctx.saved_tensors
        dn, n = grads[0].float(), x.float() * r
        return (r * (dn - n * (dn * n).mean(-1, keepdim=True))).to(x.dtype), None, None


# Activations by their names in config.json: the function, and its derivative times the incoming gradient.
def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_backward(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "relu": (F.relu, lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0)),
}


def gate_and_multiply(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    if torch.is_grad_enabled():
        return GateAndMultiply.apply(gate, up, activation)
    return ACTIVATIONS[activation][0](gate) * up


class GateAndMultiply(torch.autograd.Function):
    """act(gate) * up, keeping only the two inputs: autograd would keep act(gate) as well.

    d up = dy * act(gate);    d gate = dy * up * act'(gate)
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ACTIVATIONS[activation][0](gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        (dy,) = grads
        activate, derive = ACTIVATIONS[ctx.activation]
        return derive(dy * up, gate), dy * activate(gate), None


def add_mlp_linears(home: Part, config: ModelConfig) -> None:
    """Give a module the linears of an MLP."""
    width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    if config.family.gated and config.family.fused:
        home.gate_up_proj = nn.Linear(width, 2 * inner, bias=bias)
    elif config.family.gated:
        home.gate_proj = nn.Linear(width, inner, bias=bias)
        home.up_proj = nn.Linear(width, inner, bias=bias)
    else:
        home.up_proj = nn.Linear(width, inner, bias=bias)
    home.down_proj = nn.Linear(inner, width, bias=bias)


def mlp_forward(home: Part, config: ModelConfig, x_bsd: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x)) (GLU variants, arXiv 2002.05202), or down(act(up(x))) without a gate."""
    if not config.family.gated:
        return home.down_proj(ACTIVATIONS[config.activation][0](home.up_proj(x_bsd)))
    if config.family.fused:
        gate_bsf, up_bsf = home.gate_up_proj(x_bsd).chunk(2, dim=-1)
    else:
        gate_bsf, up_bsf = home.gate_proj(x_bsd), home.up_proj(x_bsd)
    return home.down_proj(gate_and_multiply(gate_bsf, up_bsf, config.activation))


class MLP(Part):
    """The linears of an MLP in a module of their own, where checkpoints have them so (all but OPT's)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.config = config
        add_mlp_linears(self, config)

    def forward(self, x_bsd: Tensor) -> Tensor:
        return mlp_forward(self, self.config, x_bsd)


class SelfAttention(Part):
    """Project to queries, keys and values, turn by position, attend, project back.

    With q and k norms (Qwen3, Gemma 3) each head's queries and keys are normalized first, so that no score can explode;
    a layer that is not `rotary` (SmolLM3's NoPE, learned positions) does not turn them.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config)
        width, head = config.hidden_size, config.head_dim
        self.head_dim, self.rotary = head, config.rotary[layer]
        self.fused, self.qk_norm = config.family.fused, config.family.qk_norm
        rows = [n * head for n in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
        self.rows = rows
        if self.fused:
            self.qkv_proj = nn.Linear(width, sum(rows), bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(width, rows[0], bias=config.qkv_bias)
            self.k_proj = nn.Linear(width, rows[1], bias=config.qkv_bias)
            self.v_proj = nn.Linear(width, rows[2], bias=config.qkv_bias)
        self.o_proj = nn.Linear(rows[0], width, bias=config.o_bias)
        if config.family.qk_norm:
            self.q_norm = norm(config, head)
            self.k_norm = norm(config, head)

    def forward(self, x_bsd: Tensor, rotation: Rotation | None, attend: QKV, cache: LayerCache | None) -> Tensor:
        if self.fused:
            projected = self.qkv_proj(x_bsd).split(self.rows, dim=-1)
        else:
            projected = (self.q_proj(x_bsd), self.k_proj(x_bsd), self.v_proj(x_bsd))
        q_bhse, k_bgse, v_bgse = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        if self.qk_norm:
            q_bhse, k_bgse = self.q_norm(q_bhse), self.k_norm(k_bgse)
        if self.rotary and rotation is not None:
            q_bhse, k_bgse = apply_rope(q_bhse, *rotation), apply_rope(k_bgse, *rotation)
        k_bgte, v_bgte = cache.append(k_bgse, v_bgse) if cache is not None else (k_bgse, v_bgse)
        out_bhse = attend(q_bhse, k_bgte, v_bgte)
        return self.o_proj(out_bhse.transpose(1, 2).flatten(2))


class Block(Part):
    """Attention, then the MLP, each added to what came in, with the family's norms around them."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config)
        width = config.hidden_size
        self.config = config
        self.attention = SelfAttention(config, layer)
        self.attention_norm = norm(config, width)
        self.mlp_norm = norm(config, width)
        if config.family.norms_after:
            self.attention_out_norm = norm(config, width)
            self.mlp_out_norm = norm(config, width)
        if config.family.name("mlp"):
            self.mlp = MLP(config)
        else:
            add_mlp_linears(self, config)

    def forward(self, x_bsd: Tensor, rotation: Rotation | None, attend: QKV, cache: LayerCache | None = None) -> Tensor:
        config = self.config
        attended = partial(self.attention, rotation=rotation, attend=attend, cache=cache)
        mlp = self.mlp if config.family.name("mlp") else partial(mlp_forward, self, config)
        if config.norm_sum:
            x_bsd = self.attention_norm(x_bsd + attended(x_bsd))
            return self.mlp_norm(x_bsd + mlp(x_bsd))
        if config.family.norms_after:
            x_bsd = x_bsd + self.attention_out_norm(attended(self.attention_norm(x_bsd)))
            return x_bsd + self.mlp_out_norm(mlp(self.mlp_norm(x_bsd)))
        x_bsd = x_bsd + attended(self.attention_norm(x_bsd))
        return x_bsd + mlp(self.mlp_norm(x_bsd))
