"""Does this machine have what the course needs? One line a finding."""

import os
import platform
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from minift.course import registry
from minift.course.grader import Grader
from minift.course.spec import Exercise


def examine(folder: Path) -> list[tuple[bool, str]]:
    """(fine or not, sentence): versions, writing, and one exercise really graded."""
    exercises = registry.all_exercises()
    lacking = sorted({name for one in exercises.values() for name in one.requires if find_spec(name) is None})
    concerned = [one.id for one in exercises.values() if set(one.requires) & set(lacking)]
    extra = (
        f"without {', '.join(lacking)}: {', '.join(concerned)} cannot be graded here" if lacking else "nothing lacks"
    )
    findings = [
        (sys.version_info >= (3, 11), f"Python {platform.python_version()} on {platform.platform(terse=True)}"),
        (True, f"torch {torch.__version__}, on the CPU"),
        (os.access(folder, os.W_OK), f"writing in {folder}"),
        (not lacking, f"{len(exercises)} exercises; {extra}"),
    ]
    return findings + _try_the_judge(next(iter(exercises.values())))


def _try_the_judge(one: Exercise) -> list[tuple[bool, str]]:
    try:
        with Grader() as grader:
            grader.grade(one, one.text("solution.py"), "solution.py")
            start = time.monotonic()
            verdict = grader.grade(one, one.text("solution.py"), "solution.py")
            took = time.monotonic() - start
    except (RuntimeError, OSError) as error:
        return [(False, f"the judge: {error}")]
    return [
        (verdict.status == "pass", f"the judge: {one.id} graded in {took:.2f} s"),
        (True, f"isolation: {verdict.isolation}"),
    ]
