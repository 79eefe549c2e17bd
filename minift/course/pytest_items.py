"""Plain pytest in a course folder: one item a check, named e01::one_scale.

The folder's test_course.py imports everything from here:

    from minift.course.pytest_items import *

so that `pytest -k e01`, `-x`, `--junitxml` and pytest-xdist work as they do everywhere. Each exercise is run once; the
points are summed up at the end.
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
            path, data = self.space.code(self.exercises[name])
            self.made[name] = self.grader.grade_bytes(self.exercises[name], data, path.absolute())
        return self.made[name]


class Points:
    """The table below the tests: points of each exercise that was run."""

    NAME = "minift-course-points"

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.verdicts:
            return
        terminalreporter.write_sep("-", "points")
        for one in self.verdicts:
            terminalreporter.write_line(f"{one.exercise:4s} {one.earned:2d} of {one.points:2d}  {one.title}")
        earned, points = (sum(getattr(one, name) for one in self.verdicts) for name in ("earned", "points"))
        terminalreporter.write_line(f"     {earned:2d} of {points:2d}, with the public numbers")


@pytest.fixture(scope="module")
def course_verdicts(request: pytest.FixtureRequest) -> Iterator[Verdicts]:
    """The verdicts on the folder of the test file."""
    verdicts = Verdicts(request.path.parent)
    yield verdicts
    points = request.config.pluginmanager.get_plugin(Points.NAME)
    if points is not None:
        points.verdicts += verdicts.made.values()
    verdicts.grader.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item for each check of each exercise that the folder has a file for."""
    if metafunc.function is not test_course:
        return
    if not metafunc.config.pluginmanager.has_plugin(Points.NAME):
        metafunc.config.pluginmanager.register(Points(), Points.NAME)
    space = workspace.Workspace(Path(metafunc.definition.path).parent)
    pairs = [
        (one.id, check.name) for one in registry.all_exercises().values() if space.has(one) for check in one.checks
    ]
    metafunc.parametrize(("exercise", "check"), pairs, ids=[f"{one}::{check}" for one, check in pairs])


def test_course(course_verdicts: Verdicts, exercise: str, check: str) -> None:
    """One check of one exercise."""
    __tracebackhide__ = True
    verdict = course_verdicts[exercise]
    (one,) = [each for each in verdict.checks if each.name == check]
    if one.status != "pass":
        why = explanation(verdict) if one.name in verdict.explained else []
        lines = [one.sentence, one.message, *one.details, *why, *heading(verdict)]
        pytest.fail("\n".join(lines), pytrace=False)
