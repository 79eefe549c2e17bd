"""e24: golden codes of bitsandbytes, Adam in float64 with the same rounding of its state, and pages moved by hand."""

import torch

from minift.course.spec import Case, check

EPS = torch.finfo(torch.float32).eps
# One step is some ten roundings of float32 on a parameter of size 1, there are at most 4 steps; m^ / sqrt(v^) may be
# some 100 times lr = 0.01 where v has faded to the code of 0, which adds as much again.
TOLERANCE = 4 * 64 * EPS
NAMES = ("codes", "absmax")

# bitsandbytes 0.50.2, functional.quantize_blockwise(x, code=create_dynamic_map(signed=True), blocksize=64) on the CPU:
# none of these 70 values is near enough to a midpoint for its table of 65536 entries to matter.
GOLDEN_X = [
    -0.023, 0.108, -0.2346, 0.0215, 0.1995, -0.086, 0.4862, -0.479, -0.0145, -0.0918, 0.0746, -0.0659, 0.2739, 0.0613,
    0.1722, 0.1249, 0.0785, 0.2793, -0.1543, -0.4955, 0.3138, 0.1567, -0.05, 0.0159, 0.1691, 0.677, 0.5608, -0.3586,
    0.3044, 0.1378, 0.7309, -0.044, -0.1428, -0.0879, -0.1044, 0.1046, 0.0104, -0.0203, 0.1287, -0.2604, -0.0814,
    0.0425, 0.0389, 0.2044, -0.2875, 0.0192, 0.1977, 0.2458, -0.1366, 0.6637, -0.1131, -0.0431, 0.1944, -0.6977,
    -0.3146, 0.3417, 0.2174, 0.3239, 0.5191, -0.4414, 0.342, 0.6181, -0.2693, -0.5613, 0.1008, 0.1503, 0.164, -0.0793,
    -0.1761, 0.2613,
]  # fmt: skip
GOLDEN_CODES = [
    88, 194, 48, 165, 203, 62, 231, 24, 92, 62, 190, 67, 210, 185, 200, 196, 191, 211, 56, 22, 214, 199, 75, 163, 200,
    249, 238, 36, 213, 197, 255, 78, 57, 62, 60, 194, 160, 89, 196, 45, 63, 176, 174, 203, 43, 164, 203, 207, 57, 248,
    60, 78, 202, 3, 40, 217, 205, 215, 234, 28, 217, 244, 44, 16, 211, 224, 228, 49, 23, 255,
]  # fmt: skip
GOLDEN_ABSMAX = [0.73089998960495, 0.2612999975681305]


