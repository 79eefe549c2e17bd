"""k1: golden numbers of bitsandbytes, a formula in float64, canaries around every tensor."""

import torch

from minift.course.spec import Case, check

# One product in float32; a fused or differently ordered one may be off by a rounding or two.
RTOL = 4 * torch.finfo(torch.float32).eps
BAND = 4096  # elements before and after each tensor, more than any program handles

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip

# bitsandbytes 0.50.2 on the CPU: quantize_4bit(x, blocksize=32, quant_type="nf4") of 71 random numbers with another
# scale in each block, and what dequantize_4bit makes of it.
GOLDEN_PACKED = [
    91, 104, 98, 133, 101, 245, 201, 55, 141, 34, 99, 202, 106, 170, 227, 60, 105, 24, 149, 72, 164, 137, 246, 91, 117,
    146, 155, 184, 93, 87, 187, 119, 216, 219, 86, 7,
]  # fmt: skip
GOLDEN_ABSMAX = [2.8922135829925537, 0.14975270628929138, 16.70281982421875]
GOLDEN_VALUES = [
    -0.534404218, 0.977323055, -0.263336152, 0.230163217, -0.263336152, -1.51862335, 0.230163217, -0.534404218,
    -0.263336152, -0.534404218, 2.89221358, -0.534404218, 1.27462697, 0.465444505, -1.14218569, 0.0, 0.230163217,
    1.62720859, -1.51862335, -1.51862335, -0.263336152, -1.14218569, 1.27462697, 0.711809337, -0.263336152, 0.711809337,
    0.711809337, 0.711809337, 2.09094548, -1.14218569, -1.14218569, 1.27462697, -0.013634989, 0.0240997337,
    -0.104256757, 0.0119173648, 0.0240997337, -0.027670322, -0.0425958671, 0.0119173648, 0.0368559845, -0.0425958671,
    0.0119173648, 0.0240997337, 0.149752706, -0.013634989, -0.027670322, 0.0506037213, 0.0, -0.027670322, 0.0240997337,
    -0.0786311105, 0.0240997337, 0.0506037213, 0.0506037213, 0.0119173648, -0.027670322, 0.0842534155, -0.027670322,
    0.0, 0.0506037213, 0.0506037213, 0.0, 0.0, 9.39729023, 1.32921541, 9.39729023, 5.64413738, -3.08623743,
    -1.52079237, -16.7028198,
]  # fmt: skip


def amid(values, around):
    """The values as a view into the middle of a larger tensor, and that tensor."""
    base = torch.full((len(values) + 2 * BAND,), around, dtype=values.dtype)
    base[BAND : BAND + len(values)] = values
    return base[BAND : BAND + len(values)], base


def inputs(packed, absmax, code, blocksize):
    return {"packed": amid(packed, 0x5A)[0], "absmax": amid(absmax, 1e6)[0], "code": code, "blocksize": blocksize}


def kernel_case(packed, absmax, code, values, blocksize, about, rtol=RTOL):
    """The output lies in memory that nobody looks at."""
    given = inputs(packed, absmax, code, blocksize) | {"n": len(values), "dtype": values.dtype}
    names = "out", "written by a kernel"
    return Case("launch", given, (values, True), rtol=rtol, names=names, about=f"n {len(values)}, {about}")


def loads_case(packed, absmax, code, values, blocksize, about):
    given = inputs(packed, absmax, code, blocksize) | {"n": len(values), "dtype": values.dtype}
    names = "loads from outside", "written by a kernel"
    return Case("strayed_loads", given, (0, True), names=names, about=f"n {len(values)}, {about}")


def guarded_case(packed, absmax, code, values, blocksize, about, canary):
    """The output and the memory around it hold the canary before."""
    out, base = amid(torch.full_like(values, canary), canary)
    after = base.clone()
    after[BAND : BAND + len(values)] = values
    given = inputs(packed, absmax, code, blocksize) | {"out": out}
    about = f"n {len(values)}, {about}, {canary:g} in the output and around it before"
    return Case("dequantize", given, None, rtol=RTOL, changes={"out": after}, about=about)


