"""The bug hunt: the exercise turned round. The code is given, with a mistake in it; write the test that finds it.

    def test(code):
        q, scale = code.quantize(torch.tensor([[1.0, -4.0]]), dim=-1)
        assert q[0, 1] == -127

`test` is run with every known mistake, which it must reject by an exception, and with every right solution, which it
must not. A test that rejects everything finds nothing: right solutions that are rejected cost the whole score.
"""

from dataclasses import dataclass, field
from typing import Any

from minift.course.policy import violations
from minift.course.registry import packs
from minift.course.runner import Runner
from minift.course.spec import Exercise

STARTER = '''"""Bug hunt {id}: write a test that finds the mistakes. Run it with: minift-course bughunt {id}"""

import torch


def test(code):
    """`code` has {names}, as pages/{page}.md describes. Raise (assert) if something is wrong with it."""
    # TODO
    raise NotImplementedError
'''
# Runs in the child: makes a module of a text and hands it to the student's test.
_DRIVE = """
import types


def hunt(student, source):
    code = types.ModuleType("code_under_test")
    exec(compile(source, "code_under_test.py", "exec"), code.__dict__)
    try:
        student.test(code)
    except Exception as error:
        return type(error).__name__
    return "accepted"
"""


@dataclass
class Hunt:
    """What a test found: mistakes by their number, and right solutions that it rejected."""

    found: list[int] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def score(self) -> str:
        """Mistakes found of all; none while a right solution is rejected."""
        return f"{0 if self.rejected else len(self.found)} of {len(self.found) + len(self.missed)}"


def starter(exercise: Exercise) -> str:
    """The file to begin with."""
    return STARTER.format(id=exercise.id, names=", ".join(exercise.names), page=exercise.folder.name)


def hunt(exercise: Exercise, source: str, runner: Runner) -> Hunt:
    """Try a test on all right and wrong solutions."""
    solution = exercise.text("solution.py")
    right = {"solution": solution, **exercise.equivalents}
    wrong = [mutant.source(solution) for mutant in exercise.mutants]
    if found := violations(source):
        return Hunt(problem="; ".join(found[:3]))
    request: dict[str, Any] = {
        "name": f"bughunt_{exercise.id}.py", "source": source, "drive": _DRIVE, "names": ["test"], "banned": [],
        "preload": list(exercise.requires), "secret": [str(pack) for pack in packs()],
        "calls": [
            (number, {"call": "hunt", "given": {"source": text}})
            for number, text in enumerate([*right.values(), *wrong])
        ],
    }  # fmt: skip
    ended = runner.run(request, 2 * exercise.seconds, exercise.memory_mb)
    answers = {frame["end"]: frame.get("value", frame.get("raised")) for frame in ended.frames if "end" in frame}
    broken = [frame["import"] for frame in ended.frames if "import" in frame]
    if broken:
        return Hunt(problem=f"line {broken[0]['line']}: {broken[0]['raised']}: {broken[0]['message']}")
    if "NotImplementedError" in answers.values():
        return Hunt(problem="nothing is written yet")
    if ended.how != "done":
        return Hunt(problem=f"the test ended with: {ended.how}")
    result = Hunt(rejected=[name for number, name in enumerate(right) if answers.get(number) != "accepted"])
    for number in range(len(wrong)):
        (result.missed if answers.get(len(right) + number) == "accepted" else result.found).append(number + 1)
    return result
