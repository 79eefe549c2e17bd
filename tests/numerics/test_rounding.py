"""Rounding to fewer bits against torch's casts, exact fractions, Random123's published vectors and the book's figures.

The number of random words (of 2^32) that round a value up is found by a binary search, since more is never less. So
"unbiased" is an equation between fractions here; a sample of draws then only has to show that the words are used.
"""

import math
from collections.abc import Callable
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.numerics import FORMATS, round_decimal, round_nearest, rounding_walk, stochastic_round, truncate
from minift.numerics.rounding import CHUNK, floor_quanta, philox, random_words

DTYPES = [torch.bfloat16, torch.float16]
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}
WORDS = 2**32


def pattern(x: Tensor) -> Tensor:
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()])


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every pattern of a 16-bit type."""
    return torch.arange(1 << 16).to(torch.int16).view(dtype)


def between_all_neighbours(dtype: torch.dtype) -> Tensor:
    """fp32 values within every gap between finite neighbours, both signs: near both ends, tie, quarter."""
    finite = all_numbers(dtype)[: 0x7F80 if dtype == torch.bfloat16 else 0x7C00].double()
    gap = finite.diff()
    inside = [finite[:-1] + gap * part for part in (2**-9, 0.25, 0.5, 1 - 2**-9)]
    values = torch.cat(inside).float()
    return torch.cat([values, -values])


def with_word(x: Tensor, word: int, dtype: torch.dtype) -> Tensor:
    """Round with a chosen random word."""
    return floor_quanta(x, torch.tensor(word), dtype)


def towards_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The neighbour nearer to zero, from torch's cast to the nearest."""
    nearest = x.to(dtype)
    above = nearest.double().abs() > x.double().abs()
    return torch.where(above, (pattern(nearest) - 1).view(dtype), nearest)  # patterns grow with the magnitude


