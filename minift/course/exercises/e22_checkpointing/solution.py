"""e22 Gradient checkpointing: keep what goes in, run the block again when its gradients are wanted."""

from typing import Any

import torch
from torch import Tensor, nn


class Recompute(torch.autograd.Function):
    """apply(block, wanted, *args): `wanted` is an empty tensor that requires grad if a parameter of the block does."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, wanted: Tensor, *args: Any) -> Tensor:
        ctx.block, ctx.random_state = block, torch.get_rng_state()
        ctx.places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(*(args[i] for i in ctx.places))
        return block(*args)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.others)
        for i, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
            # Cut off from the graph outside, so that backward stops here and leaves the gradient in .grad.
            args[i] = saved.detach().requires_grad_(ctx.needs_input_grad[i + 2])
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random_state)
            y = ctx.block(*args)
            # The same as torch.autograd.backward(y, dy): the gradient of sum(y * dy) for y is dy.
            (y * dy).sum().backward()
        gradients = [arg.grad if isinstance(arg, Tensor) else None for arg in args]
        return None, None, *gradients


def checkpoint(block: nn.Module, *args: Any) -> Tensor:
    """block(*args), without keeping what is computed inside; backward runs the block a second time."""
    trained = any(parameter.requires_grad for parameter in block.parameters())
    return Recompute.apply(block, torch.empty(0, requires_grad=trained), *args)  # pyright: ignore[reportReturnType]
