"""The parts of a decoder block: RMS normalization, gated MLP, self-attention with rotary positions.

Attribute names are the parameter names of Hugging Face checkpoints (`self_attn.q_proj.weight`, ...), so loading needs
no key map, and an adapter written here finds its place there.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.model.cache import LayerCache
from minift.model.config import ModelConfig
from minift.model.rope import apply_rope

# Attention with everything but q, k and v decided: which kernel, who may see whom (see decoder.py).
QKV = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        return self.weight * NormalizeRMS.apply(x_bsd, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class NormalizeRMS(torch.autograd.Function):
    """n = x * r, r = 1 / sqrt(mean(x^2) + eps), keeping only x and one r a row for the backward pass.

    With dn the incoming gradient:  dx = r * (dn - n * mean(dn * n)).
    Left to autograd, the fp32 copies of x and of its square would stay in memory until then: 4 times as much.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        x_fp32 = x.float()
        r = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, r)
        return (x_fp32 * r).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        x, r = ctx.saved_tensors
        dn, n = grads[0].float(), x.float() * r
        return (r * (dn - n * (dn * n).mean(-1, keepdim=True))).to(x.dtype), None


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (GLU variants, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x_bsd: Tensor) -> Tensor:
        return self.down_proj(GateAndMultiply.apply(self.gate_proj(x_bsd), self.up_proj(x_bsd)))


class GateAndMultiply(torch.autograd.Function):
    """silu(gate) * up, silu(g) = g * sigmoid(g), keeping only the two inputs: autograd would keep silu(gate) as well.

    d up = dy * silu(gate);    d gate = dy * up * silu'(gate)
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (dy,) = grads
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)


class SelfAttention(nn.Module):
    """Project to queries, keys and values, turn by position, attend, project back.

    With `qk_norm` (Qwen3) each head's queries and keys are normalized first, so that no score can explode; a layer that
    is not `rotary` (SmolLM3's NoPE) does not turn them.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.head_dim, self.rotary = head, config.rotary[layer]
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=config.o_bias)
        self.q_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_bsd: Tensor, rotation: tuple[Tensor, Tensor], attend: QKV, cache: LayerCache | None) -> Tensor:
        q_bhse, k_bgse, v_bgse = (self._heads(project(x_bsd)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q_bhse, k_bgse = self.q_norm(q_bhse), self.k_norm(k_bgse)
        if self.rotary:
            q_bhse, k_bgse = apply_rope(q_bhse, *rotation), apply_rope(k_bgse, *rotation)
        k_bgte, v_bgte = cache.append(k_bgse, v_bgse) if cache is not None else (k_bgse, v_bgse)
        out_bhse = attend(q_bhse, k_bgte, v_bgte)
        return self.o_proj(out_bhse.transpose(1, 2).flatten(2))

    def _heads(self, x_bsd: Tensor) -> Tensor:
        return x_bsd.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x)): normalization before each part, so gradients have a straight way."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, x_bsd: Tensor, rotation: tuple[Tensor, Tensor], attend: QKV, cache: LayerCache | None = None
    ) -> Tensor:
        x_bsd = x_bsd + self.self_attn(self.input_layernorm(x_bsd), rotation, attend, cache)
        return x_bsd + self.mlp(self.post_attention_layernorm(x_bsd))
