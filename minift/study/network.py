"""The smallest network with a forward and a backward pass: three linear layers, two tokens, nothing hidden.

    inputs (1, 2, 4) -> linear 4 x 4 -> tanh -> linear 4 x 4 -> tanh -> linear 4 -> 1 -> mean squared error

Forward, each layer computes y = x W^T, and autograd keeps x. Backward, from dy, the gradient of y, a layer makes two
products:

    dW = dy^T x      for the update: one number for each weight
    dx = dy W        handed on to the layer before; the first layer has none, and leaves it out

So the kept activations are the inputs of the three layers, 3 x 8 = 24 numbers, and the gradients as many numbers as
weights, 16 + 16 + 4 = 36. tanh keeps its result, which the next layer keeps anyway. What the loss keeps, predictions
and targets, is counted apart.

After the figures of the forward and the backward pass in chapter 5 of Godoy's book, whose net has the same shapes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

WIDTH, TOKENS = 4, 2


@dataclass(frozen=True)
class NetworkPass:
    """One forward and one backward pass.

    Attributes:
        activations: inputs [1, 2, 4], results of the hidden layers [1, 2, 4] twice, predictions [1, 2, 1].
        activation_grads: of the same; None where none is computed (the inputs).
        weights: (out, in) of the three layers.
        weight_grads: of the same.
        target: [1, 2, 1].
        loss: mean squared error.
        kept: numbers that autograd kept for the layers.
        kept_by_loss: numbers that it kept for the loss alone.
    """

    activations: tuple[Tensor, ...]
    activation_grads: tuple[Tensor | None, ...]
    weights: tuple[Tensor, ...]
    weight_grads: tuple[Tensor, ...]
    target: Tensor
    loss: float
    kept: int
    kept_by_loss: int


def run_network(seed: int = 0) -> NetworkPass:
    """Run the net once on random numbers, and count what autograd keeps as it keeps it."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(WIDTH, out, bias=False) for out in (WIDTH, WIDTH, 1)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.7, generator=generator)
    x, target = (torch.randn(1, TOKENS, width, generator=generator) for width in (WIDTH, 1))
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[_place(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = [x]
        for layer in layers[:-1]:
            hidden.append(layer(hidden[-1]).tanh())
        prediction = layers[-1](hidden[-1])
        loss = nn.functional.mse_loss(prediction, target)
    for tensor in (*hidden[1:], prediction):
        tensor.retain_grad()
    loss.backward()
    for layer in layers:
        saved.pop(_place(layer.weight), None)  # the weights are there anyway
    of_layers = {_place(tensor) for tensor in hidden}
    sizes = {place: tensor.numel() for place, tensor in saved.items()}
    return NetworkPass(
        activations=tuple(tensor.detach() for tensor in (*hidden, prediction)),
        activation_grads=tuple(tensor.grad for tensor in (*hidden, prediction)),
        weights=tuple(layer.weight.detach() for layer in layers),
        weight_grads=tuple(layer.weight.grad for layer in layers if layer.weight.grad is not None),
        target=target,
        loss=loss.item(),
        kept=sum(size for place, size in sizes.items() if place in of_layers),
        kept_by_loss=sum(size for place, size in sizes.items() if place not in of_layers),
    )


def _place(tensor: Tensor) -> int:
    """Views of the same numbers are kept once."""
    return tensor.untyped_storage().data_ptr()
