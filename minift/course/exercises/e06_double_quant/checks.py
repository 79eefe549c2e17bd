"""e06: float64 formulas on scales that lie well between the levels; one set of codes was written by bitsandbytes."""

import torch

from minift.course.spec import Case, check

EPS = torch.finfo(torch.float32).eps
# bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True), 0.50.2 on a CPU, for 261 blocks
# of 64 weights of which the first is golden_scales()[block] and the others are 0: state.absmax.
GOLDEN = bytes.fromhex(
    "010810171e252c333a49a5c1c8cfd6dde4ebf2fa030a11181f272e353c52adc2c9d0d8dfe6edf4fb050c131a21282f373e5ab5c4cbd2d9e0"
    "e7eff6fd060d151c232a31383f6dbec5cdd4dbe2e9f0f7ff080f161d242c333a47a2c0c7ced5dce4ebf2f9020a11181f262d343b4faac2c9"
    "d0d7dee5ecf4fb040b121921282f363d57b3c3cad2d9e0e7eef5fc060d141b222930383f60bbc5ccd3dae1e9f0f7fe070e161d242b323944"
    "a0bfc7ced5dce3eaf1f8020910171e262d343b4ca8c1c8cfd6dee5ecf3fa040b121920272e353d54b0c3cad1d8dfe6edf5fc050c131b2229"
    "30373e5db8c4cbd3dae1e8eff6fd070e151c232a32394196bfc6cdd4dbe3eaf1fa00070e15"
)
NAMES = ("q", "nested", "offset")


def golden_scales():
    """261 multiples of 1/128, whose sum is exact in float32."""
    return 2 + ((torch.arange(261) * 13) % 257).float() / 128


