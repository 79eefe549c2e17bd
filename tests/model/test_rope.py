"""Rotary positions against transformers' LlamaRotaryEmbedding, bit for bit, and against what they are for.

Frequencies, cosines and sines are the same few fp32 operations in both libraries, so they must be equal, not close.
The properties (lengths are kept, products depend on distances) are tested in float64, where nothing is hidden by
rounding.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minift.model.config import ModelConfig
from minift.model.rope import apply_rope, attention_factor, cos_sin, rope_frequencies, rotation

llama = pytest.importorskip("transformers.models.llama.modeling_llama")

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3.2": LLAMA3 | {"factor": 32.0},
    "llama3, short": LLAMA3 | {"original_max_position_embeddings": 64, "high_freq_factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, all settings": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 24.0,
        "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False,
    },
    "yarn, given factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5,
    },
}  # fmt: skip
PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
# Position 0, neighbours, around 256 (where bf16 stops counting in ones), and far away.
POSITIONS = torch.tensor([[0, 1, 2, 3, 255, 256, 257, 258], [0, 0, 1000, 1001, 8191, 8192, 100000, 131071]])


def signed(sin: Tensor) -> Tensor:
    """Their sines as ours are kept: negative in the first half."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


def theirs_for(rope: dict[str, Any], head_dim: int) -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=dict(rope), vocab_size=8
    )
    return llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name: str, head_dim: int, theta: float):
    rope = ROPES[name] | {"rope_theta": theta}
    ours, theirs = rope_frequencies(rope, head_dim), theirs_for(rope, head_dim)
    assert ours.dtype == torch.float32
    assert ours.shape == (head_dim // 2,)
    assert torch.equal(ours, theirs.inv_freq)
    assert attention_factor(rope) == theirs.attention_scaling
    assert (theirs.attention_scaling == 1.0) == (not name.startswith("yarn"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROPES)
def test_cosines_and_sines_equal_transformers(name: str, dtype: torch.dtype):
    rope = ROPES[name] | {"rope_theta": 10000.0}
    ours = rotation(rope, 64, POSITIONS, dtype)
    cos, sin = theirs_for(rope, 64)(torch.empty(0, dtype=dtype), POSITIONS)
    for mine, other in zip(ours, (cos, signed(sin)), strict=True):
        assert mine.dtype == other.dtype == dtype
        assert mine.shape == (2, 1, 8, 64)
        assert torch.equal(mine.squeeze(1), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"factor": 32.0}, {"attention_factor": 1.25}, {"factor": 0.5}])
@pytest.mark.parametrize("partial", [1.0, 0.75])
@pytest.mark.parametrize("longest", [4095, 4096])
def test_longrope_equals_transformers(longest: int, partial: float, settings: dict[str, float], dtype: torch.dtype):
    """The last position within the trained context, and the first beyond, which changes all the others, too."""
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    pairs = int(32 * partial)
    rope: dict[str, Any] = {
        "rope_type": "longrope", "short_factor": [1 + i / 50 for i in range(pairs)],
        "long_factor": [1 + i * i / 7 for i in range(pairs)], "partial_rotary_factor": partial,
    } | settings  # fmt: skip
    raw = {
        "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 131072, "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096, "vocab_size": 8, "num_hidden_layers": 1, "intermediate_size": 8,
    }  # fmt: skip
    theirs = Phi3RotaryEmbedding(Phi3Config(**raw, rope_parameters=dict(rope), pad_token_id=None))
    config = ModelConfig.from_dict(raw | {"model_type": "phi3", "rope_scaling": rope})
    positions = torch.tensor([[0, 1, 5, longest]])
    ours = rotation(config.rope, 64, positions, dtype)
    cos, sin = theirs(torch.empty(0, dtype=dtype), positions)
    for mine, other in zip(ours, (cos, signed(sin)), strict=True):
        assert mine.shape == (1, 1, 4, 2 * pairs)
        assert torch.equal(mine.squeeze(1), other)


@pytest.mark.parametrize("width", [8, 12])
def test_only_the_first_part_of_a_head_turns(width: int):
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    x = torch.randn(2, 3, 8, 16)
    cos, sin = rotation(PLAIN | {"partial_rotary_factor": width / 16}, 16, POSITIONS, torch.float32)
    ours = apply_rope(x, cos, sin)
    theirs, _ = apply_rotary_pos_emb(x, x, cos.squeeze(1), signed(sin).squeeze(1))
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[..., width:], x[..., width:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 5])
def test_turning_equals_transformers(heads: int, dtype: torch.dtype):
    x = torch.randn(2, heads, 8, 64, dtype=dtype)
    cos, sin = cos_sin(POSITIONS, rope_frequencies({"rope_type": "default", "rope_theta": 10000.0}, 64), dtype)
    ours = apply_rope(x, cos, sin)
    theirs, _ = llama.apply_rotary_pos_emb(x, x, cos.squeeze(1), signed(sin).squeeze(1))
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama3", "llama3.2", "llama3, short"])
def test_llama3_leaves_fast_pairs_alone_and_slows_the_slow_ones(name: str):
    """The paper's three ranges of wavelengths, each of which must occur for the test to say something."""
    rope = ROPES[name] | {"rope_theta": 10000.0}
    plain, scaled = rope_frequencies(rope | {"rope_type": "default"}, 128), rope_frequencies(rope, 128)
    wavelength, old = 2 * math.pi / plain, rope["original_max_position_embeddings"]
    fast, slow = wavelength < old / rope["high_freq_factor"], wavelength > old / rope["low_freq_factor"]
    between = ~fast & ~slow
    assert min(fast.sum(), slow.sum(), between.sum()) > 2
    assert torch.equal(scaled[fast], plain[fast])
    assert torch.equal(scaled[slow], plain[slow] / rope["factor"])
    ratio = scaled[between] / plain[between]
    assert ((ratio < 1) & (ratio > 1 / rope["factor"])).all()
    assert (ratio.diff() < 0).all()  # the slower the pair, the more it is slowed


