"""e21: sums in float64 from the definition; NF4 by distance to the table, with recorded bytes of bitsandbytes."""

import torch

from minift.course.spec import Case, check

EPS = torch.finfo(torch.float32).eps
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]).double()  # fmt: skip
IN, OUT, RANK, ALPHA = 22, 10, 4, 12.0  # 220 weights: three blocks of 64 and one of 28

# bitsandbytes 0.50.2 on CPU: quantize_4bit (nf4, blocks of 64) of a (6, 16) weight; then of that weight decoded plus
# alpha / r * b @ a, for the adapter of recorded_adapter() with alpha = 3.
RECORDED = {
    False: (
        "08cb4ded4cd914419dc4ded4bc803307b92ac91783e10d253f463e12f7cc5e0e8e0e5cc7f21e364f352d01e38719ca29",
        [1.25, 1.25],
    ),
    True: (
        "26d93bce3dbb17319dd88fa29a815523a626e44a95d20b1a2f385e31f4c87b1eba1965bde71f292f554c02c4781abb37",
        [1.559946060180664, 1.53125],
    ),
}


def recorded(merged: bool) -> tuple[torch.Tensor, torch.Tensor]:
    text, absmax = RECORDED[merged]
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8), torch.tensor(absmax)


def recorded_adapter() -> tuple[torch.Tensor, torch.Tensor]:
    i, o = torch.arange(16), torch.arange(6)
    a = torch.stack([(7 * i + 3) % 13 - 6, (5 * i + 1) % 11 - 5]) / 8
    return a, torch.stack([(3 * o + 2) % 7 - 3, (4 * o + 1) % 5 - 2], 1) / 4


