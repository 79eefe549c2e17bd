"""e10: statistics with known odds. Each accepts what lies within 6.5 standard deviations: wrong once in 10^10 draws."""

import torch

from minift.course.spec import Case, check

SIGMAS = 6.5
BF16 = torch.bfloat16


def from_pattern(pattern: torch.Tensor) -> torch.Tensor:
    """The float32 numbers with these bits."""
    return torch.where(pattern >= 1 << 31, pattern - (1 << 32), pattern).to(torch.int32).view(torch.float32)


def fresh(draw: torch.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(0, 1 << 40, (1,), generator=draw)))


def wrong_kind(answer, shape) -> str | None:
    if not isinstance(answer, torch.Tensor):
        return f"the answer is {type(answer).__name__}, expected a bfloat16 tensor"
    if answer.dtype != BF16 or answer.shape != shape:
        return f"the answer is {answer.dtype} of shape {tuple(answer.shape)}, expected bfloat16 of shape {tuple(shape)}"
    return None


def wrong_odds(answer, upper: torch.Tensor, low: torch.Tensor, repeats: int) -> str | None:
    """Row i holds one number: the bfloat16 pattern upper[i] and low[i] / 65536 of the way to the next."""
    if said := wrong_kind(answer, (len(upper), repeats)):
        return said
    down, up = (from_pattern(pattern << 16).unsqueeze(1) for pattern in (upper, upper + 1))
    is_up, is_down = answer.float() == up, answer.float() == down
    odd = ~(is_up | is_down)
    if odd.any():
        row, column = (int(i) for i in odd.nonzero()[0])
        got, pair = float(answer[row, column]), (float(down[row]), float(up[row]))
        return f"y[{row}, {column}] is {got:.6g}, which is neither of the neighbours {pair[0]:.6g} and {pair[1]:.6g}"
    for row, count in enumerate(is_up.sum(1).tolist()):
        chance = int(low[row]) / 65536
        mean, sigma = repeats * chance, (repeats * chance * (1 - chance)) ** 0.5
        if abs(count - mean) > SIGMAS * sigma:
            x = float(from_pattern((upper[row] << 16) + low[row]))
            return (
                f"x = {x:.6g} is {100 * chance:.1f} % of the way from {float(down[row]):.6g} to {float(up[row]):.6g}, "
                f"but {count} of {repeats} went there, expected {mean:.0f} +- {sigma:.0f}"
            )
    return None


@check(points=1)
def exact_ones_stay(draw):
    """A number that bfloat16 has stays what it is, every time: zero, small, large and negative ones."""
    pattern = torch.randint(0, 0x7F80, (9, 31), generator=draw)
    pattern[0, :6] = torch.tensor([0, 1, 0x7F, 0x80, 0x3F80, 0x7F7F])
    pattern[1::2] += 0x8000
    x = from_pattern(pattern << 16)
    given = {"x": x, "generator": fresh(draw)}
    yield Case("stochastic_round", given, x.to(BF16), about="numbers whose lower 16 bits are zero")
    yield Case("stochastic_round", {"x": x.T, "generator": fresh(draw)}, x.T.to(BF16), about="the same, transposed")


@check(points=1)
def right_on_average(draw):
    """Both neighbours come as often as they should, for both signs and every size."""
    repeats = 2003
    for sign, about in ((0, "positive"), (0x8000, "negative")):
        # Subnormal, tiny, around 1, huge; the share of the way is near 1/8, 2/8, ... 7/8.
        exponent = torch.tensor([0, 20, 117, 127, 128, 140, 230])
        upper = exponent * 128 + torch.randint(0, 127, (7,), generator=draw) + sign
        low = (torch.arange(7) + 1) * 8192 + torch.randint(-2000, 2000, (7,), generator=draw)
        x = from_pattern((upper << 16) + low).unsqueeze(1).repeat(1, repeats)
        yield Case(
            "stochastic_round",
            {"x": x, "generator": fresh(draw)},
            accept=lambda answer, upper=upper, low=low: wrong_odds(answer, upper, low, repeats),
            about=f"7 {about} numbers of all sizes, {repeats} times each",
        )


def wrong_together(answer, down: float, shape: tuple[int, int]) -> str | None:
    """Half-way numbers everywhere: two places agree half of the time."""
    if said := wrong_kind(answer, shape):
        return said
    up = answer.float() != down
    for name, one, other in (("rows", up[1:], up[:-1]), ("columns", up[:, 1:], up[:, :-1])):
        same, count = int((one == other).sum()), one.numel()
        if abs(same - count / 2) > SIGMAS * count**0.5 / 2:
            return (
                f"elements in neighbouring {name} went the same way in {same} of {count} pairs, "
                f"expected {count / 2:.0f} +- {count**0.5 / 2:.0f}: their random numbers are not independent"
            )
    return None


@check(points=1)
def each_for_itself(draw):
    """Every element has a random number of its own: equal elements do not go up or down together."""
    shape = (40, 53)
    upper = 0x3F80 + int(torch.randint(0, 127, (1,), generator=draw))
    down, x = (float(from_pattern(torch.tensor((upper << 16) + low))) for low in (0, 0x8000))
    yield Case(
        "stochastic_round",
        {"x": torch.full(shape, x), "generator": fresh(draw)},
        accept=lambda answer: wrong_together(answer, down, shape),
        about="one number half-way between its neighbours, 40 x 53 times",
    )


def wrong_use(answer, shape) -> str | None:
    answers, untouched = answer
    for one in answers:
        if said := wrong_kind(one, shape):
            return said
    first, again, after = (one.view(torch.int16) for one in answers)
    if not torch.equal(first, again):
        return f"two calls with a generator of the same seed differ in {int((first != again).sum())} elements"
    if torch.equal(first, after):
        return "a second call with the same generator gives the same answer: the generator was not moved on"
    return None if untouched is True else "the global random state was changed"


@check(points=1)
def generator_decides(draw):
    """All chance comes from the given generator: the same state gives the same answer, the next call another."""
    x = torch.randn(5, 67, generator=draw)
    seed = int(torch.randint(0, 1 << 40, (1,), generator=draw))
    yield Case(
        "repeated",
        {"x": x, "seed": seed},
        accept=lambda answer: wrong_use(answer, x.shape),
        about="twice from one seed, then once more",
    )


@check(points=1)
def infinity_and_nan(draw):
    """Infinity stays infinity and NaN stays NaN, whatever its bits, beside ordinary numbers."""
    special = [0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F80FFFF]
    pattern = torch.tensor(special * 7 + [0xC0490000])
    x = from_pattern(pattern[torch.randperm(57, generator=draw)]).reshape(19, 3)
    about = "infinities, NaNs with payloads, and -3.140625"
    yield Case("stochastic_round", {"x": x, "generator": fresh(draw)}, x.to(BF16), about=about)
