"""Submissions that mean harm or are broken: 0 points, the right word for it, no hang, and no harm to the next one.

Every one of them is written for e01, whose solution is graded right afterwards in the same process.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from minift.course import registry
from minift.course.grader import Grader
from minift.course.runner import Runner

E01 = registry.find("e01")
SOLUTION = E01.text("solution.py")
QUICK = replace(E01, seconds=2.0, memory_mb=96)  # the limits, so that reaching them does not take long
DEFINITIONS = """
def quantize(x, dim=None):
    {body}

def dequantize(q, scale):
    {body}
"""


def doing(body: str, imports: str = "import torch") -> str:
    return imports + DEFINITIONS.format(body=body)


HOSTILE = {
    "empty file": ("", "not_started"),
    "imports only": ("import torch\nimport math\n", "not_started"),
    "other names": ("def foo():\n    return 1\n", "not_started"),
    "returns nothing": (doing("return None"), "fail"),
    "returns its first argument": (
        "def quantize(x, dim=None):\n    return x\ndef dequantize(q, scale):\n    return q\n", "fail"),
    "zeros of the right kind": (
        "import torch\ndef quantize(x, dim=None):\n    return torch.zeros_like(x).to(torch.int8), torch.ones(())\n"
        "def dequantize(q, scale):\n    return torch.zeros_like(q * scale)\n", "fail"),
    "equal to everything": (
        doing("return Same()", "class Same:\n    def __eq__(self, o): return True\n    def __len__(self): return 2\n"),
        "fail"),
    "a tensor that is equal to everything": (
        doing("return torch.zeros(3).as_subclass(Same)",
              "import torch\nclass Same(torch.Tensor):\n    def __eq__(self, o): return True\n"), "fail"),
    "a tuple that is equal to everything": (
        doing("return Same((1, 2))", "class Same(tuple):\n    def __eq__(s, o): return True\n"), "fail"),
    "sys.exit": (doing("sys.exit(0)", "import sys"), "fail"),
    "sys.exit while loading": ("import sys\n" + doing("return None") + "sys.exit(0)\n", "import_error"),
    "os._exit": (doing("os._exit(0)", "import os"), "crash"),
    "os._exit while loading": ("import os\n" + doing("return None") + "os._exit(0)\n", "crash"),
    "does not parse": ("def quantize(x:\n", "import_error"),
    "raises while loading": ("import torch\n" + doing("return None") + "1 / 0\n", "import_error"),
    "says that it is done": (
        "import os, json\n" + doing("return None")
        + "head = json.dumps({'body': {'dict': [['done', True]]}, 'sizes': []})\n"
        "for fd in range(3, 20):\n    try: os.write(fd, len(head).to_bytes(8, 'little') + head.encode())\n"
        "    except OSError: pass\nos._exit(0)\n", None),
    "answers with what it was given": (
        "import sys\n" + doing("return sys.exc_info()"), "fail"),
    "recursion without end": (
        doing("(lambda f: f(f))(lambda f: f(f))", "import sys\nsys.setrecursionlimit(10**9)\n"), None),
    "100 GB": (doing("return torch.ones(25 * 10**9)"), "memory"),
    "100 GB, bit by bit": (doing("return [bytearray(10**7) for _ in range(10**4)]"), "memory"),
    "fork bomb": (doing("while True: os.fork()", "import os"), "policy"),
    "spawns and spawns": (
        doing("for _ in range(9):\n        try: os.posix_spawn('/bin/sleep', ['sleep', '60'], {})\n"
              "        except Exception: pass", "import os"), "policy"),
    "kills its parent": (doing("os.kill(os.getppid(), 9)", "import os"), "policy"),
    "floods the output": (doing("for _ in range(2000): print('x' * 100000)\n    return None"), "fail"),
    "imports minift": ("from minift.numerics import quantize_absmax\n" + doing("return None"), "policy"),
    "imports minift behind the scan's back": (
        doing("return vars(builtins)['__imp' + 'ort__']('min' + 'ift')", "import builtins"), "policy"),
    "reads the solution": (doing(f"return open({str(E01.folder / 'solution.py')!r}).read()"), "policy"),
    "writes outside": (doing("open('/tmp/minift-course-was-here', 'w')"), "policy"),
    "removes a file outside": (doing("os.remove('/tmp/minift-course-not-there')", "import os"), "policy"),
    "patches torch": (
        "import torch\ntorch.allclose = torch.equal = lambda *a, **k: True\ntorch.Tensor.__eq__ = lambda *a: True\n"
        + doing("return None"), "fail"),
    "patches json and open": ("import json\njson.dumps = lambda *a, **k: 'true'\n" + doing("return None"), None),
    "changes its input": (
        SOLUTION.replace("    magnitude = x.abs()", "    x[...] = 0\n    magnitude = x.abs()")
        .replace("return q", "q.zero_()\n    return q"), "fail"),
    "deep nesting": (doing("a = []\n    for _ in range(10**5): a = [a]\n    return a"), None),
    "null bytes": ("\0" * 100, "import_error"),
}  # fmt: skip


@pytest.fixture(scope="module")
def grader():
    with Grader() as made:
        yield made


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_submission_gets_nothing(grader, name: str):
    source, status = HOSTILE[name]
    start = time.monotonic()
    verdict = grader.grade(QUICK, source, "hostile.py")
    assert verdict.earned == 0, [(one.name, one.status) for one in verdict.checks]
    assert verdict.status != "pass"
    if status is not None and (sys.platform == "linux" or status != "memory"):
        assert verdict.status == status, (verdict.message, [(one.status, one.message) for one in verdict.checks])
    assert time.monotonic() - start < 2 * E01.seconds + 20
    assert len(verdict.printed) <= 1 << 16
    assert grader.grade(E01, SOLUTION, "solution.py").earned == E01.points


HONEST = {
    "annotations, dataclass, cache": (
        "from __future__ import annotations\nimport dataclasses, functools, math, tempfile, torch, typing\n"
        "@dataclasses.dataclass\nclass Pair:\n    q: torch.Tensor\n@functools.lru_cache\ndef top(): return 2**7 - 1\n"
    ) + SOLUTION.replace("absmax / 127", "absmax / top()"),
    "numpy": "import numpy as np\n" + SOLUTION.replace(
        "torch.round(x / scale)", "torch.from_numpy(np.rint((x / scale).numpy()))"),
    "prints and warns": "import warnings\nwarnings.warn('here')\nprint('loading')\n"
        + SOLUTION.replace("    scale = absmax / 127", "    print(x.shape)\n    scale = absmax / 127"),
    "a module and autograd": SOLUTION + "\nclass Net(torch.nn.Module):\n    pass\nNet().eval()\n"
        "w = torch.ones(2, requires_grad=True)\nw.sum().backward()\n",
    "writes a file of its own": "open('notes.txt', 'w').write('x')\n" + SOLUTION,
    "an optimizer of its own": SOLUTION + "\nclass Mine(torch.optim.Optimizer):\n    pass\n"
        "Mine([torch.ones(2, requires_grad=True)], {'lr': 1.0})\n",
    "runs only as a script": SOLUTION + "\nif __name__ == '__main__':\n    quantize(torch.ones(3))\n    1 / 0\n",
    "a byte order mark and Windows line ends": "\ufeff" + SOLUTION.replace("\n", "\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_code_is_not_refused(grader, name: str):
    verdict = grader.grade_bytes(E01, HONEST[name].encode(), "honest.py")
    assert verdict.status == "pass", (verdict.message, [(one.status, one.message) for one in verdict.checks])


def test_nothing_was_written_outside():
    assert not Path("/tmp/minift-course-was-here").exists()


def test_endless_loop_costs_its_own_check_only(grader):
    """The other checks of the same file are graded all the same."""
    looping = SOLUTION.replace("    return q.to(scale.dtype) * scale", "    while True: pass")
    verdict = grader.grade(QUICK, looping, "loop.py")
    assert [one.status for one in verdict.checks] == ["pass", "pass", "timeout"]
    assert verdict.status == "timeout" and verdict.earned == 2


def test_endless_loop_everywhere_ends(grader):
    start = time.monotonic()
    verdict = grader.grade(QUICK, doing("while True: pass"), "loop.py")
    assert verdict.status == "timeout" and verdict.earned == 0
    assert time.monotonic() - start < 10


def test_a_module_called_torch_beside_the_file_is_not_imported(grader, tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')\n")
    file = tmp_path / "e01_absmax.py"
    file.write_text(SOLUTION)
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        verdict = grader.grade_file(E01, file)
    finally:
        os.chdir(before)
    assert verdict.earned == E01.points
    assert verdict.path == str(file)


def test_a_file_that_is_not_there_is_not_started(grader, tmp_path: Path):
    verdict = grader.grade_file(E01, tmp_path / "e01_absmax.py")
    assert verdict.status == "not_started" and verdict.earned == 0


def test_the_network_is_off(grader):
    source = doing("socket.create_connection(('127.0.0.1', 9), 1)", "import torch, socket")
    assert grader.grade(E01, source, "x.py").status == "policy"
    # Past the scan of the source, the child refuses as well.
    hidden = doing(
        "vars(b)['__imp' + 'ort__']('socket').create_connection(('127.0.0.1', 9), 1)", "import builtins as b"
    )
    verdict = grader.grade(E01, hidden, "x.py")
    assert verdict.status == "policy" and verdict.earned == 0


def test_without_namespaces_the_verdict_is_the_same_and_says_so():
    with Runner(namespaces=False) as runner, Grader(runner=runner) as grader:
        assert grader.grade(E01, SOLUTION, "x.py").earned == E01.points
        assert "not a security boundary" in runner.isolation


def test_where_there_is_no_fork_a_job_has_a_process_of_its_own():
    """The way of macOS and Windows, tried here."""
    with Runner(namespaces=False) as runner, Grader(runner=runner) as grader:
        runner.forks = False
        assert grader.grade(E01, SOLUTION, "x.py").earned == E01.points
        request = {"name": "x.py", "source": "while True: pass", "drive": None, "names": [], "banned": [], "calls": []}
        ended = runner.run(request | {"preload": [], "secret": []}, 1.0, 96)
        assert ended.how == "timeout" and ended.frames == [{"started": True}]