# --- truncating, rounding to nearest ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_truncation_takes_the_neighbour_towards_zero(dtype: torch.dtype):
    for x in (between_all_neighbours(dtype), torch.randn(10_000), torch.randn(10_000) * 1e-6):
        ours = truncate(x, dtype)
        assert ours.dtype == dtype
        assert torch.equal(pattern(ours), pattern(towards_zero(x, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_truncation_stops_at_the_largest_number(dtype: torch.dtype):
    """IEEE's rounding towards zero: nothing finite becomes infinite."""
    x = torch.tensor([LARGEST[dtype], 3.4028e38, -3.4028e38, math.inf, -math.inf])
    assert truncate(x, dtype).tolist() == [LARGEST[dtype]] * 2 + [-LARGEST[dtype], math.inf, -math.inf]
    assert truncate(torch.tensor([math.nan]), dtype).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_against_integer_arithmetic(dtype: torch.dtype):
    """floats.py computes the pattern without any cast. A word of a half is rounding to nearest, too, ties apart."""
    x = between_all_neighbours(dtype)
    ours = round_nearest(x.reshape(2, -1), dtype)
    assert ours.dtype == dtype and ours.shape == (2, len(x) // 2)
    encode = FORMATS[str(dtype).removeprefix("torch.")].encode
    some = slice(None, None, 17)
    assert [p & 0xFFFF for p in pattern(ours).reshape(-1)[some].tolist()] == [encode(v) for v in x[some].tolist()]
    low = towards_zero(x, dtype).double()
    high = (pattern(towards_zero(x, dtype)) + 1).view(dtype).double()
    tie = 2 * x.double() == low + high
    assert torch.equal(with_word(x, 2**31, dtype)[~tie], ours.reshape(-1)[~tie])


@settings(deadline=None, derandomize=True, max_examples=300)
@given(x=st.floats(width=32, allow_nan=False), dtype=st.sampled_from(DTYPES))
def test_truncation_of_any_number(x: float, dtype: torch.dtype):
    ours = truncate(torch.tensor([x]), dtype).item()
    assert abs(ours) <= abs(x) and math.copysign(1, ours) == math.copysign(1, x)
    if abs(x) <= LARGEST[dtype]:
        assert torch.equal(torch.tensor([ours]), towards_zero(torch.tensor([x]), dtype).float())


# --- stochastic rounding, word by word --------------------------------------------------------------------------------


def words_that_go_up(x: float, dtype: torch.dtype) -> int:
    """How many of the 2^32 random words round x away from zero."""
    value, low = torch.tensor([x]), with_word(torch.tensor([x]), 0, dtype)
    first, end = 0, WORDS  # the smallest word that goes up lies in [first, end]
    while first < end:
        middle = (first + end) // 2
        if torch.equal(with_word(value, middle, dtype), low):
            first = middle + 1
        else:
            end = middle
    return WORDS - first


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    dtype=st.sampled_from(DTYPES),
    fraction=st.integers(0, 2**23 - 1),
    exponent=st.integers(-149, 127),
    sign=st.sampled_from([1, -1]),
)
def test_expected_value_is_exact(dtype: torch.dtype, fraction: int, exponent: int, sign: int):
    """low x P(low) + high x P(high) = x as fractions, down to 2^-33 in fp16; below, less than 2^-56 is lost."""
    x = sign * math.ldexp(1 + fraction / 2**23, exponent)
    x = float(torch.tensor(x))  # fp32 subnormals
    if abs(x) > LARGEST[dtype]:
        return
    up = words_that_go_up(x, dtype)
    low, high = (with_word(torch.tensor([x]), word, dtype).item() for word in (0, WORDS - 1))
    expected = Fraction(low) + (Fraction(high) - Fraction(low)) * Fraction(up, WORDS)
    if dtype == torch.bfloat16 or abs(x) >= 2**-33:
        assert expected == Fraction(x)
    else:
        assert 0 <= sign * (Fraction(x) - expected) < Fraction(1, 2**56)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", [0, 1, 2**31 - 1, 2**31, 0xDEADBEEF, 2**32 - 1])
def test_result_is_a_neighbour(dtype: torch.dtype, word: int):
    x = between_all_neighbours(dtype)
    low = towards_zero(x, dtype)
    high = (pattern(low) + 1).view(dtype)
    ours = with_word(x, word, dtype)
    assert ((pattern(ours) == pattern(low)) | (pattern(ours) == pattern(high))).all()
    assert torch.equal(pattern(with_word(-x, word, dtype)), pattern(-ours)), "the sign plays no part"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", [0, 12345, 2**31, 2**32 - 1])
def test_representable_values_stay(dtype: torch.dtype, word: int):
    """All of them, subnormals, both zeros and infinities included. NaN keeps all its bits but becomes quiet."""
    numbers = all_numbers(dtype)
    ours = with_word(numbers.float(), word, dtype)
    nan = numbers.isnan()
    assert torch.equal(pattern(ours)[~nan], pattern(numbers)[~nan])
    # Two patterns of fp32 made here, since torch's own widening of a NaN may change it.
    dropped = 16 if dtype == torch.bfloat16 else 13
    wide = 0x7F800000 | ((pattern(numbers)[nan].int() & (0x7F if dtype == torch.bfloat16 else 0x3FF)) << dropped)
    wide |= (pattern(numbers)[nan].int() < 0).int() << 31
    quiet = 0x40 if dtype == torch.bfloat16 else 0x200
    assert torch.equal(pattern(with_word(wide.view(torch.float32), word, dtype)), pattern(numbers)[nan] | quiet)


@pytest.mark.parametrize("word", [0, 2**31, 2**32 - 1])
def test_nan_with_a_payload_below_the_cut_stays_nan(word: int):
    x = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES:
        assert with_word(x, word, dtype).isnan().all()
        assert truncate(x, dtype).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", [0, 2**31, 2**32 - 1])
def test_beyond_the_largest_number_as_nearest(dtype: torch.dtype, word: int):
    largest = torch.tensor(LARGEST[dtype])
    tie = largest + largest * (2.0**-9 if dtype == torch.bfloat16 else 2.0**-12) / (2 - torch.finfo(dtype).eps) * 2
    around = [torch.nextafter(tie, torch.tensor(end)) for end in (0.0, math.inf)]
    next_up = torch.nextafter(largest, torch.tensor(math.inf))
    x = torch.stack([next_up, *around, tie, torch.tensor(3.4028e38)])
    assert x[1].to(dtype).isfinite() and x[3].to(dtype).isinf(), "this is the tie"
    for values in (x, -x):
        assert torch.equal(with_word(values, word, dtype), values.to(dtype))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20),
    word=st.integers(0, WORDS - 1),
    dtype=st.sampled_from(DTYPES),
    close=st.booleans(),
)
def test_monotone_for_the_same_word(values: list[float], word: int, dtype: torch.dtype, close: bool):
    """Positive values in order, spread or next to each other (also across powers of two), stay in order."""
    x = torch.tensor(values).abs()
    if close:
        x = (pattern(x[:1]).long() + torch.arange(-5000, 5000, 37)).clamp(0, 0x7F800000).int().view(torch.float32)
    rounded = with_word(x.sort().values, word, dtype).float()
    assert (rounded[1:] >= rounded[:-1]).all()


# --- the public function and its operator -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "x", [1.001, -3.1415, 65000.7, 3.33e-5, -(2**-24) / 3, 2**-24 * 5.3, 1e-3], ids=lambda x: f"{x:.3g}"
)
def test_mean_of_many_draws(dtype: torch.dtype, x: float):
    """200,000 draws: the mean lies within 6 standard errors, gap x sqrt(p (1 - p) / draws), of x."""
    value = torch.tensor(x).expand(200_000)
    exact = value[0].double()
    generator = torch.Generator().manual_seed(3)
    draws = stochastic_round(value, dtype, generator).double()
    low, high = draws.min(), draws.max()
    assert high > low, "both neighbours occur"
    p = (exact - low) / (high - low)
    error = (high - low) * (p * (1 - p) / len(draws)).sqrt()
    assert (draws.mean() - exact).abs() <= 6 * error


