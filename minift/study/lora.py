"""LoRA's product written in four ways, its backward pass by hand, and what many small adapters cost on disk.

    3.1   y = x (W + B A)^T                the change as a matrix: the size of W, made for every x
    3.2   y = x W^T + x (B A)^T            two products of full size: what merging saves
    3.3   y = x W^T + (x A^T) B^T          through the bottleneck of r numbers: what is computed while training
    3.4   y = x W^T + s (x A^T) B^T        and scaled by s = alpha / r, so that alpha need not change with r

With s = 1 all four are one number; only the work differs: 3.3 needs 2 r (in + out) operations a row of x beyond the
base layer's, 3.2 needs 2 in out, and making B A 2 r in out.

    >>> example = hand_example()
    >>> example.h.tolist()
    [17.2, 30.1]

The storage of the 100-customer example: a fine-tuned copy of one 4096 x 4096 matrix for each customer against one
shared matrix and an adapter of rank 8 for each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minift.adapters.config import LoraConfig
from minift.adapters.inject import add_lora, count_parameters
from minift.adapters.lora import LoraLinear
from minift.model.decoder import CausalLM
from minift.study.book_tables import OPT_350M


def merged_weight(x_ni: Tensor, weight_oi: Tensor, a_ri: Tensor, b_or: Tensor, scaling: float = 1.0) -> Tensor:
    """Equation 3.1: x (W + s B A)^T, [n, out]."""
    return x_ni @ (weight_oi + scaling * (b_or @ a_ri)).T


def two_products(x_ni: Tensor, weight_oi: Tensor, a_ri: Tensor, b_or: Tensor, scaling: float = 1.0) -> Tensor:
    """Equation 3.2: x W^T + s x (B A)^T, [n, out]."""
    return x_ni @ weight_oi.T + scaling * (x_ni @ (b_or @ a_ri).T)


def bottleneck(x_ni: Tensor, weight_oi: Tensor, a_ri: Tensor, b_or: Tensor) -> Tensor:
    """Equation 3.3: x W^T + (x A^T) B^T, [n, out]."""
    return x_ni @ weight_oi.T + (x_ni @ a_ri.T) @ b_or.T


def scaled_bottleneck(x_ni: Tensor, weight_oi: Tensor, a_ri: Tensor, b_or: Tensor, alpha: float) -> Tensor:
    """Equation 3.4: x W^T + (alpha / r) (x A^T) B^T, [n, out]."""
    return x_ni @ weight_oi.T + alpha / len(a_ri) * ((x_ni @ a_ri.T) @ b_or.T)


@dataclass(frozen=True)
class HandPass:
    """One forward and backward pass for one input.

    Attributes:
        t: A x [r].
        h: W x + B t [out].
        dt: B^T dh [r].
        grad_b: dh t^T [out, r].
        grad_a: dt x^T [r, in].
    """

    t: Tensor
    h: Tensor
    dt: Tensor
    grad_b: Tensor
    grad_a: Tensor


def by_hand(x_i: Tensor, weight_oi: Tensor, a_ri: Tensor, b_or: Tensor, dh_o: Tensor) -> HandPass:
    """The forward pass and the gradients of A and B for one input [in] and upstream gradient [out], s = 1."""
    t_r, dt_r = a_ri @ x_i, b_or.T @ dh_o
    return HandPass(t_r, weight_oi @ x_i + b_or @ t_r, dt_r, torch.outer(dh_o, t_r), torch.outer(dt_r, x_i))


def hand_example() -> HandPass:
    """The example to follow with a pencil, in float64: W0 2 x 3, rank 1."""
    numbers = {
        "x_i": [10, 20, 30],
        "weight_oi": [[0.8, 0.1, 0.3], [0.2, 0.7, 0.5]],
        "a_ri": [[0.25, -0.5, 0.1]],
        "b_or": [[0.4], [0.2]],
        "dh_o": [0.5, -0.2],
    }
    return by_hand(**{name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()})


@dataclass(frozen=True)
class Storage:
    """Parameters to store for many customers of one model.

    Attributes:
        full: of one fine-tuned copy of the matrix.
        adapter: of one adapter.
        copies: of a fine-tuned copy for each customer.
        shared: of one matrix and an adapter for each customer.
    """

    full: int
    adapter: int
    copies: int
    shared: int


def customer_storage(customers: int = 100, in_features: int = 4096, out_features: int = 4096, r: int = 8) -> Storage:
    """How many parameters a matrix costs when each customer has a version of it.

    Raises:
        ValueError: a number below 1.
    """
    if min(customers, in_features, out_features, r) < 1:
        raise ValueError("customers, in_features, out_features and r must be at least 1")
    full, adapter = in_features * out_features, r * (in_features + out_features)
    return Storage(full, adapter, customers * full, full + customers * adapter)


def one_layer(weight_oi: Tensor, config: LoraConfig) -> LoraLinear:
    """A linear layer of this weight with an adapter "default" of fresh values, as `add_lora` makes it."""
    linear = nn.Linear(weight_oi.shape[1], weight_oi.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_oi, requires_grad=False)
    layer = LoraLinear(linear)
    layer.add("default", config)
    return layer


def kept_for_backward(form: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a forward pass keeps for its backward pass, one that is kept twice once."""
    kept: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Tensor:
        shape = tuple(sorted(tensor.shape))  # a transposed view is the same memory
        kept.setdefault((tensor.untyped_storage().data_ptr(), shape), tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = form()  # alive until the shapes are counted, or freed memory would be used again
    return sorted(kept.values()) if y.requires_grad else []


BOOK_COUNTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "q, v": ({}, 786_432, 331_982_848),
    "and norms whole": ({"modules_to_save": ("layer_norm",)}, 884_736, 332_081_152),
    "and the embedding whole": (
        {"modules_to_save": ("layer_norm", "embed_tokens"), "ensure_weight_tying": True}, 26_624_000, 357_820_416,
    ),
    "q, v, embedding by LoRA": ({"target_modules": ("q_proj", "v_proj", "embed_tokens")}, 1_192_704, 358_128_384),
}  # fmt: skip


def opt_counts() -> str:
    """Trained and all parameters of OPT-350M with the adapters of the book's chapter 3, counted and as printed there.

    The model is made on the meta device: shapes, no memory, no weights.
    """
    lines = [f"{'adapter, r = 8':<26}{'trained':>12}{'all':>14}{'share':>10}   the book"]
    for name, (options, trained, total) in BOOK_COUNTS.items():
        with torch.device("meta"):
            model = CausalLM(OPT_350M)
        add_lora(model, LoraConfig(**{"r": 8, "target_modules": ("q_proj", "v_proj")} | options))
        own = count_parameters(model)
        said = "the same" if own == (trained, total) else f"{trained:,} of {total:,}, {100 * trained / total:.4f} %"
        lines.append(f"{name:<26}{own[0]:>12,}{own[1]:>14,}{100 * own[0] / own[1]:>8.4f} %   {said}")
    return "\n".join(lines)
