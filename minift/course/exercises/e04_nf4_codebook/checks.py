"""e04: the table as bitsandbytes 0.50.2 prints it, and the standard library's normal distribution for other widths."""

from fractions import Fraction
from statistics import NormalDist

import torch

from minift.course.spec import Case, check

# bitsandbytes.functional.get_4bit_type("nf4"), 0.50.2.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# A p rounded to float32 is off by 3e-8. Q is steepest at the offset: there Q' / Q is 7.5 for 4 bits and 10.5 for an
# offset of 0.98, which makes 3e-7 of it; entry and divisor both have it, and their own roundings. Three times that.
ATOL = 2e-6


def quantiles(bits, offset):
    """The entries from the standard library, in float64."""
    up, top = 2 ** (bits - 1), NormalDist().inv_cdf(offset)
    above = [NormalDist().inv_cdf(offset - (offset - 0.5) * i / up) / top for i in range(up)]
    below = [-NormalDist().inv_cdf(offset - (offset - 0.5) * i / (up - 1)) / top for i in range(up - 1)]
    return torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float64).float()


def drawn_offset(draw, low, high):
    return low + (high - low) * float(torch.rand((), generator=draw, dtype=torch.float64))


@check(points=1)
def the_outermost_probability(draw):
    """outermost(bits) is one minus half a bucket, the mean for 2^bits and 2^bits - 1 buckets."""
    widths = [4, int(torch.randint(5, 9, (), generator=draw)), 3]
    for bits in widths:
        exact = 1 - (Fraction(1, 2 * 2**bits) + Fraction(1, 2 * (2**bits - 1))) / 2
        # Five operations on numbers up to 1 in float64.
        yield Case("outermost", {"bits": bits}, float(exact), atol=1e-14, about=f"{bits} bits")


@check(points=1)
def ends_and_zero(draw):
    """The entries ascend from -1 to 1, 0.0 is among them exactly, and there is one more above zero than below.

    The ends may be as far off as any entry: torch.erfinv in float32 need not give mirrored values for x and -x.
    """

    def wrong_with(bits):
        def accept(entries):
            if entries.dtype != torch.float32 or entries.shape != (2**bits,):
                return f"float32 of shape ({2**bits},) is expected, not {entries.dtype} {tuple(entries.shape)}"
            below, zero, above = (
                int(count) for count in ((entries < 0).sum(), (entries == 0).sum(), (entries > 0).sum())
            )
            if (below, zero, above) != (2 ** (bits - 1) - 1, 1, 2 ** (bits - 1)):
                return f"{below} entries are below zero, {zero} are 0.0 exactly, {above} are above"
            if not bool((entries.diff() > 0).all()):
                return "the entries do not ascend"
            ends = (entries[[0, -1]].abs() - 1).abs()
            return None if ends.max() <= ATOL else f"it runs from {entries[0]} to {entries[-1]}"

        return accept

    yield Case("codebook", {}, accept=wrong_with(4), about="no arguments: 4 bits")
    bits = int(torch.randint(5, 7, (), generator=draw))
    given = {"bits": bits, "offset": drawn_offset(draw, 0.9, 0.98)}
    yield Case("codebook", given, accept=wrong_with(bits), about=f"{bits} bits, offset {given['offset']:.4f}")


@check(points=2)
def the_published_table(draw):
    """With 4 bits it is NF4: all 16 entries of the table that bitsandbytes has."""
    table = torch.tensor(PUBLISHED)
    given = {"bits": 4, "offset": 0.9677083}
    yield Case("codebook", given, table, atol=ATOL, about="4 bits, offset 0.9677083")
    yield Case("codebook", {}, table, atol=ATOL, about="no arguments: 4 bits and their own offset")
    offset = drawn_offset(draw, 0.93, 0.96)
    yield Case("codebook", {"offset": offset}, quantiles(4, offset), atol=ATOL, about=f"4 bits, offset {offset:.4f}")


@check(points=1)
def other_widths(draw):
    """The same construction gives the entries for 2, 3 and 5 bits."""
    for bits, low, high in ((3, 0.9, 0.95), (5, 0.97, 0.98)):
        offset = drawn_offset(draw, low, high)
        given = {"bits": bits, "offset": offset}
        yield Case("codebook", given, quantiles(bits, offset), atol=ATOL, about=f"{bits} bits, offset {offset:.4f}")
    own = float(1 - (Fraction(1, 8) + Fraction(1, 6)) / 2)
    yield Case("codebook", {"bits": 2}, quantiles(2, own), atol=ATOL, about="2 bits and their own offset")
