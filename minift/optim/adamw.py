"""AdamW, as in the paper: two running means a parameter, and weight decay that does not pass through them.

    m <- b1 m + (1 - b1) g                v <- b2 v + (1 - b2) g^2
    p <- p - lr * wd * p                  (decay first, torch's order)
    p <- p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Both means start at zero and are too small at first; the powers of b1 and b2 correct that. The state is two fp32 numbers
a parameter: 8 bytes, twice the fp32 parameter itself. adamw8bit.py keeps it in two bytes.

Source: Decoupled Weight Decay Regularization, arXiv 1711.05101; torch.optim.AdamW.
"""

import math
from collections.abc import Callable, Iterable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor


def check_hyperparameters(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    """The settings as a dict, or ValueError for one out of range. A rate of 0 is the first step of a warm-up."""
    if not all(0 <= value < math.inf for value in (lr, eps, weight_decay)):
        raise ValueError(
            f"lr, eps and weight_decay must be finite and not negative, got {lr}, {eps} and {weight_decay}"
        )
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {betas}")
    return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}


def adamw_update_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, group: dict[str, Any]) -> None:
    """One update of p, m and v in place; all fp32 (p may be of another dtype) and of one shape; step counts from 1."""
    beta1, beta2 = group["betas"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    denominator = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    p.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))


class Optimizer(torch.optim.Optimizer):
    """torch's optimizer, without importing torch's compiler when it is made (1.5 s, 120 MB): that happens inside the
    wrapper around these methods, so what they wrap is called."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; ValueError for one out of range."""
        settings = self.defaults | param_group
        check_hyperparameters(settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"])
        unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy. torch casts state to the dtype of its parameter; here it keeps the one it was saved with."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for owner, state in state_dict["state"].items():
            p = params[owner] if isinstance(owner, int) else params[0]
            copied = {
                k: v.to(self.state_device(k, p), copy=True) if isinstance(v, Tensor) else v for k, v in state.items()
            }
            self.state[p if isinstance(owner, int) else owner] = copied

    def state_device(self, name: str, p: Tensor) -> torch.device:
        """Where the entry `name` of the state of p lives."""
        return p.device


class AdamW(Optimizer):
    """AdamW with fp32 state.

    Args:
        params: parameters or groups of them.
        lr: step size. Others as in the module docstring.
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
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["m"], state["v"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
                state["step"] += 1
                adamw_update_(p, p.grad.float(), state["m"], state["v"], state["step"], group)
        return loss