def adapter(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(RANK, IN, generator=draw), torch.randn(OUT, RANK, generator=draw) * 0.2


def delta(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    return alpha / len(a) * torch.einsum("or,ri->oi", b.double(), a.double())


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """packed, absmax, and how far the number closest to a change of code is away from it, in parts of its absmax."""
    flat = weight.double().flatten()
    absmax = torch.stack([part.abs().amax() for part in flat.split(64)])
    unit = flat / absmax.repeat_interleave(64)[: len(flat)]
    code = (unit.unsqueeze(1) - NF4).abs().argmin(1).to(torch.uint8)
    margin = float((unit.unsqueeze(1) - (NF4[1:] + NF4[:-1]) / 2).abs().min())
    return code[0::2] * 16 + code[1::2], absmax.float(), margin


def decode(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    code = torch.stack([packed // 16, packed % 16], 1).flatten().long()
    return (NF4[code] * absmax.double().repeat_interleave(64)[: len(code)]).view(shape)


def tolerance(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float) -> float:
    """Rounding of float32 in a sum over the inputs and one over the rank, of the sizes that are added there."""
    size = weight.double().abs() + delta(a.abs(), b.abs(), alpha)
    return 4 * EPS * x.shape[-1] ** 0.5 * float((x.double().abs() @ size.T).max())


@check(points=1)
def merged_alone(draw):
    """merge puts W + alpha / r * B A into the weight, and forward then uses the weight alone: the answer stays."""
    weight, (a, b) = torch.randn(OUT, IN, generator=draw), adapter(draw)
    x = torch.randn(3, 5, IN, generator=draw)
    merged = weight.double() + delta(a, b, ALPHA)
    y = (x.double() @ merged.T).float()
    given = {"weight": weight, "a": a, "b": b, "alpha": ALPHA, "x": x, "steps": ["forward", "merge", "show", "forward"]}
    names = ("forward", "merged weight", "forward after merge")
    about = f"weight {OUT} x {IN}, r = {RANK}, alpha = {ALPHA:g}"
    yield Case("play", given, [y, merged.float(), y], tolerance(x, weight, a, b, ALPHA), names=names, about=about)


@check(points=1)
def twice_and_back(draw):
    """Merging twice is merging once, unmerge restores every bit, and both can be done again or too often."""
    weight, (a, b) = torch.randn(OUT, IN, generator=draw), adapter(draw)
    x = torch.randn(7, IN, generator=draw)
    merged = weight.double() + delta(a, b, ALPHA)
    y, given = (x.double() @ merged.T).float(), {"weight": weight, "a": a, "b": b, "alpha": ALPHA, "x": x}
    atol = tolerance(x, weight, a, b, ALPHA)
    steps = ["merge", "merge", "show", "forward", "unmerge", "forward", "merge", "show"]
    names = ("weight merged twice", "forward", "forward after unmerge", "weight merged again")
    about = "merge, merge, unmerge, merge"
    expect = [merged.float(), y, y, merged.float()]
    yield Case("play", given | {"steps": steps}, expect, atol, names=names, about=about)
    steps = ["unmerge", "show", "merge", "unmerge", "show", "merge", "merge", "unmerge", "unmerge", "show"]
    names = ("weight after unmerge alone", "weight after merge, unmerge", "weight after merge, merge, unmerge, unmerge")
    about = "weights after unmerge, which must be the same to the last bit"
    yield Case("play", given | {"steps": steps}, [weight] * 3, names=names, about=about)


def four_bit(draw: torch.Generator):
    """A weight in NF4 and an adapter whose sum is nowhere near the middle between two codes."""
    while True:
        packed, absmax, _ = encode(torch.randn(OUT, IN, generator=draw))
        a, b = adapter(draw)
        merged = encode(decode(packed, absmax, (OUT, IN)) + delta(a, b, ALPHA))
        if merged[2] > 64 * EPS:
            return packed, absmax, a, b, merged[:2]


@check(points=1)
def four_bit_base(draw):
    """A 4-bit weight is decoded, added to and encoded anew; unmerge restores packed and absmax bit for bit."""
    a, b = recorded_adapter()
    before, after = recorded(False), recorded(True)
    given = {"packed": before[0], "absmax": before[1], "shape": (6, 16), "a": a, "b": b, "alpha": 3.0}
    about = "merge; packed and absmax recorded from bitsandbytes"
    given |= {"x": torch.randn(2, 16, generator=draw), "steps": ["merge", "show"]}
    yield Case("play_4bit", given, after, rtol=16 * EPS, names=("packed", "absmax"), about=about)

    packed, absmax, a, b, merged = four_bit(draw)
    shape, x = (OUT, IN), torch.randn(3, 5, IN, generator=draw)
    weight, rounded = decode(packed, absmax, shape), decode(*merged, shape)
    y = (x.double() @ (weight + delta(a, b, ALPHA)).T).float()
    y_merged = (x.double() @ rounded.T).float()
    given = {"packed": packed, "absmax": absmax, "shape": shape, "a": a, "b": b, "alpha": ALPHA, "x": x}
    steps = ["unmerge", "forward", "merge", "merge", "show", "forward", "unmerge", "forward"]
    names = ("forward", "merged packed", "merged absmax", "forward after merge", "forward after unmerge")
    about = f"weight {OUT} x {IN} in NF4, r = {RANK}, alpha = {ALPHA:g}; merged twice, unmerged"
    atol = tolerance(x, weight, a, b, ALPHA)
    expect = [y, *merged, y_merged, y]
    # The tolerance is for forward, but every absmax is of the same size; the codes are whole numbers.
    yield Case("play_4bit", given | {"steps": steps}, expect, atol, names=names, about=about)
    steps = ["merge", "unmerge", "show", "merge", "merge", "unmerge", "unmerge", "show"]
    names = ("packed after unmerge", "absmax after unmerge", "packed the second time", "absmax the second time")
    about = "packed and absmax after unmerge, which must be the same to the last bit"
    yield Case("play_4bit", given | {"steps": steps}, [packed, absmax] * 2, names=names, about=about)