def test_a_small_update_gets_through():
    """The example of the module: 1 + 1000 x 0.001 in bf16. Nearest stays at 1. Chance: 2 within 6 sigma.

    A step's error has a variance of at most (gap / 2)^2 with gap 2^-7, so a weight after 1000 steps has a standard
    deviation of at most sqrt(1000) / 2 x 2^-7 = 0.124, and the mean of 2000 weights 1/sqrt(2000) of that.
    """
    weights, stuck = torch.ones(2000).bfloat16(), torch.ones(1).bfloat16()
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        weights = stochastic_round(weights.float() + 0.001, torch.bfloat16, generator)
        stuck = round_nearest(stuck.float() + 0.001, torch.bfloat16)
    assert stuck.item() == 1.0
    assert abs(weights.double().mean().item() - 2.0) < 6 * 0.124 / math.sqrt(2000)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_element_e_takes_word_e(dtype: torch.dtype, n: int):
    """Whatever the size of the tensor and the chunks it is worked through in."""
    x, seed = torch.randn(n), 77
    ours = torch.ops.minift.stochastic_round(x, dtype, seed)
    assert ours.dtype == dtype and ours.shape == (n,)
    for e in {0, 1, 2, 3, 4, n // 2, CHUNK - 1, CHUNK, CHUNK + 5, n - 1} & set(range(n)):
        counter = [torch.tensor([word]) for word in (e // 4, 0, 0, 0)]
        word = philox(counter, (seed, 0))[e % 4]
        assert torch.equal(ours[e : e + 1], floor_quanta(x[e : e + 1], word, dtype)), e


VIEWS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(70, 33).T,
    "every second": lambda: torch.randn(999)[::2],
    "expanded": lambda: torch.randn(1, 64).expand(9, 64),
    "one value": lambda: torch.randn(1).expand(100),
    "scalar": lambda: torch.randn(()),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_counted_in_logical_order(view: str):
    x = VIEWS[view]()
    ours = torch.ops.minift.stochastic_round(x, torch.bfloat16, 5)
    assert ours.shape == x.shape and ours.is_contiguous()
    assert torch.equal(ours, torch.ops.minift.stochastic_round(x.contiguous(), torch.bfloat16, 5))
    assert torch.equal(truncate(x, torch.bfloat16), truncate(x.contiguous(), torch.bfloat16))


def test_seeds():
    """The same generator state gives the same result; each call, each of the key's words, other random numbers."""
    x = torch.randn(1000)

    def draw(seed: int) -> Tensor:
        return stochastic_round(x, torch.bfloat16, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    generator = torch.Generator().manual_seed(1)
    first = stochastic_round(x, torch.bfloat16, generator)
    assert torch.equal(first, draw(1)) and not torch.equal(first, stochastic_round(x, torch.bfloat16, generator))
    torch.manual_seed(9)
    default = stochastic_round(x, torch.bfloat16)
    assert not torch.equal(default, stochastic_round(x, torch.bfloat16))
    torch.manual_seed(9)
    assert torch.equal(default, stochastic_round(x, torch.bfloat16))
    operator = torch.ops.minift.stochastic_round
    assert not torch.equal(operator(x, torch.bfloat16, 1), operator(x, torch.bfloat16, 1 + 2**32))
    assert torch.equal(random_words(0, 8, -1), random_words(0, 8, 2**64 - 1))


def test_no_gradient_and_no_change_of_the_input():
    x = torch.randn(100, requires_grad=True)
    kept = x.detach().clone()
    for ours in (stochastic_round(x, torch.bfloat16), truncate(x, torch.bfloat16), round_nearest(x, torch.bfloat16)):
        assert not ours.requires_grad
    assert torch.equal(x, kept)


@pytest.mark.parametrize("shape", [(64, 65), (33,), (0,), ()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_passes_opcheck(shape: tuple[int, ...], dtype: torch.dtype):
    """Schema, fake tensor and tracing with fixed and symbolic shapes, also of a view."""
    for x in (torch.randn(shape), torch.randn((*shape, 2))[..., 0]):
        torch.library.opcheck(torch.ops.minift.stochastic_round.default, (x, dtype, 123))


@pytest.mark.parametrize("round_to", [truncate, round_nearest, stochastic_round])
def test_other_types_are_refused(round_to: Callable[[Tensor, torch.dtype], Tensor]):
    for x in (torch.ones(3).double(), torch.ones(3).half(), torch.ones(3).int()):
        with pytest.raises(ValueError, match=str(x.dtype)):
            round_to(x, torch.bfloat16)
    for dtype in (torch.float32, torch.float8_e4m3fn, torch.int8):
        with pytest.raises(ValueError, match=str(dtype)):
            round_to(torch.ones(3), dtype)


# --- random words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter: tuple[int, ...], key: tuple[int, int], wanted: tuple[int, ...]):
    """Random123's known answers for Philox4x32-10 (kat_vectors)."""
    ours = philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in ours) == wanted


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """The rounds of the paper with Python's integers."""
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b % WORDS, a >> 32 ^ counter[3] ^ key[1], a % WORDS]
        key = [(key[0] + 0x9E3779B9) % WORDS, (key[1] + 0xBB67AE85) % WORDS]
    return counter


@settings(deadline=None, derandomize=True, max_examples=100)
@given(first=st.integers(0, 2**60), n=st.integers(0, 9), seed=st.integers(0, 2**64 - 1))
def test_words_of_any_place_and_seed(first: int, n: int, seed: int):
    """Far beyond 2^34 elements, where the counter needs its second word."""
    first -= first % 4
    key = [seed % WORDS, seed // WORDS]
    wanted = [philox_in_python([e // 4 % WORDS, e // 4 // WORDS, 0, 0], key)[e % 4] for e in range(first, first + n)]
    assert random_words(first, n, seed - 2**64 * (seed >> 63)).tolist() == wanted


# --- decimal places ---------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=300)
@given(x=st.floats(-1000, 1000), decimals=st.integers(0, 6))
def test_decimals_against_python(x: float, decimals: int):
    """float64 against decimal. x * 10^d <= 10^9 is rounded, an error below 1e-6: that near a border either is right."""
    place = Decimal(1).scaleb(-decimals)
    scaled = Decimal(x).scaleb(decimals)
    for mode, rounding, border in (("down", ROUND_FLOOR, Decimal(0)), ("nearest", ROUND_HALF_EVEN, Decimal("0.5"))):
        if abs(scaled - border - (scaled - border).to_integral_value()) > Decimal("1e-6"):
            ours = round_decimal(torch.tensor(x, dtype=torch.float64), decimals, mode)
            assert ours.dtype == torch.float64 and ours.item() == float(Decimal(x).quantize(place, rounding))


def test_decimals_by_chance():
    """0.12342 to three places: 0.124 in 42 of 100 draws, within 6 sigma of 100,000, else 0.123."""
    x = torch.full((100_000,), 0.12342, dtype=torch.float64)
    ours = round_decimal(x, 3, "stochastic", torch.Generator().manual_seed(1))
    assert set(ours.tolist()) == {0.123, 0.124}
    up = (ours == 0.124).double().mean().item()
    assert abs(up - 0.42) < 6 * math.sqrt(0.42 * 0.58 / 100_000)
    assert torch.equal(ours, round_decimal(x, 3, "stochastic", torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("mode", ["down", "nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_lies_on_the_grid_stays(mode: str, dtype: torch.dtype):
    """Where the book's formula has 0 / 0. Eighths to three places are exact, so is what 10^3 makes of them."""
    x = torch.arange(-100, 100, dtype=dtype) / 8
    assert torch.equal(round_decimal(x, 3, mode), x)
    assert torch.get_default_dtype() == torch.float32


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="down, nearest, stochastic"):
        round_decimal(torch.ones(1), 3, "truncate")


def four_digits(values: Tensor) -> list[float]:
    return [float(f"{value:.4f}") for value in values.tolist()]


def test_book_stochastic_10k():
    """Figure stochastic_10k: end values for 3, 4, 5, 6, 7 decimals after 10,000 updates with lr 5e-3."""
    walk = rounding_walk(10_000, 5e-3)
    assert f"{walk['exact'][0]:.5f}" == "0.33669"
    assert torch.equal(walk["down"][0], walk["exact"][0].expand(5))
    assert four_digits(walk["down"][-1]) == [-4.2350, 0.2762, 0.7298, 0.7749, 0.7794]
    assert four_digits(walk["stochastic"][-1]) == [0.7210, 0.7786, 0.7791, 0.7798, 0.7797]
    assert walk["down"].shape == walk["stochastic"].shape == (10_001, 5) and walk["exact"].shape == (10_001,)


@pytest.mark.slow
def test_book_stochastic_100k():
    """Figure stochastic_100k: the same after 100,000 updates with lr 5e-5."""
    walk = rounding_walk(100_000, 5e-5)
    assert [float(f"{value:.5g}") for value in walk["down"][-1, :2].tolist()] == [-49.138, -4.6795]
    assert four_digits(walk["down"][-1, 2:]) == [-0.1777, 0.2734, 0.3182]
    assert four_digits(walk["stochastic"][-1]) == [0.3380, 0.3346, 0.3238, 0.3222, 0.3220]


def test_rounding_down_drifts_by_half_a_unit():
    """Minus half of 10^-3 a step, within 6 sigma of a uniform loss (10^-3 / sqrt(12) a step)."""
    walk = rounding_walk(10_000, 5e-3, decimals=[3])
    drift = (walk["down"][-1, 0] - walk["exact"][-1]).item()
    assert abs(drift + 10_000 * 0.5e-3) < 6 * 1e-3 / math.sqrt(12) * math.sqrt(10_000)