def dynamic(signed):
    """The dynamic map of bitsandbytes; the sha256 of its 1024 bytes starts with e732639a (signed), 305f002c (not)."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        means = (10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += means + ([-value for value in means] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


SIGNED, UNSIGNED = dynamic(True), dynamic(False)


def largest(x, block):
    return torch.tensor([float(part.abs().max()) for part in x.split(block)], dtype=torch.float64)


def spread(absmax, block, count):
    return torch.repeat_interleave(absmax, block)[:count]


def from_codes(draw, count, block, scale):
    """Values at most 0.8 of the way from the number of their code to the midpoint; one of each block is +-absmax."""
    table = SIGNED.double()
    codes = torch.randint(1, 255, (count,), generator=draw)
    off = (torch.rand(count, generator=draw, dtype=torch.float64) * 2 - 1) * 0.4
    gap = torch.where(off < 0, table[codes] - table[codes - 1], table[codes + 1] - table[codes])
    values = table[codes] + off * gap
    for number, first in enumerate(range(0, count, block)):
        top = first + int(torch.randint(min(block, count - first), (1,), generator=draw))
        values[top], codes[top] = (1.0, 255) if number % 2 else (-1.0, 0)
    return codes.to(torch.uint8), (values * spread(scale.double(), block, count)).float()


@check(points=1)
def blocks_of_codes(draw):
    """Every value becomes the nearest number of the table, on the scale of its own block, and comes back from it."""
    golden = torch.tensor(GOLDEN_CODES, dtype=torch.uint8), torch.tensor(GOLDEN_ABSMAX)
    given = {"x": torch.tensor(GOLDEN_X), "table": SIGNED, "block": 64}
    yield Case("quantize", given, golden, rtol=4 * EPS, names=NAMES, about="70 numbers, codes made by bitsandbytes")

    scale = torch.tensor([0.02, 3.0, 0.4, 50.0, 0.7]) * (1 + torch.rand(5, generator=draw))
    codes, x = from_codes(draw, 33, 8, scale)
    codes[16:24], x[16:24], scale[2] = 127, 0, 0
    about = "3 x 11 in blocks of 8: scales far apart, the third block is zero, the last has one value"
    given = {"x": x.view(3, 11), "table": SIGNED, "block": 8}
    yield Case("quantize", given, (codes.view(3, 11), scale), rtol=4 * EPS, names=NAMES, about=about)
    about = "a transposed view: its blocks run along its own rows"
    given = {"x": x.view(3, 11).T.contiguous().T, "table": SIGNED, "block": 8}
    yield Case("quantize", given, (codes.view(3, 11), scale), rtol=4 * EPS, names=NAMES, about=about)
    codes, x = from_codes(draw, 300, 256, scale[3:])
    given = {"x": x, "table": SIGNED}
    yield Case("quantize", given, (codes, scale[3:]), rtol=4 * EPS, names=NAMES, about="300 numbers, the default block")

    codes = torch.randint(0, 256, (5, 7), generator=draw)
    back = UNSIGNED[codes].double() * spread(scale.double(), 8, 35).view(5, 7)
    given = {"codes": codes.to(torch.uint8), "absmax": scale, "table": UNSIGNED, "block": 8}
    yield Case("dequantize", given, back.float(), rtol=4 * EPS, about="5 x 7 codes in blocks of 8")
    codes = torch.randint(0, 256, (300,), generator=draw)
    back = SIGNED[codes].double() * spread(scale[3:].double(), 256, 300)
    given = {"codes": codes.to(torch.uint8), "absmax": scale[3:], "table": SIGNED}
    yield Case("dequantize", given, back.float(), rtol=4 * EPS, about="300 codes, the default block")


class Moment:
    """One of m and v: float64, rounded between two steps if it has enough elements."""

    def __init__(self, count, beta, table, block, rounded):
        self.beta, self.table, self.block, self.rounded = beta, table.double(), block, rounded
        self.value = torch.zeros(count, dtype=torch.float64)

    def next(self, new):
        return self.beta * self.value + (1 - self.beta) * new

    def near_a_tie(self, new):
        """Where some float32 roundings in other places might give another code."""
        if not self.rounded:
            return torch.zeros(len(new), dtype=torch.bool)
        value, divisor = self.next(new), self._divisor(self.next(new))
        slack = 16 * EPS * (self.beta * self.value.abs() + (1 - self.beta) * new.abs() + value.abs()) / divisor
        distance = (value / divisor).unsqueeze(1) - (self.table[1:] + self.table[:-1]) / 2
        return (distance.abs().amin(1) <= slack) & (value != 0)

    def _divisor(self, value):
        absmax = largest(value, self.block)
        return spread(torch.where(absmax == 0, 1.0, absmax), self.block, len(value))

    def store(self, value):
        """Keeps what is left of a value, returns what is stored for it."""
        if not self.rounded:
            self.value = value
            return [value.float()]
        normalized = value / self._divisor(value)
        codes = (normalized.unsqueeze(1) - self.table).abs().argmin(1)
        absmax = largest(value, self.block).float()
        self.value = self.table[codes] * spread(absmax.double(), self.block, len(value))
        return [codes.to(torch.uint8), absmax]


def gradient(draw, count, silent, size):
    """Magnitudes from 1e-6 to 1 (times size), so that the squares go from 1e-12 to 1; zero where silent."""
    sign = torch.randint(0, 2, (count,), generator=draw) * 2 - 1
    value = sign * 10.0 ** (-6 * torch.rand(count, generator=draw, dtype=torch.float64))
    return torch.where(silent, 0.0, value * size).float().double()


def run(draw, counts, steps, options, silent=(), size=1.0):
    """Start values, gradients, and what is seen after each step. Gradients that lead near a tie are drawn anew."""
    full = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "block": 256, "min_8bit_size": 4096} | options
    (b1, b2), block = full["betas"], full["block"]
    start = [torch.randn(count, generator=draw) for count in counts]
    values = [value.double() for value in start]
    big = [count >= full["min_8bit_size"] for count in counts]
    moments = [
        (Moment(count, b1, SIGNED, block, rounded), Moment(count, b2, UNSIGNED, block, rounded))
        for count, rounded in zip(counts, big, strict=True)
    ]
    quiet = [torch.tensor([i // block in silent for i in range(count)]) for count in counts]
    gradients, seen = [], []
    for t in range(1, steps + 1):
        gradients.append([])
        seen.append([])
        for i, (m, v) in enumerate(moments):
            g = gradient(draw, counts[i], quiet[i], size)
            while (again := m.near_a_tie(g) | v.near_a_tie(g * g)).any():
                g = torch.where(again, gradient(draw, counts[i], quiet[i], size), g)
            new_m, new_v = m.next(g), v.next(g * g)
            move = new_m / (1 - b1**t) / ((new_v / (1 - b2**t)).sqrt() + full["eps"])
            values[i] = values[i] - full["lr"] * move
            gradients[-1].append(g.float())
            seen[-1].append([values[i].float(), *m.store(new_m), *v.store(new_v)])
    given = {"start": start, "gradients": gradients, "tables": [SIGNED, UNSIGNED], "options": options}
    return given, seen


def adam_case(given, seen, about):
    return Case("trajectory", given, seen, atol=TOLERANCE, rtol=64 * EPS, about=about)


@check(points=2)
def adam_on_codes(draw):
    """Every step computes in float32 with what was stored, and stores m signed and v unsigned, block by block."""
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5, "block": 32, "min_8bit_size": 100}
    given, seen = run(draw, [137], 4, options, silent=(2,))
    yield adam_case(given, seen, "137 weights in 5 blocks, 4 steps; the third block has no gradient but zeros")


@check(points=1)
def small_parameters_stay(draw):
    """A parameter with fewer than min_8bit_size elements keeps float32 state; each parameter has its own state."""
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "block": 8, "min_8bit_size": 20}
    given, seen = run(draw, [19, 20, 26], 3, options)
    yield adam_case(given, seen, "19, 20 and 26 weights, 8 bits from 20 on")
    codes = [torch.uint8, torch.float32] * 2
    expect = [([torch.float32] * 2, 8 * 4095), (codes, 2 * 4096 + 8 * 16), (codes, 2 * 4100 + 8 * 17)]
    given = {"sizes": [4095, 4096, 4100], "tables": [SIGNED, UNSIGNED], "options": {}}
    yield Case("stored_at_first", given, expect, about="dtypes and bytes of the state, nothing given but the tables")
    given, seen = run(draw, [3], 2, {}, size=1e-6)
    yield adam_case(given, seen, "3 weights, 2 steps, gradients as small as eps, nothing given but the tables")


def pages(draw, **shapes):
    return {name: (torch.rand(count, generator=draw) * 100 + 10).to(dtype) for name, (count, dtype) in shapes.items()}


@check(points=1)
def least_recent_goes_first(draw):
    """The page that was acquired longest ago makes room, and what was changed on the device is not lost."""
    store = pages(draw, a=(3, torch.float32), b=(3, torch.float32), c=(3, torch.float32))
    a, b, c = store.values()
    given = {
        "budget": 30,
        "store": store,
        "actions": [("use", "a", 1), ("use", "b", 2), ("use", "a", 4), ("use", "c", 8), ("use", "b", 16),
                    ("use", "a", None), ("use", "c", None), ("use", "b", None)],
    }  # fmt: skip
    expect = [
        (a, ["a"], 12), (b, ["a", "b"], 24), (a + 1, ["b", "a"], 24), (c, ["a", "c"], 24), (b + 2, ["c", "b"], 24),
        (a + 1 + 4, ["b", "a"], 24), (c + 8, ["a", "c"], 24), (b + 2 + 16, ["c", "b"], 24),
    ]  # fmt: skip
    yield Case("pages", given, expect, about="three pages of 12 bytes, room for 30; each is used and released at once")


@check(points=1)
def bytes_and_pins(draw):
    """Room is counted in bytes, exactly full is allowed, and a page in use is never evicted."""
    store = pages(draw, f=(5, torch.float32), u=(20, torch.uint8), h=(3, torch.float16), w=(11, torch.float32))
    f, u, h, _ = store.values()
    actions = [("use", "f", None), ("use", "u", 1), ("use", "h", None), ("use", "f", None), ("use", "w", None)]
    expect = [(f, ["f"], 20), (u, ["f", "u"], 40), (h, ["u", "h"], 26), (f, ["h", "f"], 26), "no room for w"]
    about = "pages of 20 (float32), 20 (uint8), 6 (float16) and 44 bytes, room for 40"
    yield Case("pages", {"budget": 40, "store": store, "actions": actions}, expect, about=about)

    store = pages(draw, a=(2, torch.float32), b=(2, torch.float32), c=(2, torch.float32), d=(2, torch.float32))
    a, b, c, d = store.values()
    actions = [("acquire", "a", 1), ("use", "b", None), ("use", "c", None), ("acquire", "a", 2), ("release", "a", None),
               ("use", "b", None), ("use", "d", 4), ("release", "a", None), ("acquire", "c", None),
               ("acquire", "d", None), ("use", "b", None)]  # fmt: skip
    expect = [
        (a, ["a"], 8), (b, ["a", "b"], 16), (c, ["a", "c"], 16), (a + 1, ["c", "a"], 16), (None, ["c", "a"], 16),
        (b, ["a", "b"], 16), (d, ["a", "d"], 16), (None, ["a", "d"], 16), (c, ["d", "c"], 16),
        (d + 4, ["c", "d"], 16), "no room for b",
    ]  # fmt: skip
    about = "four pages of 8 bytes, room for 16; a is in use, for a while twice, c and d at the end"
    yield Case("pages", {"budget": 16, "store": store, "actions": actions}, expect, about=about)
