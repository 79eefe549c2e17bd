"""Rounding a number to fewer bits: cut, to the nearest, or by chance.

A value between two neighbours of the coarser type, in units of their distance (the quantum), is k + f with 0 <= f < 1:

    truncate            k                               always towards zero
    round to nearest    k or k + 1, the nearer one      error at most half a quantum
    stochastic          k + 1 with probability f        error up to a quantum, but 0 on average

Why chance helps: a weight of 1.0 in bfloat16 has its neighbour at 1.0078. Updates of 0.001 are less than half of that,
so rounding to nearest gives 1.0 back after every step and the weight never moves, while stochastic rounding goes up
about once in eight steps and is right on average. `rounding_walk` shows the effect with decimal places.

With a uniform random number u = word / 2^32 in [0, 1) all of it is one formula, done in integers with |x| as a fixed
point number:

    floor(|x| / quantum + u)        u = 0 truncates; a random u rounds up with probability f; the sign is put back

In bfloat16 this adds 16 random bits below the cut and cuts. In float16 a normal number loses 13 bits; below 2^-14 the
quantum stays at 2^-24, so smaller numbers lose more. All 32 bits of the word are used there: the probability is exact
down to |x| = 2^-33, and below that it is cut to a multiple of 2^-32, an average error of less than 2^-56.

Beyond the largest finite number there is no second finite neighbour. Chance would turn a weight that is just above it
into infinity sooner or later, and one infinite weight ends a training run, so such values are rounded to nearest:
infinity only from half a quantum on. A value that the type can represent never changes, infinity included. NaN stays
NaN, with its sign and the upper bits of its payload.

The random words are those of Philox4x32-10, a function of a counter and a key with nothing to carry along: element e
takes word e % 4 of counter e // 4, the key is the seed. So any element can be computed anywhere, and the Triton kernel
gives the same bits as this file. Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# For each target: dropped fraction bits, fp32 pattern of its largest finite number, its patterns of infinity and of the
# quiet bit.
TARGETS = {
    torch.bfloat16: (16, 0x7F7F0000, 0x7F80, 0x0040),
    torch.float16: (13, 0x477FE000, 0x7C00, 0x0200),
}
MODES = ("down", "nearest", "stochastic")
CHUNK = 1 << 15  # elements rounded at a time, so that the int64 temporaries stay in a level-2 cache; a multiple of 4


def truncate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cut the bits that do not fit: the neighbour nearer to zero; finite values never become infinite.

    Args:
        x: fp32, any shape.
        dtype: torch.bfloat16 or torch.float16, that of the result.
    """
    _check(x, dtype)
    largest = torch.finfo(dtype).max
    finite = torch.where(x.isinf(), x, x.detach().clamp(-largest, largest))
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    return floor_quanta(finite.reshape(-1), zero, dtype).view(x.shape)


