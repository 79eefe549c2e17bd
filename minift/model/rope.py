"""Rotary position embedding: turn each pair of a head's numbers by an angle proportional to the position.

Pair i of a head of width E turns by `position * theta^(-2i/E)`: the first pairs spin fast and tell neighbours apart,
the last ones slowly and tell far from near. A dot product of two turned vectors depends on the difference of their
positions only, which is what attention needs.

Hugging Face checkpoints pair number i with number i + E/2 (two halves), the original Llama code 2i with 2i + 1
(interleaved). The weights differ by a permutation of the rows of q_proj and k_proj:

    interleaved  x0 x1 | x2 x3 | x4 x5 ...         halves  x0 x1 x2 ... | x(E/2) ...
                 pair 0  pair 1  pair 2                    pair i = (x_i, x_(i+E/2))

Frequencies and angles are computed in fp32 and only the cosines and sines are cast: a bf16 position above 256 would
already be rounded. Types: default; linear (all frequencies divided by `factor`); llama3 (only the slow ones, with a
ramp).

Sources: RoFormer, arXiv 2104.09864; transformers `modeling_rope_utils.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor


def rope_frequencies(rope: dict[str, Any], head_dim: int, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair, fp32 [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequency = 1.0 / (rope["rope_theta"] ** exponent)
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        return _llama3(frequency, rope)
    return frequency


def _llama3(frequency: Tensor, rope: dict[str, Any]) -> Tensor:
    """Slow down the pairs whose wavelength is long against the context the model was first trained on."""
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequency
    smooth = (old / wavelength - low) / (high - low)
    ramp = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
    slow = torch.where(wavelength > old / low, frequency / rope["factor"], ramp)
    return torch.where(wavelength < old / high, frequency, slow)


def cos_sin(positions_bs: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all angles, each [b, 1, s, e] in `dtype`; both halves of e are the same."""
    angle = positions_bs[:, None, :, None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x_bhse: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys, in their own dtype."""
    first, second = x_bhse.chunk(2, dim=-1)
    return x_bhse * cos + torch.cat([-second, first], dim=-1) * sin
