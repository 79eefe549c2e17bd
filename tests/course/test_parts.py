"""The parts of the judge that exercises rely on: transport, guard bands, comparison, detectors, automatic changes."""

import ast
import io
import itertools
import math

import pytest
import torch

from minift.course.ast_mutants import changes
from minift.course.compare import compare, distances
from minift.course.detect import likely_cause
from minift.course.grader import Grader
from minift.course.judge import PUBLIC_KEY, seed_of
from minift.course.policy import violations
from minift.course.registry import read_exercise
from minift.course.runner import Runner
from minift.course.scaffold import scaffold
from minift.course.selfcheck import Report, check_shapes
from minift.course.spec import Case
from minift.course.worker import wire


def there_and_back(value, whole=False):
    (found,) = wire.frames(io.BytesIO(wire.pack(value, whole)))
    return found


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5)])
def test_tensors_travel_bit_for_bit(dtype, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    y = there_and_back(x)
    assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, y)


def test_plain_values_travel():
    value = {"a": [1, 2.5, None, "x", (True, -0.0)], 3: torch.float16, "inf": math.inf}
    assert there_and_back(value) == value
    assert math.copysign(1, there_and_back(-0.0)) == -1 and math.isnan(there_and_back(math.nan))


def test_views_arrive_as_they_were():
    base = torch.arange(40.0)
    view = base[4:34].view(5, 6).T[1:, ::2]
    there = there_and_back(view, whole=True)
    assert torch.equal(there, view) and there.stride() == view.stride()
    assert there.storage_offset() == view.storage_offset() and there.untyped_storage().nbytes() == 160
    assert there_and_back(view).is_contiguous()


def test_generators_go_on_where_they_were():
    generator = torch.Generator().manual_seed(5)
    torch.randn(3, generator=generator)
    assert torch.equal(torch.randn(4, generator=there_and_back(generator)), torch.randn(4, generator=generator))


def test_other_objects_do_not_travel():
    class Liar(float):
        pass

    for value in (Liar(1.0), {1, 2}, object(), lambda: 0, torch.zeros(2).numpy()[0]):
        with pytest.raises(TypeError, match="neither"):
            wire.pack([value])


def test_a_frame_that_was_cut_off_is_left_out():
    data = wire.pack({"a": torch.ones(9)}) + wire.pack({"b": torch.ones(9)})
    for length in range(len(data) // 2 + 1, len(data)):
        assert len(list(wire.frames(io.BytesIO(data[:length])))) == 1


SCALE = """
import torch
def scale(x, out):
    {body}
"""


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("out.copy_(2 * x)", "pass"),
        ("out.copy_(2 * x); out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(7)", "fail"),
        ("out.copy_(2 * x); out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(7)", "fail"),
        ("pass", "fail"),
        ("out.copy_(2 * x); x.zero_()", "fail"),
    ],
    ids=["right", "writes before", "writes after", "writes nothing", "changes the input"],
)
def test_guard_bands_show_what_a_kernel_writes_outside(tmp_path, body: str, status: str):
    """A kernel without a mask gives the right numbers on a CPU; only the memory around its output shows it."""
    scaffold(tmp_path / "x1_guarded")
    (tmp_path / "x1_guarded" / "checks.py").write_text('''"""Guarded."""
import torch
from minift.course.spec import Case, check


@check(points=1)
def stays_inside(draw):
    """The output is written, and nothing around it."""
    x = torch.randn(13, generator=draw)
    for canary in (3.0, -77.0):
        base = torch.full((29,), canary)
        after = base.clone()
        after[8:21] = 2 * x
        yield Case("scale", {"x": x, "out": base[8:21]}, changes={"out": after})
''')
    manifest = tmp_path / "x1_guarded" / "exercise.toml"
    manifest.write_text(manifest.read_text().replace('"double"', '"scale"'))
    with Runner() as runner, Grader(runner=runner) as grader:
        exercise = read_exercise(tmp_path / "x1_guarded")
        exercise.__dict__["mutants"] = ()
        assert grader.grade(exercise, SCALE.format(body=body), "x1.py").status == status


