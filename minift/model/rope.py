"""Rotary position embedding: turn each pair of a head's numbers by an angle proportional to the position.

Pair i of a head of width E turns by `position * theta^(-2i/E)`: the first pairs spin fast and tell neighbours apart,
the last ones slowly and tell far from near. A dot product of two turned vectors depends on the difference of their
positions only, which is what attention needs.

Hugging Face checkpoints pair number i with number i + E/2 (two halves), the original Llama code 2i with 2i + 1
(interleaved). The weights differ by a permutation of the rows of q_proj and k_proj:

    interleaved  x0 x1 | x2 x3 | x4 x5 ...         halves  x0 x1 x2 ... | x(E/2) ...
                 pair 0  pair 1  pair 2                    pair i = (x_i, x_(i+E/2))

With a `partial_rotary_factor` (Phi-4-mini) only the first part of a head turns.

Frequencies and angles are computed in fp32 and only the cosines and sines are cast: a bf16 position above 256 would
already be rounded. A model that was trained on short texts reads longer ones if it turns more slowly:

    linear     all frequencies divided by `factor`
    llama3     only the slow ones, with a ramp between
    yarn       the same idea, the ramp given in turns per trained context; scores grow a little with the factor
    longrope   a divisor for each pair, found by search: one set for texts within the trained context, one beyond

The last two multiply cosines and sines by an *attention factor*, so the scores grow by its square. longrope's divisors
change for all positions as soon as one is beyond: keys that were turned before are then of no use (generate.py).
Left out: `dynamic`, whose frequencies depend on the lengths of earlier inputs.

Sources: RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753; transformers
`modeling_rope_utils.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [b, 1, s, turned part of e]


def rotation(rope: dict[str, Any], head_dim: int, positions_bs: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosines and sines for tokens at these positions."""
    length = positions_bs.max() + 1 if rope["rope_type"] == "longrope" else None
    frequency = rope_frequencies(rope, head_dim, positions_bs.device, length)
    return cos_sin(positions_bs, frequency, dtype, attention_factor(rope))


def rope_frequencies(
    rope: dict[str, Any], head_dim: int, device: torch.device | None = None, length: Tensor | None = None
) -> Tensor:
    """Angle per position of each pair, fp32 [turned part of head_dim / 2].

    Args:
        rope: `rope_type`, `rope_theta` and what the type needs.
        head_dim: numbers in a head.
        length: longrope: tokens of the longest text, int64 []; None is a short one.
    """
    width = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    exponent = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    slowness = rope["rope_theta"] ** exponent
    match rope["rope_type"]:
        case "linear":
            return 1.0 / slowness / rope["factor"]
        case "llama3":
            return _llama3(1.0 / slowness, rope)
        case "yarn":
            return _yarn(slowness, rope)
        case "longrope":
            short, long = (torch.tensor(rope[key], device=device) for key in ("short_factor", "long_factor"))
            if length is None:
                return 1.0 / (short * slowness)
            return 1.0 / (torch.where(length > rope["original_max_position_embeddings"], long, short) * slowness)
    return 1.0 / slowness


def _llama3(frequency: Tensor, rope: dict[str, Any]) -> Tensor:
    """Slow down the pairs whose wavelength is long against the context the model was first trained on."""
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequency
    smooth = (old / wavelength - low) / (high - low)
    ramp = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
    slow = torch.where(wavelength > old / low, frequency / rope["factor"], ramp)
    return torch.where(wavelength < old / high, frequency, slow)


def _yarn(slowness: Tensor, rope: dict[str, Any]) -> Tensor:
    """Keep the pairs that turn more than `beta_fast` times within the trained context, slow those below `beta_slow`."""
    theta, old, pairs = rope["rope_theta"], rope["original_max_position_embeddings"], slowness.shape[0]

    def pair_with(turns: float) -> float:
        """The (fractional) number of the pair that turns so often within the trained context."""
        return 2 * pairs * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(rope.get("beta_fast") or 32), pair_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    ramp = (torch.arange(pairs, dtype=torch.float32, device=slowness.device) - first) / ((last - first) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope["factor"] * slowness) * (1 - kept) + 1.0 / slowness * kept


def attention_factor(rope: dict[str, Any]) -> float:
    """What cosines and sines are multiplied by; 1 for most types."""
    if rope["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    factor = rope["factor"]
    if factor <= 1:
        return 1.0
    if rope["rope_type"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(rope["original_max_position_embeddings"]))
    whole, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if whole and all_dims:
        return (0.1 * whole * math.log(factor) + 1) / (0.1 * all_dims * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def cos_sin(positions_bs: Tensor, frequency: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Rotation:
    """Cosines of all angles, times `factor`, the same in both halves of e; sines with a minus in the first half.

    The pair (a, b) turns to (a cos - b sin, b cos + a sin): each half times the cosine, plus the other half times this.
    """
    angle = positions_bs[:, None, :, None].float() * frequency
    cos, sin = (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x_bhse: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys, in their own dtype; what is beyond the width of `cos` stays as it is."""
    width = cos.shape[-1]
    if width < x_bhse.shape[-1]:
        return torch.cat([apply_rope(x_bhse[..., :width], cos, sin), x_bhse[..., width:]], dim=-1)
    return x_bhse * cos + x_bhse.roll(width // 2, dims=-1) * sin
