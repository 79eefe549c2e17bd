"""e08: x and weight are made from the codes they must give; the products are then computed from those, in float64."""

import torch

from minift.course.spec import Case, check

EPS = torch.finfo(torch.float32).eps
NAMES = ("q", "absmax")
THRESHOLD = 6.0

# bitsandbytes 0.50.2, functional.int8_vectorwise_quant of these numbers as float16 (1.25 and the like are exact in it).
ROWS = [[0.5, -2.0, 1.25, 0.25], [-7.5, 1.0, 3.25, -0.1875], [0.0, 0.0, 0.0, 0.0]]
ROW_CODES = [[32, -127, 79, 16], [-127, 17, 55, -3], [0, 0, 0, 0]]
ROW_ABSMAX = [2.0, 7.5, 0.0]
# The same with threshold=6.0: column 1 is an outlier; there every row's largest value is in another column.
WITH_OUTLIERS = [[0.40625, -61.0, 1.1875, -0.3125], [-1.125, -58.5, 0.1875, 2.5], [0.75, 6.0, -3.0, 1.0]]
OUTLIER_CODES = [[43, 0, 127, -33], [-57, 0, 10, 127], [32, 0, -127, 42]]
OUTLIER_ABSMAX = [1.1875, 2.5, 3.0]


def codes_and_values(draw: torch.Generator, rows: int, columns: int, low: float, high: float):
    """Codes with one +-127 a row, values up to 0.4 steps off them, absmax between low and high; all float64."""
    q = torch.randint(-120, 121, (rows, columns), generator=draw)
    off = (torch.rand(rows, columns, generator=draw, dtype=torch.float64) - 0.5) * 0.8
    top = torch.randint(0, columns, (rows,), generator=draw)
    # Every other row has a negative value as its largest.
    q[torch.arange(rows), top] = 127 - 254 * (torch.arange(rows) % 2)
    off[torch.arange(rows), top] = 0
    absmax = (torch.rand(rows, generator=draw) * (high - low) + low).double()
    return q.double(), (q + off) * absmax.unsqueeze(1) / 127, absmax


def weight(draw: torch.Generator, out: int, columns: int):
    """q_w, absmax_w with scales far apart, and the decoded weight in float64."""
    q, _, absmax = codes_and_values(draw, out, columns, 0.5, 1.5)
    absmax = (absmax * 4.0 ** (torch.arange(out) % 3)).float()
    return q.to(torch.int8), absmax, q * absmax.double().unsqueeze(1) / 127


def product(x, q_w, absmax_w, threshold, expect, size, about) -> Case:
    # Rounding of float32 in a sum of products whose magnitudes add up to `size`; it grows like the root of the length.
    atol = 4 * EPS * x.shape[1] ** 0.5 * float(size.max())
    given = {"x": x, "q_w": q_w, "absmax_w": absmax_w, "threshold": threshold}
    return Case("matmul", given, expect.float(), atol=atol, about=about)


@check(points=1)
def rows_to_int8(draw):
    """Every row has its own scale, the largest |x| of a row becomes 127 or -127, and zeros stay zeros."""
    expect = torch.tensor(ROW_CODES, dtype=torch.int8), torch.tensor(ROW_ABSMAX)
    yield Case("quantize_rows", {"x": torch.tensor(ROWS)}, expect, names=NAMES, about="recorded from bitsandbytes")
    q, x, absmax = codes_and_values(draw, 6, 11, 0.3, 40.0)
    x, absmax = x.float(), absmax.float()
    x[3], q[3], absmax[3] = 0, 0, 0
    # The absmax is one of the values, so it differs by the rounding of the fixture only.
    yield Case("quantize_rows", {"x": x}, (q.to(torch.int8), absmax), rtol=16 * EPS, names=NAMES, about="row 3 is zero")


@check(points=1)
def columns_with_outliers(draw):
    """A column is an outlier if any |x| in it is at least the threshold, also exactly, also negative."""
    for threshold in (THRESHOLD, 2.5):
        x = (torch.rand(7, 12, generator=draw) * 1.9 - 0.95) * threshold
        row = torch.randint(0, 7, (4,), generator=draw)
        column = torch.randperm(12, generator=draw)[:5].tolist()
        for place, value in enumerate((threshold, -threshold, 10 * threshold, -10 * threshold)):
            x[row[place], column[place]] = value
        # The largest number below the threshold is none.
        x[0, column[4]] = torch.nextafter(torch.tensor(-threshold), torch.tensor(0.0))
        mask = torch.zeros(12, dtype=torch.bool)
        mask[column[:4]] = True
        about = f"threshold {threshold}, four columns reach it: exactly and far beyond, above and below zero"
        yield Case("outlier_columns", {"x": x, "threshold": threshold}, mask, about=about)