def round_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearer neighbour, ties to the even one: what `x.to(dtype)` does. Arguments as in `truncate`."""
    _check(x, dtype)
    return x.detach().to(dtype)


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """One of the two neighbours by chance, so that the expected value is x. No gradient flows.

    Args:
        x: fp32, any shape.
        dtype: torch.bfloat16 or torch.float16, that of the result.
        generator: where the 63-bit seed is drawn; None is torch's default generator of the CPU. A seed gives the same
            result on every device.
    """
    _check(x, dtype)
    device = generator.device if generator is not None else "cpu"
    seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
    return torch.ops.minift.stochastic_round(x.detach(), dtype, int(seed))


def _check(x: Tensor, dtype: torch.dtype) -> None:
    if dtype not in TARGETS:
        raise ValueError(f"cannot round to {dtype}: choose torch.bfloat16 or torch.float16")
    if x.dtype != torch.float32:
        raise ValueError(f"rounding starts from torch.float32, got {x.dtype}: call .float() first")


def floor_quanta(x_n: Tensor, word_n: Tensor, dtype: torch.dtype) -> Tensor:
    """floor(|x| / quantum + word / 2^32) quanta with the sign of x: fp32 [n], int64 [n] or [] -> `dtype` [n]."""
    dropped, largest, infinity, quiet = TARGETS[dtype]
    pattern = x_n.view(torch.int32).long()
    sign, magnitude = (pattern >> 16) & 0x8000, pattern & 0x7FFFFFFF
    # 2^31 is a half: rounding to nearest. What is at least half a quantum too large becomes infinite.
    word_n = torch.where(magnitude > largest, 1 << 31, word_n)
    quanta = _quanta_of_float16(magnitude) if dtype == torch.float16 else magnitude << (32 - dropped)
    rounded = ((quanta + word_n) >> 32).clamp(max=infinity)
    nan = infinity | quiet | ((magnitude & 0x7FFFFF) >> dropped)
    result = sign | torch.where(magnitude > 0x7F800000, nan, rounded)
    return result.to(torch.int16).view(dtype)


def _quanta_of_float16(magnitude: Tensor) -> Tensor:
    """fp32 patterns without sign -> float16 patterns with 32 more bits behind the point, cut below."""
    exponent = magnitude >> 23
    normal = (magnitude - ((127 - 15) << 23)) << (32 - 13)
    # |x| / 2^-24 = significand x 2^(exponent - 126): shifted left by up to 18, or right, and at last out of sight.
    significand = (magnitude & 0x7FFFFF) | 0x800000
    shift = exponent - (126 - 32)
    subnormal = (significand << shift.clamp(0, 18)) >> (-shift).clamp(0, 24)
    return torch.where(exponent > 127 - 15, normal, subnormal)


# --- random words -----------------------------------------------------------------------------------------------------


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four random words for each counter.

    Args:
        counter: four int64 tensors that hold 32-bit words, the lowest first.
        key: two 32-bit words, the lower first.

    Returns:
        four int64 tensors of the shape of the counter, each value in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap around, which leaves all 64 bits of the unsigned product in place.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = _high(product2) ^ c1 ^ k0, _low(product2), _high(product0) ^ c3 ^ k1, _low(product0)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _low(product: Tensor) -> Tensor:
    return product & 0xFFFFFFFF


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & 0xFFFFFFFF


def random_words(first: int, n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The random words of elements first .. first + n - 1, int64 [n], each in [0, 2^32).

    Args:
        first: a multiple of 4.
        seed: 64 bits; a negative one counts as seed + 2^64.
    """
    counter = torch.arange(first // 4, (first + n + 3) // 4, device=device)
    zero = torch.zeros_like(counter)
    words = philox([_low(counter), _high(counter), zero, zero], (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return torch.stack(words, dim=1).view(-1)[:n]


# --- the operator: the body below is the reference and the CPU path; a CUDA tensor goes to the Triton kernel --------

# Defined with torch.library's plain functions: `custom_op` would import the compiler (1.5 s, 150 MB) at the first call.
torch.library.define("minift::stochastic_round", "(Tensor x, ScalarType dtype, int seed) -> Tensor")


@torch.library.impl("minift::stochastic_round", "default")
def _stochastic_round(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """x fp32 -> the same shape in `dtype`; elements are counted in row-major order."""
    x_n = x.reshape(-1)
    out_n = x.new_empty(len(x_n), dtype=dtype)
    for start in range(0, len(x_n), CHUNK):
        chunk = x_n[start : start + CHUNK]
        out_n[start : start + CHUNK] = floor_quanta(chunk, random_words(start, len(chunk), seed, x.device), dtype)
    return out_n.view(x.shape)


@torch.library.impl("minift::stochastic_round", "cuda")
def _stochastic_round_cuda(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    from minift_kernels.rounding import stochastic_round

    return stochastic_round(x.contiguous(), dtype, seed)


@torch.library.register_fake("minift::stochastic_round")
def _stochastic_round_fake(x, dtype, seed):
    return x.new_empty(x.shape, dtype=dtype)


# --- decimal places ---------------------------------------------------------------------------------------------------


def round_decimal(x: Tensor, decimals: int, mode: str, generator: torch.Generator | None = None) -> Tensor:
    """Round to a number of decimal places, in the arithmetic of x: the same idea where it can be read.

    Args:
        x: floating point, any shape, small enough for x * 10^decimals to be finite.
        decimals: places behind the point.
        mode: "down" takes the floor (the book calls it truncation; below zero it moves away from zero), "nearest" the
            nearer neighbour, ties to even, "stochastic" the upper one with a probability of (x - floor) / (ceil -
            floor). A value that lies on the grid stays.
        generator: for "stochastic"; draws one uniform number for each element, on the device of x.
    """
    if mode not in MODES:
        raise ValueError(f"unknown rounding mode {mode!r}: choose one of {', '.join(MODES)}")
    scale = torch.tensor(10.0**decimals, dtype=x.dtype, device=x.device)
    if mode == "nearest":
        return (x * scale).round() / scale
    if mode == "down":
        return (x * scale).floor() / scale
    return _up_by_chance(x, scale, torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device))


def _up_by_chance(x: Tensor, scale: Tensor, draw: Tensor) -> Tensor:
    down, up = (x * scale).floor() / scale, (x * scale).ceil() / scale
    # draw <= (x - down) / (up - down) would be 0 / 0 on the grid. There up equals down, and either will do.
    probability = (x - down) / (up - down).where(up > down, 1.0)
    return torch.where(draw <= probability, up, down)


def rounding_walk(
    updates: int, lr: float, decimals: Sequence[int] = (3, 4, 5, 6, 7), seed: int = 42
) -> dict[str, Tensor]:
    """One weight under random updates, rounded after each: rounding down drifts, rounding by chance does not.

    All walks start at the same normal number and add lr times the same normal updates. Going down loses half a unit of
    the last place a step on average. The draws are those of the book's figures: start, updates, then one uniform number
    for each step of each walk, the walks that round down (which ignore theirs) first.

    Returns:
        "exact": fp32 [updates + 1], the weight in fp32 without further rounding, its start first; "down" and
        "stochastic": fp32 [updates + 1, len(decimals)].
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, generator=generator)
    step_n = lr * torch.randn(updates, generator=generator)
    draws = torch.rand(2, len(decimals), updates, generator=generator)
    scale = torch.tensor([10.0**d for d in decimals])
    exact, down, stochastic = [start], [start.expand(len(decimals))], [start.expand(len(decimals))]
    for step, draw in zip(step_n, draws[1].T.contiguous(), strict=True):
        exact.append(exact[-1] + step)
        down.append(((down[-1] + step) * scale).floor() / scale)
        stochastic.append(_up_by_chance(stochastic[-1] + step, scale, draw))
    return {"exact": torch.cat(exact), "down": torch.stack(down), "stochastic": torch.stack(stochastic)}
