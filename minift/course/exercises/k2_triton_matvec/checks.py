"""k2: a matrix of bitsandbytes, the product in float64, and other numbers around every tensor."""

import math

import torch

from minift.course.spec import Case, check

EPS = torch.finfo(torch.float32).eps
RTOL = 8 * EPS
BAND = 4096  # elements before and after each tensor
NAMES = ("out", "written by a kernel")

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip

# bitsandbytes 0.50.2 on the CPU: quantize_4bit(w, blocksize=32, quant_type="nf4") of a random (3, 70) matrix, and
# dequantize_4bit of that, in float64, times GOLDEN_X. The blocks do not end where the rows do.
GOLDEN_PACKED = [
    232, 138, 181, 208, 118, 227, 19, 100, 37, 214, 185, 212, 171, 95, 113, 119, 133, 37, 204, 50, 199, 49, 89, 67, 74,
    85, 83, 64, 91, 182, 101, 225, 10, 84, 80, 26, 133, 56, 76, 92, 105, 171, 42, 216, 54, 233, 85, 107, 212, 50, 51,
    118, 243, 152, 83, 217, 90, 145, 156, 236, 140, 45, 25, 69, 159, 203, 36, 102, 115, 187, 55, 24, 27, 185, 5, 116,
    179, 90, 139, 200, 196, 118, 40, 224, 132, 197, 141, 69, 214, 110, 84, 231, 220, 120, 68, 132, 83, 151, 122, 164,
    108, 48, 210, 135, 148,
]  # fmt: skip
GOLDEN_ABSMAX = [
    1.6923986673355103, 2.39623761177063, 2.316636323928833, 2.073168992996216, 2.852792263031006, 2.5452020168304443,
    2.775247097015381,
]  # fmt: skip
GOLDEN_X = [
    0.37, -0.37, 1.25, 0.39, -1.08, -1.44, -0.92, 0.28, 1.15, -1.21, 0.75, 1.33, -0.63, 0.61, 0.61, -0.37, 0.61, -1.22,
    1.51, 0.85, -0.15, -0.6, -0.48, 0.48, 0.95, 1.32, -0.51, 0.56, -0.04, -0.53, 1.45, 0.95, -1.86, 0.02, 0.39, -1.07,
    -0.56, 1.24, -0.61, 0.79, 0.26, 0.15, -0.52, -0.39, 1.6, -0.84, 0.36, 0.34, 0.62, 0.76, -0.01, 1.69, 0.65, 0.7,
    0.75, 1.03, -0.96, -1.32, -0.71, 0.92, 1.88, 0.13, -0.2, 0.1, -1.09, 0.26, 0.56, 0.67, -1.27, 0.41,
]  # fmt: skip
GOLDEN_OUT = [-2.781952389820786, 6.794478111454154, -16.72908881037511]


def amid(values, around):
    """The values as a view into the middle of a larger tensor, and that tensor."""
    base = torch.full((len(values) + 2 * BAND,), around, dtype=values.dtype)
    base[BAND : BAND + len(values)] = values
    return base[BAND : BAND + len(values)], base


def product(packed, absmax, code, x, blocksize):
    """The product in float64, and the largest of its terms."""
    nibbles = torch.stack([packed // 16, packed % 16], dim=1).flatten().long()
    scales = absmax.double().repeat_interleave(blocksize)[: len(nibbles)]
    terms = (code.double()[nibbles] * scales).view(-1, len(x)) * x.double()
    return terms.sum(1), float(terms.abs().max())


def inputs(packed, absmax, code, x, blocksize):
    return {
        "packed": amid(packed, 0x0F)[0],
        "absmax": amid(absmax, 1000.0)[0],
        "code": code,
        "x": amid(x, 1000.0)[0],
        "blocksize": blocksize,
    }


def tolerance(k, largest):
    """K roundings of float32 of sums that grow like the root of K times a term, to and fro."""
    return 8 * EPS * math.sqrt(k) * largest


def matvec_case(packed, absmax, code, x, blocksize, about="", expected=None):
    """The output lies in memory that nobody looks at."""
    found, largest = product(packed, absmax, code, x, blocksize)
    out = (found if expected is None else expected).float()
    given = inputs(packed, absmax, code, x, blocksize) | {"rows": len(out)}
    about = f"{len(out)} x {len(x)}, blocks of {blocksize}{about}"
    return Case("launch", given, (out, True), atol=tolerance(len(x), largest), rtol=RTOL, names=NAMES, about=about)


def guarded_case(packed, absmax, code, x, blocksize, canary):
    """The output and the memory around it hold the canary before."""
    found, largest = product(packed, absmax, code, x, blocksize)
    out, base = amid(torch.full((len(found),), canary), canary)
    after = base.clone()
    after[BAND : BAND + len(found)] = found.float()
    given = inputs(packed, absmax, code, x, blocksize) | {"out": out}
    about = f"{len(found)} x {len(x)}, blocks of {blocksize}, {canary:g} in the output and around it before"
    return Case("matvec", given, None, atol=tolerance(len(x), largest), rtol=RTOL, changes={"out": after}, about=about)


def random_inputs(draw, rows, k, blocksize, factor=1):
    """`factor` is that between the scales of neighbouring blocks."""
    count = rows * k
    packed = torch.randint(0, 256, (count // 2,), generator=draw, dtype=torch.uint8)
    blocks = -(-count // blocksize)
    absmax = float(factor) ** (torch.arange(blocks) % 3) * (0.5 + torch.rand(blocks, generator=draw))
    code = NF4[torch.randperm(16, generator=draw)]
    return packed, absmax, code, torch.randn(k, generator=draw), blocksize


@check(points=1)
def one_tile_or_less(draw):
    """A short row is multiplied right, and lanes without a column add nothing."""
    packed, expected = torch.tensor(GOLDEN_PACKED, dtype=torch.uint8), torch.tensor(GOLDEN_OUT, dtype=torch.float64)
    absmax, x = torch.tensor(GOLDEN_ABSMAX), torch.tensor(GOLDEN_X)
    yield matvec_case(packed, absmax, NF4, x, 32, ", made by bitsandbytes", expected)
    yield matvec_case(*random_inputs(draw, 5, 34, 64), ", one block for more than a row")


@check(points=1)
def along_the_whole_row(draw):
    """A long row is summed in many tiles, the last of them not full, without losing digits."""
    yield matvec_case(*random_inputs(draw, 3, 2600, 64))
    yield matvec_case(*random_inputs(draw, 2, 1030, 128))


@check(points=1)
def scale_before_the_sum(draw):
    """Every element has the scale of its own block, in the flat matrix, before anything is added up."""
    about = ", the scales of neighbouring blocks differ by a factor of 4"
    yield matvec_case(*random_inputs(draw, 7, 90, 16, factor=4), about)
    yield matvec_case(*random_inputs(draw, 4, 200, 32, factor=4), about)


@check(points=1)
def around_the_output(draw):
    """Every row is written, and not one number around the output."""
    for canary in (-77.0, 55.0):
        yield guarded_case(*random_inputs(draw, 11, 66, 32), canary)
        yield guarded_case(*random_inputs(draw, 1, 150, 64), canary)