@check(points=1)
def integer_product(draw):
    """Without outliers y is the sum of products of codes, times both scales, over 127^2."""
    q, x, absmax = codes_and_values(draw, 5, 43, 0.5, 4.0)
    q_w, absmax_w, w = weight(draw, 7, 43)
    decoded = q * absmax.unsqueeze(1) / 127
    about = "5 tokens, 43 columns, 7 outputs; nothing reaches the threshold"
    yield product(x.float(), q_w, absmax_w, THRESHOLD, decoded @ w.T, decoded.abs() @ w.T.abs(), about)


def split(draw: torch.Generator, tokens: int, columns: int, out: int, outliers: int) -> Case:
    """Some columns of outliers among codes; between the outliers their columns hold ordinary values."""
    q, x, absmax = codes_and_values(draw, tokens, columns, 0.5, 2.0)
    q_w, absmax_w, _ = weight(draw, out, columns)
    large = torch.rand(tokens, outliers, generator=draw, dtype=torch.float64) * 20 + 10
    large = large * (2 * torch.randint(0, 2, (tokens, outliers), generator=draw) - 1)
    large[0], large[4] = 4.5, -5.5  # below the threshold, above everything else in their rows
    large[:, 0] = -1.5
    large[2, 0] = -THRESHOLD
    full, decoded = torch.empty(tokens, columns + outliers).double(), torch.zeros(tokens, columns + outliers).double()
    q_full, w_full = torch.zeros(out, columns + outliers, dtype=torch.int8), torch.zeros(out, columns + outliers)
    place = torch.randperm(columns + outliers, generator=draw)
    apart, kept = place[:outliers], place[outliers:]
    more_q = torch.randint(-126, 127, (out, outliers), generator=draw)
    q_full[:, kept], q_full[:, apart] = q_w, more_q.to(torch.int8)
    w_full = q_full.double() * absmax_w.double().unsqueeze(1) / 127
    full[:, kept], full[:, apart] = x, large
    full = full.float()
    decoded[:, kept], decoded[:, apart] = q * absmax.unsqueeze(1) / 127, full[:, apart].double()
    about = (
        f"{tokens} tokens, {columns + outliers} columns, {outliers} of them with outliers, one exactly the threshold"
    )
    return product(full, q_full, absmax_w, THRESHOLD, decoded @ w_full.T, decoded.abs() @ w_full.T.abs(), about)


@check(points=1)
def outliers_apart(draw):
    """Outlier columns are multiplied in float, with the decoded weight, and have no part in codes and scales."""
    x = torch.tensor(WITH_OUTLIERS)
    q_w, absmax_w, w = weight(draw, 5, 4)
    decoded = torch.tensor(OUTLIER_CODES) * torch.tensor(OUTLIER_ABSMAX).double().unsqueeze(1) / 127
    decoded[:, 1] = x[:, 1]
    about = "3 tokens whose codes are recorded from bitsandbytes, column 1 has outliers"
    yield product(x, q_w, absmax_w, THRESHOLD, decoded @ w.T, decoded.abs() @ w.T.abs(), about)
    yield split(draw, 5, 37, 7, 3)


@check(points=1)
def only_outliers_or_none(draw):
    """It works with nothing but outlier columns, and for a token that is all zero."""
    q_w, absmax_w, w = weight(draw, 7, 9)
    x = torch.randn(4, 9, generator=draw)
    x[1] = 0
    x[2] = x[2].sign() * 50 + x[2]
    wide = x.double()
    about = "every column has an outlier, one token is zero"
    yield product(x, q_w, absmax_w, THRESHOLD, wide @ w.T, wide.abs() @ w.T.abs(), about)
    q, x, absmax = codes_and_values(draw, 4, 9, 0.5, 4.0)
    q[1], x[1] = 0, 0
    decoded = q * absmax.unsqueeze(1) / 127
    about = "no outliers, one token is zero"
    yield product(x.float(), q_w, absmax_w, THRESHOLD, decoded @ w.T, decoded.abs() @ w.T.abs(), about)
