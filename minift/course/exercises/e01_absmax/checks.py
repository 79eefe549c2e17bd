"""e01: inputs are made from the codes they must give, so that no rounding of the judge's own is involved."""

import torch

from minift.course.spec import Case, check

# x / scale and x * (127 / absmax) differ by two roundings of float32 each; 16 of them leave room for other orders.
RTOL = 16 * torch.finfo(torch.float32).eps
NAMES = ("q", "scale")


def codes_and_values(draw: torch.Generator, rows: int, width: int, signs: list[int]):
    """Codes with one +-127 a row, the values they stand for (off the exact places by up to 0.4 steps), the scales."""
    q = torch.randint(-126, 127, (rows, width), generator=draw)
    off = (torch.rand(rows, width, generator=draw, dtype=torch.float64) - 0.5) * 0.8
    top = torch.randint(0, width, (rows,), generator=draw)
    q[torch.arange(rows), top] = 127 * torch.tensor(signs)
    off[torch.arange(rows), top] = 0
    # Scales far apart, so that another row's scale is no good for any row.
    scale = torch.rand(rows, 1, generator=draw, dtype=torch.float64) + 0.5
    scale = scale * 10.0 ** torch.arange(rows).unsqueeze(1).sub(1)
    return q.to(torch.int8), ((q + off) * scale).float(), scale.float()


@check(points=1)
def one_scale(draw):
    """One scale for the whole tensor: the largest value lands on 127 and everything else on the nearest step."""
    for sign, shape in ((1, (3, 7)), (-1, (2, 5, 3))):
        count = torch.Size(shape).numel()
        q, x, scale = codes_and_values(draw, 1, count, [sign])
        about = f"shape {shape}, the largest value is {'positive' if sign > 0 else 'negative'}"
        expect = q.reshape(shape), scale.reshape(())
        yield Case("quantize", {"x": x.reshape(shape)}, expect, rtol=RTOL, names=NAMES, about=about)


@check(points=1)
def scale_per_row(draw):
    """One scale for each row (or column), also where the largest value of a row is negative."""
    q, x, scale = codes_and_values(draw, 4, 9, [1, -1, -1, 1])
    yield Case("quantize", {"x": x, "dim": -1}, (q, scale), rtol=RTOL, names=NAMES, about="4 rows of 9, dim=-1")
    q, x, scale = codes_and_values(draw, 3, 5, [-1, 1, -1])
    yield Case("quantize", {"x": x.T, "dim": 0}, (q.T, scale.T), rtol=RTOL, names=NAMES, about="3 columns of 5, dim=0")


@check(points=1)
def zeros_and_back(draw):
    """A row of zeros gives codes 0 and scale 1, and dequantize leads back to the values the codes stand for."""
    q, x, scale = codes_and_values(draw, 3, 8, [1, -1, 1])
    q[1], x[1], scale[1] = 0, 0, 1
    yield Case("quantize", {"x": x, "dim": -1}, (q, scale), rtol=RTOL, names=NAMES, about="the second row is zero")
    nothing = torch.zeros(2, 3, dtype=torch.int8), torch.tensor(1.0)
    yield Case("quantize", {"x": torch.zeros(2, 3)}, nothing, names=NAMES, about="all zero, dim=None")
    yield Case("dequantize", {"q": q, "scale": scale}, (q.double() * scale.double()).float(), rtol=RTOL)