def test_a_square_input_is_a_problem(tmp_path):
    """Also where it lies in a list of a dictionary; a dimension of one is no square."""
    scaffold(tmp_path / "x3_square")
    exercise, report = read_exercise(tmp_path / "x3_square"), Report()
    shapes = [(3, 7), (1, 5, 1), (4, 2, 4)]
    given = {"x": {"parts": [torch.zeros(shape) for shape in shapes]}, "n": 3}
    check_shapes(exercise, [(0, Case("double", given))], report, b"a key")
    assert len(report.problems) == 1
    assert "twice gives double x['parts'][2] of shape (4, 2, 4)" in report.problems[0]


def test_a_check_without_a_single_answer_is_not_passed(tmp_path):
    scaffold(tmp_path / "x2_empty")
    checks = tmp_path / "x2_empty" / "checks.py"
    checks.write_text(checks.read_text().replace("    yield Case", "    if x is None:\n        yield Case"))
    exercise = read_exercise(tmp_path / "x2_empty")
    with Runner() as runner, Grader(runner=runner) as grader:
        verdict = grader.grade(exercise, exercise.text("solution.py"), "x2.py")
    assert verdict.earned == 0 and verdict.status != "pass"


def test_distance_is_measured_in_tolerances():
    want = torch.tensor([0.0, 10.0, math.nan, math.inf, 1.0])
    have = torch.tensor([0.5, 10.0, math.nan, math.inf, math.nan])
    assert distances(want, have, atol=0.25, rtol=0.0).tolist() == [2.0, 0.0, 0.0, 0.0, math.inf]
    assert distances(want[1:2], torch.tensor([11.0]), atol=0.5, rtol=0.15).tolist() == [0.5]
    assert distances(want[1:2], torch.tensor([11.0]), 0.0, 0.0).tolist() == [math.inf]


@pytest.mark.parametrize(("atol", "rtol"), [(0.0, 0.0), (0.25, 0.0), (0.0, 0.5), (0.25, 0.5)])
def test_a_number_is_as_far_off_as_a_tensor_of_one(atol: float, rtol: float):
    numbers = [0.0, -0.0, 1.0, -1.1, 1e300, -1e308, 1.7e308, 5e-324, math.inf, -math.inf, math.nan, 3]
    for want, have in itertools.product(numbers, repeat=2):
        one, other = (torch.tensor([number], dtype=torch.float64) for number in (want, have))
        case = Case("f", {}, want, atol, rtol)
        assert compare(case, have).size == float(distances(one, other, atol, rtol)), (want, have)


@pytest.mark.parametrize(
    ("expect", "answer", "right"),
    [
        (1.5, 1.5, True), (1.5, torch.tensor(1.5), True), (1, True, False), (True, 1, False), (1.5, "1.5", False),
        ((1, 2), [1, 2], True), ((1, 2), (1, 2, 3), False), ({"a": 1}, {"b": 1}, False), (None, None, True),
        ("x", "y", False), (torch.zeros(2), torch.zeros(3), False), (torch.zeros(2), torch.zeros(2).double(), False),
        (torch.zeros(2), torch.zeros(2, 1), False), (torch.zeros(2), 0.0, False), (torch.int8, torch.int8, True),
    ],
)  # fmt: skip
def test_answers_must_be_of_the_same_kind(expect, answer, right: bool):
    found = compare(Case("f", {}, expect), answer)
    assert (found.size <= 1) == right and (found.message is None) == right


