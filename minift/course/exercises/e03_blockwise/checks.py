"""e03: inputs are made from the codes they must give, block by block, so that the judge rounds nothing."""

import torch

from minift.course.spec import Case, check

# Codes times a scale: a product and two quotients of float32; 16 roundings leave room for other orders.
RTOL = 16 * torch.finfo(torch.float32).eps
NAMES = ("q", "absmax")


def line(draw, count, blocksize, sizes):
    """A line of codes, the values they stand for (up to 0.4 steps off, but not the largest), the absmax of each block.

    sizes: one number a block, the size of its absmax; negative where its largest value is; 0 for a block of zeros.
    """
    q = torch.randint(-126, 127, (count,), generator=draw)
    off = (torch.rand(count, generator=draw, dtype=torch.float64) - 0.5) * 0.8
    absmax = torch.zeros(len(sizes), dtype=torch.float64)
    x = torch.zeros(count, dtype=torch.float64)
    for number, size in enumerate(sizes):
        start, stop = number * blocksize, min((number + 1) * blocksize, count)
        absmax[number] = abs(size) * (1 + float(torch.rand((), generator=draw)))
        top = start + int(torch.randint(stop - start, (), generator=draw))
        q[top], off[top] = (127 if size > 0 else -127), 0
        if size == 0:
            q[start:stop] = 0
        else:
            x[start:stop] = (q + off)[start:stop] * absmax[number] / 127
    return q.to(torch.int8), x.float(), absmax.float()


def quantize_case(draw, shape, blocksize, sizes, about):
    q, x, absmax = line(draw, torch.Size(shape).numel(), blocksize, sizes)
    given = {"x": x.view(shape)} | ({} if blocksize == 64 else {"blocksize": blocksize})
    return Case("quantize", given, (q.view(shape), absmax), rtol=RTOL, names=NAMES, about=about)


@check(points=1)
def own_scale_for_each_block(draw):
    """Every block of the flattened tensor has its own absmax: an outlier spoils its own block only."""
    sizes = [1.0, -300.0, 0.02]
    yield quantize_case(draw, (192,), 64, sizes, "192 values, blocksize 64, an outlier in the second block")
    sizes = [0.5, 0.0, -8.0, 2.0, 0.1]
    about = "shape (4, 15), blocksize 12 (so that blocks cross rows), the second block is zero"
    yield quantize_case(draw, (4, 15), 12, sizes, about)


@check(points=1)
def short_last_block(draw):
    """What is left at the end is a block of its own, with an absmax that only its own values decide."""
    yield quantize_case(draw, (4, 50), 64, [20.0, -3.0, 1.0, -0.05], "shape (4, 50): 200 values, blocksize 64")
    about = "shape (3, 7, 2), blocksize 16"
    yield quantize_case(draw, (3, 7, 2), 16, [-9.0, 1.0, 0.2], about)
    yield quantize_case(draw, (5,), 64, [-0.7], "5 values, less than a block")


@check(points=1)
def any_strides(draw):
    """The order of the values is that of their indices, also in a transposed view."""
    q, x, absmax = line(draw, 78, 16, [1.0, -50.0, 0.1, 4.0, 0.6])
    about = "a transposed view of shape (13, 6), blocksize 16"
    stored = x.view(13, 6).T.contiguous().T
    expect = q.view(13, 6), absmax
    yield Case("quantize", {"x": stored, "blocksize": 16}, expect, rtol=RTOL, names=NAMES, about=about)
    every_other = torch.stack([x, x + 1], dim=1).view(13, 12)[:, ::2]
    about = "every other column, shape (13, 6), blocksize 16"
    yield Case("quantize", {"x": every_other, "blocksize": 16}, expect, rtol=RTOL, names=NAMES, about=about)


@check(points=1)
def back_to_values(draw):
    """dequantize multiplies every code by the absmax of its own block over 127."""
    for shape, blocksize, sizes in (((4, 50), 64, [20.0, -3.0, 0.0, 0.05]), ((45,), 10, [1.0, 7.0, -0.3, 90.0, 2.0])):
        q, _, absmax = line(draw, torch.Size(shape).numel(), blocksize, sizes)
        scale = torch.tensor([float(absmax[i // blocksize]) / 127 for i in range(q.numel())], dtype=torch.float64)
        given = {"q": q.view(shape), "absmax": absmax} | ({} if blocksize == 64 else {"blocksize": blocksize})
        expect = (q * scale).float().view(shape)
        yield Case("dequantize", given, expect, rtol=RTOL, about=f"shape {shape}, blocksize {blocksize}")
    q, _, absmax = line(draw, 40, 16, [2.0, -0.1, 30.0])
    scale = torch.tensor([float(absmax[i // 16]) / 127 for i in range(40)], dtype=torch.float64)
    given = {"q": q.view(8, 5).T.contiguous().T, "absmax": absmax, "blocksize": 16}
    about = "a transposed view of shape (8, 5), blocksize 16"
    yield Case("dequantize", given, (q * scale).float().view(8, 5), rtol=RTOL, about=about)