def dynamic_map():
    """The signed map of e07, by its definition; its SHA-256 as float32 is e732639a...e89c, that of bitsandbytes."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values))


def other_levels(draw, count):
    """Ascending levels from -1 to 1 with unequal gaps."""
    inner = (torch.rand(count - 1, generator=draw) + 0.3).cumsum(0)
    return torch.cat([torch.tensor([-1.0]), inner / inner[-1] * 2 - 1])


def scales(draw, m, blocksize, levels, size):
    """Scales between 2 and 4.5 sizes, and their q, nested and offset in float64; drawn again until none is near a tie.

    float32 may put (absmax - offset) / nested off by some roundings, most of them in the sum of the mean, of numbers up
    to 4.5 times as large as nested; 8 are kept clear.
    """
    middles = (levels.double()[1:] + levels.double()[:-1]) / 2
    while True:
        absmax = (size * (3 + 0.8 * torch.randn(m, generator=draw).clamp(-1, 1))).float()
        # One far above and one far below all others, each in a block of its own: which of the two decides differs.
        absmax[m // 2], absmax[-1] = 4.5 * size, 2 * size
        offset = absmax.double().mean()
        pieces = (absmax.double() - offset).split(blocksize)
        nested = torch.stack([piece.abs().max() for piece in pieces])
        ratio = torch.cat([piece / top for piece, top in zip(pieces, nested, strict=True)])
        if float((ratio[:, None] - middles).abs().min()) > 4.5 * 8 * EPS:
            q = (ratio[:, None] - levels.double()).abs().argmin(1)
            return absmax, (q.to(torch.uint8), nested.float(), offset.float())


def quantize_case(draw, m, blocksize, levels, about, size=1.0):
    absmax, expect = scales(draw, m, blocksize, levels, size)
    given = {"absmax": absmax, "levels": levels} | ({} if blocksize == 256 else {"blocksize": blocksize})
    # The mean of numbers up to 4.5 sizes, summed in some order, and a subtraction: 16 roundings of float32.
    return Case("quantize_scales", given, expect, atol=16 * 4.5 * size * EPS, names=NAMES, about=about)


@check(points=1)
def mean_taken_away(draw):
    """The offset is the mean of all scales, and q is the level nearest to what is left, over nested."""
    levels = dynamic_map()
    yield quantize_case(draw, 100, 256, levels, "100 scales around 3, less than a block")
    levels = other_levels(draw, 40)
    yield quantize_case(draw, 90, 256, levels, "90 scales, 40 levels that are no dynamic map", size=0.05)
    same = torch.full((70,), 0.5), torch.zeros(1), torch.tensor(0.5)
    levels = dynamic_map()
    expect = (torch.full((70,), 127, dtype=torch.uint8), *same[1:])
    about = "70 scales that are all 0.5: nothing is left"
    yield Case("quantize_scales", {"absmax": same[0], "levels": levels}, expect, names=NAMES, about=about)


@check(points=1)
def blocks_of_scales(draw):
    """Blocks are counted in scales, not in weights; the last one is short, and only its own scales decide."""
    levels = other_levels(draw, 30)
    yield quantize_case(draw, 257, 256, levels, "257 scales: blocks of 256 and of 1")
    about = "75 scales, blocksize 32: the largest and the smallest in different blocks"
    yield quantize_case(draw, 75, 32, dynamic_map(), about, size=20.0)


@check(points=1)
def codes_of_bitsandbytes(draw):
    """The codes are those that bitsandbytes writes for the same scales."""
    absmax, q = golden_scales(), torch.tensor(list(GOLDEN), dtype=torch.uint8)
    offset = absmax.double().mean()
    nested = torch.stack([piece.abs().max() for piece in (absmax.double() - offset).split(256)])
    # A power of two changes no digit of any quotient, so the codes stay as they are.
    power = 2.0 ** int(torch.randint(-8, 9, (), generator=draw))
    for factor in (1.0, power):
        given = {"absmax": absmax * factor, "levels": dynamic_map()}
        expect = q, (nested * factor).float(), (offset * factor).float()
        about = f"261 multiples of {factor / 128:g}"
        yield Case("quantize_scales", given, expect, atol=16 * 4.5 * factor * EPS, names=NAMES, about=about)


@check(points=1)
def scales_come_back(draw):
    """dequantize_scales gives level times nested of the scale's own block, plus the offset."""
    for m, blocksize, levels in ((300, 256, dynamic_map()), (47, 10, other_levels(draw, 25))):
        q = torch.randint(0, len(levels), (m,), generator=draw)
        q[:2] = torch.tensor([0, len(levels) - 1])
        nested = torch.rand(-(-m // blocksize), generator=draw) + 0.5
        nested = nested * torch.arange(1, len(nested) + 1)
        offset = 6 + torch.rand((), generator=draw)
        own = torch.tensor([float(nested[i // blocksize]) for i in range(m)], dtype=torch.float64)
        expect = (levels.double()[q] * own + offset.double()).float()
        given = {"q": q.to(torch.uint8), "nested": nested, "offset": offset, "levels": levels}
        given |= {} if blocksize == 256 else {"blocksize": blocksize}
        # A product and a sum of numbers up to 14: two roundings, 16 leave room for other orders.
        yield Case("dequantize_scales", given, expect, atol=16 * 14 * EPS, about=f"{m} scales, blocksize {blocksize}")


@check(points=1)
def bytes_stored(draw):
    """stored_bytes counts codes, scales, nested scales and the offset, and rounds up wherever something is left."""
    layer = 4096 * 4096
    yield Case("stored_bytes", {"n": layer}, 8_654_852, about="a layer of 4096 x 4096, 4.127 bits a weight")
    odd = 2 * int(torch.randint(40_000, 90_000, (), generator=draw)) + 1
    for n, blocksize, nested in ((odd, 64, 256), (odd, 128, 100), (5, 64, 256), (64 * 256 * 3 + 1, 64, 256)):
        given = {"n": n} | (
            {} if (blocksize, nested) == (64, 256) else {"blocksize": blocksize, "nested_blocksize": nested}
        )
        blocks = len(range(0, n, blocksize))
        expect = len(range(0, n, 2)) + blocks + 4 * len(range(0, blocks, nested)) + 4
        yield Case(
            "stored_bytes", given, expect, about=f"{n} weights, blocks of {blocksize}, nested blocks of {nested}"
        )
