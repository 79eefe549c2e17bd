"""e02: inputs are made from the codes they must give, in float64; nothing lies near the middle between two codes."""

import torch

from minift.course.spec import Case, check

# Two ends, a difference, a quotient, a product, in float32: some ten roundings; 32 leave room for other orders.
RTOL = 32 * torch.finfo(torch.float32).eps
NAMES = ("scale", "zero_point")


def drawn_range(draw, size):
    """A scale, a zero point, and how many steps (0.1 to 0.4) the ends of the range are off the codes."""
    scale = (float(torch.rand((), generator=draw, dtype=torch.float64)) + 0.5) * size
    zero_point = int(torch.randint(30, 100, (), generator=draw))
    off = 0.1 + 0.3 * float(torch.rand((), generator=draw, dtype=torch.float64))
    return scale, zero_point, off


def between(draw, shape, low, high):
    return torch.rand(shape, generator=draw, dtype=torch.float64) * (high - low) + low


def off_the_middle(draw, q):
    """Codes moved by up to 0.4 of a step."""
    return q + between(draw, q.shape, -0.4, 0.4)


def number(value):
    return torch.tensor(value, dtype=torch.float32)


def code(value):
    return torch.tensor(value, dtype=torch.int32)


@check(points=1)
def scale_and_zero_point(draw):
    """The scale maps low .. high onto 255 steps, and the zero point is the whole number nearest to where 0 lies."""
    for size, sign, shape in ((0.01, 1, (3, 7)), (30.0, -1, (2, 3, 5))):
        scale, zero_point, off = drawn_range(draw, size)
        off *= sign
        low, high = -(zero_point + off) * scale, (255 - zero_point - off) * scale
        x = between(draw, shape, low, high)
        x.view(-1)[2], x.view(-1)[11] = high, low
        about = f"shape {shape}, from {low:.4g} to {high:.4g}"
        yield Case(
            "parameters", {"x": x.float()}, (number(scale), code(zero_point)), rtol=RTOL, names=NAMES, about=about
        )


@check(points=1)
def zero_is_in_the_range(draw):
    """The range is made to include 0: for all-positive, all-negative and constant tensors, and for one of zeros."""
    scale, _, _ = drawn_range(draw, 0.02)
    x = between(draw, (4, 5), 90 * scale, 255 * scale)
    x[1, 3] = 255 * scale
    about = "nothing below 90 steps"
    yield Case("parameters", {"x": x.float()}, (number(scale), code(0)), rtol=RTOL, names=NAMES, about=about)
    about = "nothing above -90 steps"
    yield Case("parameters", {"x": -x.float()}, (number(scale), code(255)), rtol=RTOL, names=NAMES, about=about)
    same = torch.full((3, 2), -255 * scale)
    yield Case(
        "parameters", {"x": same}, (number(scale), code(255)), rtol=RTOL, names=NAMES, about="constant, negative"
    )
    yield Case("parameters", {"x": torch.zeros(7)}, (number(1.0), code(0)), names=NAMES, about="all zero")


@check(points=1)
def codes_are_clamped(draw):
    """Every value gets the nearest code, values outside of the range the nearest end of 0 .. 255."""
    scale, zero_point, _ = drawn_range(draw, 0.5)
    q = torch.randint(-180, 430, (5, 9), generator=draw)
    q[0, :5] = torch.tensor([-1, 0, zero_point, 255, 256])
    x = ((off_the_middle(draw, q) - zero_point) * number(scale).double()).float()
    given = {"x": x, "scale": number(scale), "zero_point": code(zero_point)}
    about = f"zero point {zero_point}, values from {int(q.min())} to {int(q.max())} in codes"
    yield Case("quantize", given, q.clamp(0, 255).to(torch.uint8), about=about)


@check(points=1)
def zeros_come_back_as_zeros(draw):
    """dequantize(q) is (q - zero_point) * scale, also below the zero point, and 0.0 survives the way there and back."""
    scale, zero_point, off = drawn_range(draw, 3.0)
    q = torch.randint(3, 253, (3, 11), generator=draw)
    q[0, :3] = torch.tensor([0, zero_point, 255])
    back = ((q - zero_point) * number(scale).double()).float()
    given = {"q": q.to(torch.uint8), "scale": number(scale), "zero_point": code(zero_point)}
    yield Case("dequantize", given, back, rtol=RTOL, about=f"zero point {zero_point}, codes above and below")
    steps = q[:, 3:] - zero_point
    x = (steps + between(draw, steps.shape, -0.05, 0.05)) * scale
    x[0, :2] = torch.tensor([-(zero_point + off) * scale, (255 - zero_point - off) * scale])
    x[1, :3], x[2, 5] = 0, 0
    expect = torch.round(x / scale) * scale
    about = "parameters, quantize, dequantize; four values are 0.0"
    yield Case("there_and_back", {"x": x.float()}, expect.float(), rtol=RTOL, about=about)