@pytest.mark.parametrize(
    "expect",
    [(3.25, "secret"), [3.25], {"secret": 3.25}, 3.25, 7, "secret", torch.tensor([3.25]), torch.uint8],
    ids=str,
)
@pytest.mark.parametrize(
    "answer", [None, object, b"x", (), torch.zeros(5, 1)], ids=lambda answer: type(answer).__name__
)
def test_an_answer_of_another_kind_is_not_told_the_expected_value(expect, answer):
    """Whoever returns nothing must not read the answer in the message, and be done."""
    said = compare(Case("f", {}, expect), answer).message or ""
    assert "answer" in said and not any(value in said for value in ("3.25", "secret", "7", "uint8")), said


def test_texts_are_compared_where_they_differ():
    want = "x" * 500 + "one end"
    said = {
        have: compare(Case("f", {}, want), have).message or "" for have in (want[:-3], want + "\n", want[:-3] + "END")
    }
    assert "right up to character 504, and then too short (3)" in said[want[:-3]]
    assert "too long (1)" in said[want + "\n"]
    assert "from character 504 on: yours 'xxxxxxxxone END', expected 'xxxxxxxxone end'" in said[want[:-3] + "END"]


def test_patterns_are_named():
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    packed = torch.randint(0, 256, (9,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pairs = {
        "wrong sign": (x, -x), "3 times": (x, 3 * x), "transposed": (x, x.T), "all zero": (x, 0 * x),
        "shifted by one along dimension 0": (x, x.roll(1, 0)), "NaN": (x, x / 0 * 0),
        "halves of every byte": (packed, (packed >> 4) | (packed << 4)),
    }  # fmt: skip
    low_first = torch.stack([packed & 15, packed >> 4], 1).flatten()
    high_first = torch.stack([packed >> 4, packed & 15], 1).flatten()
    numbers = x.flatten()[low_first.long()], x.flatten()[high_first.long()]  # what the codes stand for
    for number, (have, want) in enumerate([(low_first, high_first), (low_first[:-1], high_first[:-1]), numbers]):
        pairs["two by two" + number * " "] = want, have
    for words, (want, have) in pairs.items():
        assert words.strip() in (likely_cause(want, have, want != have) or ""), words
    assert likely_cause(x, x + torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), x == x) is None


def test_policy_names_the_line_and_leaves_the_rest_alone():
    assert violations("import torch\nfrom minift.quant import x\n") == ["line 2: minift may not be imported here"]
    assert violations("import torch.nn.functional as F\nF.gelu(1)\n", ("torch.nn.functional.gelu",)) == [
        "line 2: this exercise is solved without torch.nn.functional.gelu"
    ]
    assert violations("from torch.nn.functional import gelu\n", ("torch.nn.functional.gelu",))
    assert violations("x = eval('1')\n") == ["line 1: eval may not be used here"]
    assert (
        violations("import re, math, torch\nmodel.eval()\nre.compile('x')\ngelu = 1\n", ("torch.nn.functional.gelu",))
        == []
    )


def test_seeds_depend_on_everything_and_are_the_same_everywhere():
    assert seed_of(PUBLIC_KEY, "e01", "one_scale", 0) == seed_of(PUBLIC_KEY, "e01", "one_scale", 0)
    seeds = {
        seed_of(key, one, name, i) for key in (b"a", b"b") for one in ("x", "y") for name in ("p", "q") for i in (0, 1)
    }
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)


def test_automatic_changes_are_small_and_different():
    source = '"""Text 7."""\n\n\ndef f(x, n: int = 3):\n    """Doc."""\n    y = x - 1\n    return y if n < 2 else -y\n'
    texts = {change.text for change in changes(source)}
    assert {"x - 1 -> x + 1 in y = x - 1", "n < 2 -> n <= 2 in return y if n < 2 else -y", "3 -> 4 in def f"} <= texts
    assert "y = x - 1 -> pass" in texts and not any("Text" in text or "Doc" in text for text in texts)
    assert len({change.source for change in changes(source)}) == len(changes(source))
    for change in changes(source):
        ast.parse(change.source)
