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

from dataclasses import dataclass

import torch
from torch import Tensor


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
