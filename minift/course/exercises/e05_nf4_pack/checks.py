"""e05: inputs are made from the codes they must give; one set of bytes was written by bitsandbytes."""

import torch

from minift.course.spec import Case, check

# bitsandbytes.functional.get_4bit_type("nf4"), 0.50.2.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
# bitsandbytes.functional.quantize_4bit(golden_values(), blocksize=64, quant_type="nf4"), 0.50.2 on a CPU.
GOLDEN = bytes.fromhex(
    "17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18e2af4c16e178776706786787767867"
    "8778776786787767867867877678678778776786787704c16e29f3b05d17e29f3c05d18e2af4c16e17"
)
GOLDEN_ABSMAX = [3.125, 300.0, 3.125]
# One product of float32 numbers; the scale may also be multiplied in another order or precision.
RTOL = 8 * torch.finfo(torch.float32).eps


def golden_values():
    """165 multiples of 1/16, exact in every dtype; the second block larger, with a negative outlier."""
    x = ((torch.arange(165) * 37 + 11) % 101 - 50).float() / 16
    x[64:128] *= 8
    x[70] = -300.0
    return x


def another_codebook(draw):
    """16 ascending entries from -1 to 1 with a 0 in seventh place, no two of them too near."""
    gaps = torch.rand(15, generator=draw) + 0.3
    below, above = gaps[:7].cumsum(0), gaps[7:].cumsum(0)
    return torch.cat([-(below / below[-1]).flip(0), torch.zeros(1), above / above[-1]])


def line(draw, code, count, blocksize, sizes):
    """Codes, the values they stand for (up to 0.8 of the way to the middle off), the absmax of each block.

    sizes: one number a block, the size of its absmax; negative where its largest value is; 0 for a block of zeros.
    """
    code = code.double()
    codes = torch.randint(0, 16, (count,), generator=draw)
    towards = torch.randint(0, 2, (count,), generator=draw) * 2 - 1
    towards[codes == 0], towards[codes == 15] = 1, -1
    middle = (code[codes] + code[codes + towards]) / 2
    share = 0.8 * torch.rand(count, generator=draw, dtype=torch.float64)
    ratio = code[codes] + share * (middle - code[codes])
    absmax = torch.zeros(len(sizes), dtype=torch.float64)
    for number, size in enumerate(sizes):
        start, stop = number * blocksize, min((number + 1) * blocksize, count)
        absmax[number] = abs(size) * (1 + float(torch.rand((), generator=draw)))
        top = start + int(torch.randint(stop - start, (), generator=draw))
        codes[top], ratio[top] = (15, 1.0) if size > 0 else (0, -1.0)
        if size == 0:
            codes[start:stop] = 7
    x = ratio * absmax.repeat_interleave(blocksize)[:count]
    return codes.to(torch.uint8), x.float(), absmax.float()


def to_bytes(codes):
    """By arithmetic on Python numbers."""
    digits = codes.tolist() + [7] * (len(codes) % 2)
    pairs = zip(digits[0::2], digits[1::2], strict=True)
    return torch.tensor([16 * even + odd for even, odd in pairs], dtype=torch.uint8)


def some_codes(draw, count):
    """Codes among which 15 and 0 stand in both halves of a byte."""
    codes = torch.randint(0, 16, (count,), generator=draw)
    codes[:4] = torch.tensor([15, 0, 0, 15])
    return codes.to(torch.uint8)


@check(points=1)
def nearest_entries(draw):
    """Every value gets the number of the entry nearest to x / absmax of its own block."""
    names = ("codes", "absmax")
    codes, x, absmax = line(draw, NF4, 150, 64, [0.02, -40.0, 1.0])
    given, about = {"x": x.view(10, 15), "code": NF4}, "shape (10, 15), blocksize 64"
    yield Case("encode", given, (codes, absmax), rtol=RTOL, names=names, about=about)
    codes, x, absmax = line(draw, NF4, 57, 12, [-3.0, 0.0, 0.5, 100.0, -7.0])
    given, about = {"x": x, "code": NF4, "blocksize": 12}, "57 values, blocksize 12, the second block is zero"
    yield Case("encode", given, (codes, absmax), rtol=RTOL, names=names, about=about)
    code = another_codebook(draw)
    codes, x, absmax = line(draw, code, 45, 32, [2.0, -0.3])
    given, about = {"x": x, "code": code, "blocksize": 32}, "45 values, blocksize 32, another codebook"
    yield Case("encode", given, (codes, absmax), rtol=RTOL, names=names, about=about)


@check(points=1)
def two_codes_a_byte(draw):
    """pack puts even elements into the high nibble and their neighbours into the low one; odd lengths end in 7."""
    for count in (22, 17, 1):
        codes = some_codes(draw, max(count, 4))[:count]
        yield Case("pack", {"codes": codes}, to_bytes(codes), about=f"{count} codes")


@check(points=1)
def codes_out_of_bytes(draw):
    """unpack gives the n codes back in their order, those above 7 included."""
    for count in (14, 19):
        codes = some_codes(draw, count)
        yield Case("unpack", {"packed": to_bytes(codes), "n": count}, codes, about=f"{count} codes")


@check(points=1)
def bytes_of_bitsandbytes(draw):
    """encode and pack together write the bytes that bitsandbytes writes."""
    x = golden_values()
    packed, absmax = torch.tensor(list(GOLDEN), dtype=torch.uint8), torch.tensor(GOLDEN_ABSMAX)
    # A power of two changes no digit of any quotient, so the bytes stay as they are.
    power = 2.0 ** int(torch.randint(-8, 9, (), generator=draw))
    for factor in (1.0, power):
        given = {"x": x.view(11, 15) * factor, "code": NF4, "blocksize": 64}
        about = f"165 multiples of {factor / 16:g}, blocksize 64"
        yield Case("quantized", given, (packed, absmax * factor), names=("packed", "absmax"), about=about)


@check(points=1)
def back_to_values(draw):
    """dequantize multiplies every entry by the absmax of the block that its value, not its byte, lies in."""
    codes, _, absmax = line(draw, NF4, 203, 64, [5.0, -0.1, 60.0, 0.7])
    given = {"packed": to_bytes(codes), "absmax": absmax, "n": 203, "code": NF4}
    scale = torch.tensor([float(absmax[i // 64]) for i in range(203)], dtype=torch.float64)
    expect = (NF4.double()[codes.long()] * scale).float()
    yield Case("dequantize", given, expect, rtol=RTOL, about="203 values, blocksize 64")
    code = another_codebook(draw)
    codes, _, absmax = line(draw, code, 38, 10, [0.2, 3.0, -90.0, 1.0])
    given = {"packed": to_bytes(codes), "absmax": absmax, "n": 38, "code": code, "blocksize": 10}
    scale = torch.tensor([float(absmax[i // 10]) for i in range(38)], dtype=torch.float64)
    expect = (code.double()[codes.long()] * scale).float()
    yield Case("dequantize", given, expect, rtol=RTOL, about="38 values, blocksize 10, another codebook")
