"""The codebooks against bitsandbytes' tables, bit for bit, and the nearest-code search against a search in float64.

The search by table look-up has one way to be wrong that random values hardly meet: at a midpoint and at the edge of a
cell (a range of fp32 numbers that share their top 16 bits). So besides two million random values, every midpoint with
its two fp32 neighbours and both ends of all finite cells are tried.
"""

import hashlib

import numpy as np
import pytest
import torch
from bitsandbytes import functional as theirs_functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.quant import codebook, dynamic_map
from minift.quant.codebooks import CHUNK, NearestCode, nearest_4bit, nearest_dynamic, symmetric_quantiles

CODEBOOKS = {
    "nf4": codebook("nf4"),
    "fp4": codebook("fp4"),
    "signed": dynamic_map(signed=True),
    "unsigned": dynamic_map(signed=False),
}


def bits(x: Tensor) -> Tensor:
    """The fp32 patterns, so that +0.0 and -0.0 differ."""
    return x.view(torch.int32)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_codebook_equals_bitsandbytes(quant_type: str):
    ours, theirs = codebook(quant_type), theirs_functional.get_4bit_type(quant_type, device="cpu")
    assert ours.dtype == torch.float32
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize(
    ("signed", "digest"),
    [
        (True, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        (False, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ],
)
def test_dynamic_map_equals_bitsandbytes(signed: bool, digest: str):
    ours, theirs = dynamic_map(signed), theirs_functional.create_dynamic_map(signed)
    assert torch.equal(bits(ours), bits(theirs))
    # The digest of the little-endian fp32 bytes of bitsandbytes 0.50.2: also holds if the installed peer ever changes.
    assert hashlib.sha256(ours.numpy().astype("<f4").tobytes()).hexdigest() == digest


def test_nf4_has_a_zero_and_more_positive_values():
    values = codebook("nf4")
    assert [(values > 0).sum().item(), (values == 0).sum().item(), (values < 0).sum().item()] == [8, 1, 7]
    assert values.min() == -1 and values.max() == 1


def test_symmetric_quantiles_are_the_printed_table():
    """The figures as texts print them, to four digits."""
    printed = [0.0421, 0.1273, 0.2159, 0.3109, 0.4168, 0.5422, 0.7076, 1.0]
    values = symmetric_quantiles()
    assert values.dtype == torch.float32
    assert [round(value, 4) for value in values.tolist()] == [-value for value in printed[::-1]] + printed


def test_symmetric_quantiles_are_quantiles_of_the_normal_distribution():
    """Against torch's own inverse in float64; it and Python's differ by less than 1e-15, fp32 rounds by 2^-25."""
    share = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    theirs = torch.special.ndtri(share) / torch.special.ndtri(share[-1])
    assert ((symmetric_quantiles().double() - theirs).abs() <= 2**-24 * theirs.abs()).all()


def test_only_nf4_keeps_zeros():
    """Pruned weights and padding: NF4 gives them back as zeros; the symmetric table as 4.2 % of the largest weight."""
    x = torch.cat([torch.zeros(32), torch.linspace(-1, 1, 32)])
    nf4, symmetric = codebook("nf4"), symmetric_quantiles()
    decoded = {name: values[NearestCode(values, "down")(x).int()] for name, values in
               (("nf4", nf4), ("symmetric", symmetric))}  # fmt: skip
    assert (decoded["nf4"][:32] == 0).all()
    assert (decoded["symmetric"][:32].abs() - 0.0421).abs().max() < 1e-4
    assert (symmetric != 0).all() and torch.equal(symmetric, -symmetric.flip(0))


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match="int4"):
        codebook("int4")


# --- the search ------------------------------------------------------------------------------------------------------


def awkward_values(values: Tensor) -> np.ndarray:
    """All exact midpoints and their fp32 neighbours, the ends of all cells, zeros, denormals: fp32 [n], finite."""
    rising = np.sort(values.numpy().astype(np.float64))
    midpoints = ((rising[:-1] + rising[1:]) / 2).astype(np.float32)
    around = [np.nextafter(midpoints, np.float32(side)) for side in (-np.inf, np.inf)]
    cells = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = np.concatenate([cells, cells | 0xFFFF]).view(np.float32)
    special = np.array([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.0000001, -1.0000001, 3.4e38, -3.4e38], dtype=np.float32)
    everything = np.concatenate([midpoints, *around, ends, special, values.numpy()])
    return everything[np.isfinite(everything)]


def random_values(count: int = 2_000_000) -> np.ndarray:
    """Half of them uniform in [-1, 1], half spread evenly over twelve decades: fp32 [count]."""
    random = np.random.default_rng(0)
    uniform = random.uniform(-1, 1, count // 2)
    decades = 10 ** random.uniform(-12, 0, count // 2) * random.choice([-1, 1], count // 2)
    return np.concatenate([uniform, decades]).astype(np.float32)


def rank_down(rising: np.ndarray, x: np.ndarray) -> np.ndarray:
    """bitsandbytes' rule for 4 bits: how many fp32-rounded midpoints lie below x."""
    return np.searchsorted((rising[:-1] + rising[1:]) / np.float32(2), x, side="left")


def rank_even(rising: np.ndarray, x: np.ndarray) -> np.ndarray:
    """CUDA's rule for 8 bits: the nearest entry, of two equally near ones that with the even index.

    The distances to the two neighbours are differences of fp32 numbers, taken in float64. Near a tie the three numbers
    have about the same size, so these differences are exact there, and elsewhere their rounding cannot matter.
    """
    wide, x = rising.astype(np.float64), x.astype(np.float64)
    below = np.clip(np.searchsorted(wide, x, side="right") - 1, 0, len(wide) - 1)
    above = np.clip(below + 1, 0, len(wide) - 1)
    to_below, to_above = np.abs(x - wide[below]), np.abs(wide[above] - x)
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.where(up, above, below)


@pytest.mark.parametrize("name", ["nf4", "signed", "unsigned"])
@pytest.mark.parametrize("ties", ["down", "even"])
def test_search_equals_float64_search(name: str, ties: str):
    values = CODEBOOKS[name]
    x = np.concatenate([awkward_values(values), random_values()])
    ours = NearestCode(values, ties)(torch.from_numpy(x)).numpy()
    theirs = {"down": rank_down, "even": rank_even}[ties](values.numpy(), x)
    wrong = np.flatnonzero(ours != theirs)
    assert len(wrong) == 0, [(x[i].item(), ours[i].item(), theirs[i].item()) for i in wrong[:5]]


def test_fp4_search_equals_float64_search():
    """FP4 codes are not in order of value, and two of them mean zero: so the values are compared."""
    values = CODEBOOKS["fp4"]
    x = np.concatenate([awkward_values(values), random_values()])
    ours = values[NearestCode(values, "down")(torch.from_numpy(x)).int()].numpy()
    rising = np.sort(values.numpy())
    np.testing.assert_array_equal(ours, rising[rank_down(rising, x)])


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_ties_exist_on_both_sides(name: str):
    """Guards the test above: midpoints that fp32 can represent do follow both an odd and an even entry."""
    exact = (CODEBOOKS[name][:-1].double() + CODEBOOKS[name][1:].double()) / 2
    tied = torch.nonzero(exact.float().double() == exact).flatten()
    assert {index.item() % 2 for index in tied} == {0, 1}
    codes = NearestCode(CODEBOOKS[name], "even")(exact[tied].float())
    assert (codes % 2 == 0).all()
    assert torch.equal(NearestCode(CODEBOOKS[name], "down")(exact[tied].float()), tied.to(torch.uint8))


@pytest.mark.parametrize("n", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_any_length(n: int):
    """The search runs chunk by chunk; a chunk's end must not show."""
    x = torch.rand(n) * 2 - 1
    np.testing.assert_array_equal(
        nearest_dynamic(True, x.device)(x).numpy(), rank_even(dynamic_map(True).numpy(), x.numpy())
    )


def test_cached_searches_use_the_right_table_and_rule():
    cpu = torch.device("cpu")
    for name in ("nf4", "fp4"):
        x = torch.from_numpy(awkward_values(CODEBOOKS[name]))
        assert torch.equal(nearest_4bit(name, cpu)(x), NearestCode(CODEBOOKS[name], "down")(x))
    for signed in (True, False):
        x = torch.from_numpy(awkward_values(dynamic_map(signed)))
        assert torch.equal(nearest_dynamic(signed, cpu)(x), NearestCode(dynamic_map(signed), "even")(x))


def test_codebook_in_any_order():
    """A shuffled codebook gives the same values back, through the codes of its own order."""
    values = dynamic_map(True)
    shuffled = values[torch.randperm(256)]
    x = torch.from_numpy(random_values(100_000))
    ours = shuffled[NearestCode(shuffled, "down")(x).int()]
    assert torch.equal(ours, values[NearestCode(values, "down")(x).int()])


def test_too_fine_codebook_is_refused():
    """Two midpoints in one cell cannot be told apart by one comparison."""
    with pytest.raises(ValueError, match="too fine"):
        NearestCode(torch.linspace(0.999, 1.0, 256), "even")


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    # Multiples of 1/128: then midpoints are multiples of 1/256 and no two share a cell, and ties are common.
    values=st.lists(st.integers(-128, 128), min_size=2, max_size=256, unique=True),
    x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50),
    ties=st.sampled_from(["down", "even"]),
)
def test_any_codebook(values: list[int], x: list[float], ties: str):
    rising = torch.tensor(sorted(values)) / 128
    x_n = torch.cat([torch.tensor(x), (rising[:-1] + rising[1:]) / 2, rising])
    theirs = {"down": rank_down, "even": rank_even}[ties](rising.numpy(), x_n.numpy())
    np.testing.assert_array_equal(NearestCode(rising, ties)(x_n).numpy(), theirs)
