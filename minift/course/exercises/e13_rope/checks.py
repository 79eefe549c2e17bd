"""e13: the oracle is complex multiplication in float64, and for two tables numbers recorded from transformers."""

import math

import torch

from minift.course.spec import Case, check

BATCH, HEADS, LENGTH, WIDTH = 2, 3, 5, 8
EPS = torch.finfo(torch.float32).eps
NAMES = ("cos", "sin")

# Recorded from transformers 5.23.0, LlamaRotaryEmbedding and apply_rotary_pos_emb: head_dim 6, rope_theta 10000,
# positions 3, 1, 700, float32. The tables hold these three columns twice.
GOLDEN_POSITIONS = torch.tensor([[3, 1, 700]])
GOLDEN_COS = torch.tensor(
    [
        [-0.9899924993515015, 0.9903206825256348, 0.9999791383743286],
        [0.5403023362159729, 0.9989229440689087, 0.9999976754188538],
        [-0.8391042947769165, 0.47556260228157043, 0.06265117973089218],
    ]
)
GOLDEN_SIN = torch.tensor(
    [
        [0.14112000167369843, 0.1387980878353119, 0.006463258061558008],
        [0.8414709568023682, 0.04639922082424164, 0.0021544327028095722],
        [0.54397052526474, 0.8796818852424622, 0.9980354905128479],
    ]
)
GOLDEN_X = torch.tensor([[1.0, 2, 3, 4, 5, 6], [-1, 0.5, 2, 0.25, -3, 1], [0.5, -1, 1.5, -2, 2, -0.5]])
GOLDEN_TURNED = torch.tensor(  # the three turned vectors one after another
    [
        *(-1.5544724464416504, 1.2866508960723877, 2.961158037185669, -3.818850040435791),
        *(5.229199409484863, 6.0192646980285645, -0.7506700754165649, 0.6386591196060181),
        *(1.9978408813476562, -0.7063953876495361, -2.973569393157959, 1.0043065547943115),
        *(0.6683889031410217, -2.234926462173462, 0.5929945111274719, 1.9501938819885254),
        *(0.07144331932067871, 1.465727686882019),
    ]
).view(3, 6)


def far_enough(positions):
    """float32 knows a frequency to some eps, so an angle to some eps times the position, and cos and sin like it."""
    return 16 * EPS * (1 + int(positions.max()))


def angles(positions, width, theta):
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    return positions.double().unsqueeze(-1) * torch.exp(-steps * math.log(theta))


def wide_tables(positions, width, theta):
    both = angles(positions, width, theta).repeat(1, 1, 2)
    return both.cos().float(), both.sin().float()


def numbers(draw, *shape):
    return torch.randn(*shape, generator=draw)


def pairs(x):
    half = x.shape[-1] // 2
    return torch.complex(x[..., :half].double(), x[..., half:].double())


def tables_case(positions, theta, about):
    given = {"position_ids": positions, "width": WIDTH, "theta": theta}
    expect = wide_tables(positions, WIDTH, theta)
    return Case("tables", given, expect, atol=far_enough(positions), names=NAMES, about=f"{about}, theta {theta:g}")


def rotate_case(draw, dtype, atol):
    x = numbers(draw, BATCH, HEADS, LENGTH, WIDTH).to(dtype)
    turn = torch.rand(BATCH, LENGTH, WIDTH // 2, generator=draw, dtype=torch.float64) * 2 * math.pi
    turned = pairs(x) * torch.polar(torch.ones_like(turn), turn).unsqueeze(1)
    expect = torch.cat((turned.real, turned.imag), -1).to(dtype)
    given = {"x": x, "cos": turn.cos().float().repeat(1, 1, 2), "sin": turn.sin().float().repeat(1, 1, 2)}
    return Case("rotate", given, expect, atol=atol, about=f"x is {str(dtype).removeprefix('torch.')}")


def attention_case(draw, positions, theta, about):
    q, k, v = (numbers(draw, BATCH, HEADS, LENGTH, WIDTH) for _ in range(3))
    apart = positions.unsqueeze(2) - positions.unsqueeze(1)
    # Only distances enter here: a score is the real part of q * conj(k), turned by the distance of the two positions.
    turn = torch.polar(torch.ones((), dtype=torch.float64), angles(apart.flatten(1), WIDTH, theta))
    turn = turn.view(BATCH, 1, LENGTH, LENGTH, WIDTH // 2)
    scores = (pairs(q).unsqueeze(3) * pairs(k).conj().unsqueeze(2) * turn).real.sum(-1) / math.sqrt(WIDTH)
    expect = (scores.softmax(-1) @ v.double()).float()
    given = {"q": q, "k": k, "v": v, "position_ids": positions, "theta": theta}
    # A score is a sum of WIDTH products of two turned numbers of size up to 4.
    atol = far_enough(positions) * 16 * math.sqrt(WIDTH)
    return Case("attention", given, expect, atol=atol, about=f"{about}, theta {theta:g}")


@check(points=1)
def angles_of_positions(draw):
    """The angle of pair i at position p is p * theta ^ (-2i / width), with the positions that are given."""
    later = torch.arange(LENGTH) + torch.tensor([[7], [3]])
    yield tables_case(later, 10000.0, "positions from 7 and from 3")
    packed = torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 5, 6]])
    yield tables_case(packed, 500000.0, "positions that begin again within a row")


@check(points=1)
def far_positions(draw):
    """Positions in the thousands are still told apart."""
    positions = torch.randint(2000, 4000, (BATCH, LENGTH), generator=draw) * 2 + 1
    yield tables_case(positions, 10000.0, "odd positions from 4000 to 8000")
    yield tables_case(positions, 500000.0, "odd positions from 4000 to 8000")


@check(points=1)
def turns_pairs(draw):
    """rotate turns number i and number i + width / 2 as a pair, counterclockwise, the same way in all heads."""
    # Two products and a sum of numbers up to 5 in float32; in bfloat16 the same, should somebody compute in it.
    yield rotate_case(draw, torch.float32, 64 * EPS)
    yield rotate_case(draw, torch.bfloat16, 32 * torch.finfo(torch.bfloat16).eps)


@check(points=1)
def as_in_llama(draw):
    """Tables and a turned vector are those of Llama, recorded from transformers."""
    given = {"position_ids": GOLDEN_POSITIONS, "width": 6, "theta": 10000.0}
    cos, sin = GOLDEN_COS.repeat(1, 2).unsqueeze(0), GOLDEN_SIN.repeat(1, 2).unsqueeze(0)
    tolerance = far_enough(GOLDEN_POSITIONS)
    yield Case("tables", given, (cos, sin), atol=tolerance, names=NAMES, about="positions 3, 1, 700, width 6")
    given = {"x": GOLDEN_X[None, None], "cos": cos, "sin": sin}
    yield Case("rotate", given, GOLDEN_TURNED[None, None], atol=64 * EPS, about="one head of width 6")


@check(points=1)
def only_distances_count(draw):
    """Attention sees how far two tokens are apart, wherever they stand; values are not turned."""
    near = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    yield attention_case(draw, near, 10000.0, "a row from 0 and a left-padded row")
    yield attention_case(draw, near * 3 + 137, 500000.0, "steps of 3 from position 137")
