"""LoRA groups, forward + backward: the projections of an attention layer, and an MLP, over NF4 (double quantization).

Peers: PEFT over bitsandbytes' Linear4bit, as SFTTrainer runs it (bf16 autocast); and our own LoRA over the same weights
in plain bf16, which need no decoding: shown as what 4 bits cost. `saved` is what autograd keeps for the backward pass
beyond inputs and parameters.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import bitsandbytes
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, Setup, check_close
from minift import LoraConfig, add_lora
from minift.adapters.lora import LoraLinear
from minift.model.layers import gate_and_multiply
from minift.quant import Linear4bit

RANK, ALPHA, TOKENS = 16, 32, 2048
# Width, key/value width, inner width: SmolLM2-135M's on a CPU, an 8B Llama's on a GPU.
SHAPES = {"cpu": (576, 192, 1536), "cuda": (4096, 1024, 14336)}
# Results are rounded to bf16 after each of up to four operations, in another order on each side: 2^-9 each, and the
# inner state of the MLP is itself such a result.
AGREE = 8 * 2**-9


class Projections(nn.Module):
    """Queries, keys and values of one input."""

    def __init__(self, make: Callable[[int, int], nn.Module], width: int, groups: int, inner: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = make(width, width), make(width, groups), make(width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with our product or with autograd's."""

    def __init__(self, make: Callable[[int, int], nn.Module], width: int, groups: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = make(width, inner), make(width, inner), make(inner, width)
        self.fused = make is not theirs_4bit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gate_and_multiply(gate, up, "silu") if self.fused else F.silu(gate) * up)


def plain(width_in: int, width_out: int) -> nn.Linear:
    """A layer with weights like those of a model."""
    layer = nn.Linear(width_in, width_out, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(layer.weight, std=0.02)
    return layer.requires_grad_(False)


def theirs_4bit(width_in: int, width_out: int) -> Any:
    """bitsandbytes' layer, whose weight is filled in later."""
    return bitsandbytes.nn.Linear4bit(
        width_in, width_out, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )


def rows(setup: Setup) -> Iterator[Row]:
    for kind, name in ((Projections, "q, k, v"), (MLP, "MLP")):
        # Whole blocks in a row: of others bitsandbytes' AVX512 decoder mistakes the scales.
        sizes = [setup.size(width) // 64 * 64 for width in SHAPES[setup.device.type]]
        tokens = setup.size(TOKENS)
        ours, theirs, bf16 = sides(setup, kind, sizes)
        x = torch.randn(1, tokens, sizes[0]).to(setup.device, torch.bfloat16)
        weight_bytes = sum(p.nbytes for p in bf16.parameters()) + x.nbytes
        for other, label, goal, honest in (
            (theirs, "PEFT + bitsandbytes", setup.goal(eager=1.3, compiled=1.3, cuda=1.4), False),
            (bf16, "LoRA over plain bf16", setup.goal(cuda=0.9), True),
        ):
            yield Row(
                name=f"LoRA r={RANK}, {name}, {tokens} rows, width {sizes[0]}, against {label}",
                inputs=setup.rotate((ours, other, x), weight_bytes),
                ours=lambda held: forward_backward(held[0], held[2], False),
                theirs=lambda held, peer=other is theirs: forward_backward(held[1], held[2], peer),
                check=_check,
                goal=goal,
                honest=honest,
                facts=lambda a, b: {"note": f"saved {a[-1] / 1e6:.1f} against {b[-1] / 1e6:.1f} MB"},
            )


def sides(setup: Setup, kind: Any, sizes: list[int]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The same group with the same adapters: NF4 here, NF4 there, and the decoded weights in bf16 here."""
    torch.manual_seed(0)
    base = kind(plain, *sizes)
    theirs = kind(theirs_4bit, *sizes)
    params: Any = bitsandbytes.nn.Params4bit
    for name, layer in base.named_children():
        slot: Any = theirs.get_submodule(name)
        slot.weight = params(
            layer.weight.detach().clone(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=slot
        )
    theirs = theirs.to(setup.device)
    ours, bf16 = deepcopy(base), deepcopy(base)
    for name, layer in base.named_children():
        packed = Linear4bit.from_linear(layer)
        setattr(ours, name, packed)
        setattr(bf16, name, packed.plain())
    names = [name for name, _ in base.named_children()]
    for model in (ours, bf16):
        add_lora(model.to(setup.device), LoraConfig(RANK, ALPHA, target_modules=tuple(names)))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
    peft.inject_adapter_in_model(config, theirs)
    for name in names:
        a = torch.randn(RANK, base.get_submodule(name).in_features, device=setup.device) / RANK
        b = torch.randn(base.get_submodule(name).out_features, RANK, device=setup.device) * 0.01
        for model in (ours, bf16):
            layer = model.get_submodule(name)
            assert isinstance(layer, LoraLinear)
            fill(layer.matrices("default"), a, b)
        wrapped: Any = theirs.get_submodule(name)
        # As get_peft_model leaves them.
        fill((wrapped.lora_A["default"].float().weight, wrapped.lora_B["default"].float().weight), a, b)
    return ours, theirs, bf16


@torch.no_grad()
def fill(matrices: tuple[Tensor, Tensor], a: Tensor, b: Tensor) -> None:
    """Put values into A and B."""
    matrices[0].copy_(a)
    matrices[1].copy_(b)


def forward_backward(group: nn.Module, x: Tensor, autocast: bool) -> tuple[Any, ...]:
    """Result, gradient of the input, gradients of all A and B in order of their names, and bytes that were saved."""
    x = x.detach().requires_grad_()
    for p in group.parameters():
        p.grad = None
    own = {p.untyped_storage().data_ptr() for p in [*group.parameters(), *group.buffers(), x]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(x.device.type, torch.bfloat16, enabled=autocast),
    ):
        y = group(x)
    y.backward(y.detach())
    grads = [p.grad for _, p in sorted(group.named_parameters()) if p.grad is not None]
    return y.detach(), x.grad, *grads, sum(kept.values())


def _check(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours) - 3} gradients against {len(theirs) - 3}")
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        check_close(mine, other, AGREE)
