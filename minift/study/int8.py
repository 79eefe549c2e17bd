"""Where the outliers of LLM.int8() are, and what multiplying them apart is worth.

`input_outliers` looks at what really flows into the linear layers of a model; `split_errors` multiplies one such input
by one weight with several thresholds and compares with the product in fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from minift.quant.int8 import int8_linear, quantize_rows, quantize_weight_int8
from minift.quant.model import relative_error


@dataclass(frozen=True)
class Inputs:
    """What flowed into one linear layer.

    Attributes:
        path: of the layer.
        x_ni: fp32 [tokens, in_features].
        typical: root mean square of all values.
        largest: magnitude.
        columns: how many columns hold a magnitude of at least the threshold.
    """

    path: str
    x_ni: Tensor
    typical: float
    largest: float
    columns: int


def input_outliers(model: nn.Module, *inputs: Tensor, threshold: float = 6.0) -> list[Inputs]:
    """Run a forward pass without gradients and look at the input of every nn.Linear, in the order of use."""
    found: list[Inputs] = []

    def look(path: str, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        x_ni = x.detach().float().reshape(-1, x.shape[-1])
        columns = int((x_ni.abs().amax(0) >= threshold).sum())
        found.append(Inputs(path, x_ni, float(x_ni.square().mean().sqrt()), float(x_ni.abs().max()), columns))

    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_pre_hook(partial(look, path)) for path, module in linears.items()]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class Split:
    """One product in 8 bits.

    Attributes:
        threshold: 0 for none.
        columns: how many columns of x were multiplied in floating point.
        worst_scale: the largest step between two codes of a row of x.
        error: of the product, relative to that in fp32.
    """

    threshold: float
    columns: int
    worst_scale: float
    error: float


def split_errors(x_ni: Tensor, weight_oi: Tensor, thresholds: Sequence[float] = (0.0, 6.0)) -> list[Split]:
    """Multiply x by the weight in 8 bits with each threshold, fp32 [n, i] and [o, i]."""
    codes_oi, absmax_o = quantize_weight_int8(weight_oi)
    exact_no = x_ni @ weight_oi.detach().float().T
    found = []
    for threshold in thresholds:
        _, absmax_n, outliers = quantize_rows(x_ni.half(), threshold)
        y_no = int8_linear(x_ni, codes_oi, absmax_o, threshold=threshold)
        found.append(Split(threshold, len(outliers), float(absmax_n.max()) / 127, relative_error(exact_no, y_no)))
    return found