def angles(positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """As `cos_sin`, in float64 throughout."""
    angle = positions[:, None, :, None].double() * frequency.double()
    return torch.cat([angle, angle], -1).cos(), signed(torch.cat([angle, angle], -1).sin())


def test_positions_far_out_keep_their_fp32_angle_in_bf16():
    """The angle is computed in fp32 and only its cosine is rounded: an error of one bf16 rounding (2^-9, of a value of
    at most 1), plus that of the fp32 angle (2^-24 of up to 2^17 rad, times the slope of at most 1)."""
    frequency = rope_frequencies({"rope_type": "default", "rope_theta": 10000.0}, 64)
    for ours, exact in zip(cos_sin(POSITIONS, frequency, torch.bfloat16), angles(POSITIONS, frequency), strict=True):
        assert (ours.double() - exact).abs().max() <= 2**-9 + 2**-24 * 2**17 + 2**-23


def test_products_depend_on_the_distance_only():
    frequency = rope_frequencies({"rope_type": "default", "rope_theta": 10000.0}, 16)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(query_position: int, key_position: int) -> float:
        turned = [
            apply_rope(x, *angles(torch.tensor([[position]]), frequency))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return (turned[0] * turned[1]).sum().item()

    for distance in (0, 1, 7, 100):
        values = [product(start + distance, start) for start in (0, 1, 13, 500)]
        assert values == pytest.approx([values[0]] * 4, abs=1e-12)  # float64 at angles up to 600: 600 * 2^-53 * |q||k|
    assert product(1, 0) != pytest.approx(product(0, 1), abs=1e-3)  # it tells before from after
    assert product(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-14)


def test_turning_keeps_the_length_of_every_pair():
    frequency = rope_frequencies({"rope_type": "default", "rope_theta": 10000.0}, 16)
    x = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    turned = apply_rope(x, *angles(POSITIONS, frequency))

    def lengths(y: Tensor) -> Tensor:
        return y.unflatten(-1, (2, 8)).norm(dim=-2)

    assert torch.allclose(lengths(turned), lengths(x), rtol=1e-14, atol=0)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])  # position 0 is not turned at all


def test_halves_are_a_permutation_of_interleaved_pairs():
    """The module's docstring: pair i is (x_i, x_(i + E/2)) here, (x_2i, x_2i+1) in the original Llama code."""
    frequency = rope_frequencies({"rope_type": "default", "rope_theta": 10000.0}, 8)
    x = torch.randn(1, 1, 5, 8, dtype=torch.float64)
    positions = torch.arange(5).unsqueeze(0)
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))  # the original: neighbours as one complex number
    turn = torch.polar(torch.ones(5, 4, dtype=torch.float64), torch.arange(5)[:, None] * frequency.double())
    theirs = torch.view_as_real(pairs * turn).flatten(-2)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    ours = apply_rope(x[..., order], *angles(positions, frequency))
    assert torch.allclose(ours, theirs[..., order], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_parameters": {"rope_theta": 5e5} | LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {
            "rope_theta": 500000,
            "rope_scaling": {"type": "llama3"} | {k: v for k, v in LLAMA3.items() if "type" not in k},
        },
    ],
    ids=["transformers 5", "rope_type", "type"],
)
def test_the_spellings_of_a_config_mean_the_same(tiny: Path, raw: dict[str, Any]):
    base = json.loads((tiny / "config.json").read_text())
    base.pop("rope_parameters")
    ours = rope_frequencies(ModelConfig.from_dict(base | raw).rope, 64)
    assert torch.equal(ours, rope_frequencies(LLAMA3 | {"rope_theta": 5e5}, 64))


def test_a_config_without_rotary_settings_has_llamas(tiny: Path):
    base = json.loads((tiny / "config.json").read_text())
    base.pop("rope_parameters")
    ours = rope_frequencies(ModelConfig.from_dict(base).rope, 64)
    assert torch.equal(ours, theirs_for({"rope_type": "default", "rope_theta": 10000.0}, 64).inv_freq)