def random_inputs(draw, n, blocksize):
    packed = torch.randint(0, 256, (-(-n // 2),), generator=draw, dtype=torch.uint8)
    # Each block ten times as large as the one before, over and over: a neighbour's scale is no good for any of them.
    absmax = 10.0 ** (torch.arange(-(-n // blocksize)) % 5 - 2) * (1 + torch.rand(-(-n // blocksize), generator=draw))
    nibbles = torch.stack([packed // 16, packed % 16], dim=1).flatten()[:n].long()
    scales = absmax.double().repeat_interleave(blocksize)[:n]
    values = (NF4.double()[nibbles] * scales).float()
    return packed, absmax, NF4, values, blocksize, f"blocks of {blocksize}"


@check(points=1)
def golden_bytes(draw):
    """The first element of a byte lies in its high half: bytes made by bitsandbytes come out as they went in."""
    packed, values = torch.tensor(GOLDEN_PACKED, dtype=torch.uint8), torch.tensor(GOLDEN_VALUES)
    yield kernel_case(packed, torch.tensor(GOLDEN_ABSMAX), NF4, values, 32, "of bitsandbytes")
    code = NF4[torch.randperm(16, generator=draw)]
    packed = torch.randint(0, 256, (64,), generator=draw, dtype=torch.uint8)
    absmax = torch.rand(1, generator=draw) + 1
    values = code[torch.stack([packed // 16, packed % 16], dim=1).flatten().long()] * absmax
    yield kernel_case(packed, absmax, code, values, 128, "a table of its own, one block of 128")


@check(points=2)
def scale_of_its_own_block(draw):
    """Each element is multiplied by the absmax of its own block, however large blocks and programs are."""
    for n, blocksize in ((2048, 16), (1536, 64), (3000, 2048), (1920, 256)):
        yield kernel_case(*random_inputs(draw, n, blocksize))


@check(points=1)
def tails_and_canaries(draw):
    """Any length comes out whole, and not one element around the output is touched."""
    for canary in (-77.0, 55.0):
        for n, blocksize in ((1, 64), (65, 64), (777, 32), (1025, 512)):
            yield guarded_case(*random_inputs(draw, n, blocksize), canary)


@check(points=1)
def loads_stay_inside(draw):
    """Nothing is loaded from behind packed or absmax, where on a GPU another tensor lies, or none."""
    for n, blocksize in ((33, 16), (1027, 64), (2500, 32)):
        yield loads_case(*random_inputs(draw, n, blocksize))


def exact_in_bfloat16(draw):
    """A table and a scale, neither of them exact in bfloat16, whose products in float32 are."""
    while True:
        scale = torch.rand(1, generator=draw) + 1
        wanted = torch.randint(128, 256, (400,), generator=draw).float() / 128
        wanted = wanted * torch.randint(0, 2, (400,), generator=draw).mul(2).sub(1)
        table = wanted / scale
        early = table.bfloat16().float() * scale.bfloat16().float()
        found = (table * scale == wanted) & (early.bfloat16().float() != wanted)
        if int(found.sum()) >= 16:
            return table[found][:16], scale, wanted[found][:16]


@check(points=1)
def converted_once(draw):
    """A bfloat16 output is the float32 product, converted at the store: not a product of bfloat16 numbers."""
    for n, blocksize in ((640, 64), (331, 32)):
        code, scale, wanted = exact_in_bfloat16(draw)
        power = 2.0 ** (torch.arange(-(-n // blocksize)) % 7 - 3)
        packed = torch.randint(0, 256, (-(-n // 2),), generator=draw, dtype=torch.uint8)
        nibbles = torch.stack([packed // 16, packed % 16], dim=1).flatten()[:n].long()
        values = (wanted[nibbles] * power.repeat_interleave(blocksize)[:n]).bfloat16()
        about = f"bfloat16, blocks of {blocksize}"
        yield kernel_case(packed, scale * power, code, values, blocksize, about, rtol=0)
