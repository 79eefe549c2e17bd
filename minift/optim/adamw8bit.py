"""AdamW whose state takes two bytes a parameter instead of eight.

The two running means are stored as blockwise 8-bit codes (quant/blockwise.py): m with the signed dynamic map, v, which
cannot be negative, with the unsigned one, a scale for each 256 values. A step decodes, updates and encodes again:

    codes -> m, v (fp32)  ->  AdamW  ->  new m, v (fp32)  ->  update p with them, then back to codes

The parameter is updated with the *unrounded* means; rounding only affects what the next step remembers. Tensors with
fewer than 4096 elements keep fp32 state, as in bitsandbytes: there is nothing to save there.

All parameters are treated as one flat buffer, each padded to whole blocks:

    | p0 p0 p0 .  | p1 p1 p1 p1 | p2 p2 . .  |      padding has gradient 0, so it stays 0 and no block mixes tensors

so a step costs the same few operations for one tensor or for the 420 of a LoRA, instead of that many times the
overhead.

Peer: bitsandbytes AdamW8bit. It decays weights after the update, this one before (torch's order); without weight decay
they agree. Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from minift.optim.adamw import Optimizer, adamw_update_, check_hyperparameters
from minift.quant.blockwise import TINY, dequantize_blockwise
from minift.quant.codebooks import dynamic_map, nearest_dynamic

BLOCK = 256
MIN_8BIT_SIZE = 4096
# Elements updated at a time: eight fp32 temporaries of a chunk stay in the level-2 cache.
CHUNK = 1 << 15


class AdamW8bit(Optimizer):
    """AdamW with 8-bit state.

    Args:
        params: parameters or groups of them. All parameters of a group need a gradient at every step.
        lr, betas, eps, weight_decay: as AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, check_hyperparameters(lr, betas, eps, weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        missing = sum(p.grad is None for p in params)
        if missing:
            raise ValueError(
                f"{missing} of {len(params)} parameters have no gradient; give AdamW8bit only trained ones"
            )
        for index, group in enumerate(self.param_groups):
            large = [p for p in group["params"] if p.numel() >= MIN_8BIT_SIZE]
            small = [p for p in group["params"] if p.numel() < MIN_8BIT_SIZE]
            # Keyed by group, not by parameter: torch's state_dict passes such entries through as they are.
            state = self.state[f"group{index}"]  # pyright: ignore[reportArgumentType]
            if not state:
                state.update(_new_state(large, small))
            state["step"] += 1
            if large:
                _flat_step(large, state, group, _step_8bit)
            if small:
                _flat_step(small, state, group, _step_32bit)
        return loss


def _new_state(large: list[Tensor], small: list[Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {"step": 0}
    if large:
        n, device = sum(map(_padded, large)), large[0].device
        # The code of 0.0 differs: 127 in the signed map, 0 in the unsigned one.
        state["m_codes"] = torch.full((n,), 127, dtype=torch.uint8, device=device)
        state["v_codes"] = torch.zeros(n, dtype=torch.uint8, device=device)
        state["m_absmax"], state["v_absmax"] = (torch.zeros(n // BLOCK, device=device) for _ in range(2))
    if small:
        n, device = sum(map(_padded, small)), small[0].device
        state["m_fp32"], state["v_fp32"] = (torch.zeros(n, device=device) for _ in range(2))
    return state


def _padded(p: Tensor) -> int:
    return -(-p.numel() // BLOCK) * BLOCK


def _flat_step(params: list[Tensor], state: dict[str, Any], group: dict[str, Any], update: Callable) -> None:
    grads = [p.grad for p in params if p.grad is not None]  # all of them: step has looked
    p_n = torch.zeros(sum(map(_padded, params)), dtype=torch.float32, device=params[0].device)
    g_n = torch.zeros_like(p_n)
    torch._foreach_copy_(_views(p_n, params), params)
    torch._foreach_copy_(_views(g_n, params), grads)
    update(p_n, g_n, state, group)
    torch._foreach_copy_(params, _views(p_n, params))


def _views(flat_n: Tensor, params: list[Tensor]) -> list[Tensor]:
    """The part of the flat buffer that belongs to each parameter, in its shape."""
    views, start = [], 0
    for p in params:
        views.append(flat_n[start : start + p.numel()].view(p.shape))
        start += _padded(p)
    return views


def _step_32bit(p_n: Tensor, g_n: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    adamw_update_(p_n, g_n, state["m_fp32"], state["v_fp32"], state["step"], group)


def _step_8bit(p_n: Tensor, g_n: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    maps = {"m": dynamic_map(signed=True).to(p_n.device), "v": dynamic_map(signed=False).to(p_n.device)}
    for start in range(0, len(p_n), CHUNK):
        chunk = slice(start, start + CHUNK)
        blocks = slice(start // BLOCK, (start + CHUNK) // BLOCK)
        m, v = (
            dequantize_blockwise(state[f"{name}_codes"][chunk], state[f"{name}_absmax"][blocks], code, BLOCK)
            for name, code in maps.items()
        )
        adamw_update_(p_n[chunk], g_n[chunk], m, v, state["step"], group)
        for name, values in (("m", m), ("v", v)):
            absmax = values.view(-1, BLOCK).abs().amax(1)
            normalized = values.view(-1, BLOCK) * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)
            state[f"{name}_absmax"][blocks] = absmax
            state[f"{name}_codes"][chunk] = nearest_dynamic(name == "m", p_n.device)(normalized.view(-1))
