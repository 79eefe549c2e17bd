"""DoRA: learn how long each row of the weight is apart from where it points.

    W' = m * (W + s B A) / |W + s B A|           |.| and m: one number a row (an output feature), m starts at |W|

Full fine-tuning changes the two rather independently of each other; LoRA's B A must do both at once. Written as
something to add to the layer's own output, with g = m / |W + s B A|:

    y = W x + b   +   (g - 1) * W x   +   g * s B (A x)

The norm is a constant for the backward pass (section 4.3 of the paper): it follows A and B, but gets no gradient, which
saves the memory of a full matrix and costs no accuracy.

The price is the full matrix W + s B A, made in every forward pass for its norms: with a quantized base, W is decoded
once more. Several adapters of one layer are added up, each with its own g as if it were alone; PEFT applies g of a
second DoRA to the first one's result, which depends on their order.

Sources: DoRA, arXiv 2402.09353; PEFT `tuners/lora/dora.py`.
"""

import torch
from torch import Tensor


def row_norms(weight_oi: Tensor, a_ri: Tensor, b_or: Tensor, scaling: float) -> Tensor:
    """|W + s B A| of each row, fp32 [out]."""
    return torch.linalg.norm(weight_oi + scaling * (b_or @ a_ri), dim=1)


def add_dora(
    y: Tensor,
    base_y: Tensor,
    bias_o: Tensor | None,
    x: Tensor,
    a_ri: Tensor,
    b_or: Tensor,
    magnitude_o: Tensor,
    weight_oi: Tensor,
    scaling: float,
) -> Tensor:
    """y + (g - 1) * (base_y - b) + g * s * B (A x), in the dtype of y.

    Args:
        y: what to add to [..., out].
        base_y: the layer's own output for x, with its bias.
        bias_o: the layer's bias.
        x: the adapter's input [..., in]; the thin products run in its dtype, the sum in fp32.
        a_ri, b_or, magnitude_o: the adapter, fp32.
        weight_oi: the frozen weight, fp32.
    """
    with torch.no_grad():
        norm_o = row_norms(weight_oi, a_ri, b_or, scaling)
    gain_o = magnitude_o / norm_o
    direct = (base_y if bias_o is None else base_y - bias_o.to(base_y.dtype)).to(gain_o.dtype)
    low_rank = ((x @ a_ri.to(x.dtype).T) @ b_or.to(x.dtype).T).to(gain_o.dtype)
    return (y + (gain_o - 1) * direct + gain_o * scaling * low_rank).to(y.dtype)


def dora_delta(weight_oi: Tensor, change_oi: Tensor, magnitude_o: Tensor) -> Tensor:
    """The change of the weight, W' - W [out, in], for a low-rank change s B A."""
    moved_oi = weight_oi + change_oi
    gain_o1 = (magnitude_o / torch.linalg.norm(moved_oi, dim=1)).unsqueeze(1)
    return gain_o1 * moved_oi - weight_oi
