"""Plain pytest in a course folder: one item a check, named e01::one_scale.

The folder's test_course.py imports everything from here:

    from minift.course.pytest_items import *

so that `pytest -k e01`, `-x`, `--junitxml` and pytest-xdist work as they do everywhere. Each exercise is run once.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from minift.course import registry, workspace
from minift.course.grader import Grader
from minift.course.judge import Verdict
from minift.course.render import explanation, heading

__all__ = ["course_verdicts", "pytest_generate_tests", "test_course"]


class Verdicts:
    """The verdict on each exercise of a folder, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.space = workspace.read(folder) or workspace.Workspace(folder)
        self.grader = Grader()
        self.exercises = registry.all_exercises()
        self.made: dict[str, Verdict] = {}

    def __getitem__(self, name: str) -> Verdict:
        if name not in self.made:
            exercise = self.exercises[name]
            self.made[name] = self.grader.grade_file(exercise, self.space.path(exercise))
        return self.made[name]


@pytest.fixture(scope="module")
def course_verdicts(request: pytest.FixtureRequest) -> Iterator[Verdicts]:
    """The verdicts on the folder of the test file."""
    verdicts = Verdicts(request.path.parent)
    yield verdicts
    verdicts.grader.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item for each check of each exercise that the folder has a file for."""
    if metafunc.function is not test_course:
        return
    space = workspace.Workspace(Path(metafunc.definition.path).parent)
    pairs = [
        (one.id, check.name)
        for one in registry.all_exercises().values()
        if space.path(one).exists()
        for check in one.checks
    ]
    metafunc.parametrize(("exercise", "check"), pairs, ids=[f"{one}::{check}" for one, check in pairs])


def test_course(course_verdicts: Verdicts, exercise: str, check: str) -> None:
    """One check of one exercise."""
    __tracebackhide__ = True
    verdict = course_verdicts[exercise]
    (one,) = [each for each in verdict.checks if each.name == check]
    if one.status != "pass":
        lines = [one.sentence, one.message, *one.details, *explanation(verdict), *heading(verdict)]
        pytest.fail("\n".join(lines), pytrace=False)
