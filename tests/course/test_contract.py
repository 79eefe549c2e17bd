"""The contract of every exercise: right answers pass, wrong ones do not, and the reason given is the right one.

A few draws of the inputs by default, 200 under `slow`. The draws are those of `minift-course selfcheck`.
"""

import pytest

from minift.course import registry
from minift.course.ast_mutants import AT_LEAST, cast_net
from minift.course.judge import PUBLIC_KEY, draw
from minift.course.runner import Runner
from minift.course.selfcheck import check_exercise, format_report

EXERCISES = registry.all_exercises()


def exercises():
    return pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES.keys())


@pytest.fixture(scope="module")
def runner():
    with Runner() as made:
        yield made


@exercises()
def test_exercise_keeps_its_promises(exercise, runner):
    report = check_exercise(exercise, runner, seeds=1)
    print(format_report(exercise, report))
    assert report.problems == []
    # The self-check itself has looked at something: every mutant on every draw, and each was rejected.
    assert report.draws == 1 and set(report.kills) == {mutant.name for mutant in exercise.mutants}
    assert all(any(row.values()) for row in report.kills.values())


@pytest.mark.slow
@pytest.mark.timeout(7200)
@exercises()
def test_exercise_keeps_its_promises_on_200_draws(exercise, runner):
    assert check_exercise(exercise, runner, seeds=200).problems == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
@exercises()
def test_small_changes_to_the_solution_are_noticed(exercise, runner):
    net = cast_net(exercise, runner)
    assert net.total >= 10 and net.noticed >= AT_LEAST
    assert net.holes == [] and net.stale == []


@exercises()
def test_a_seed_fixes_the_inputs(exercise):
    def described(key: bytes) -> list[str]:
        return [repr((number, case.call, case.given, case.expect)) for number, case in draw(exercise, key, 1)]

    def without_addresses(rows: list[str]) -> list[str]:
        return [row.split(" object at ")[0] for row in rows]

    assert without_addresses(described(PUBLIC_KEY)) == without_addresses(described(PUBLIC_KEY))
    assert without_addresses(described(PUBLIC_KEY)) != without_addresses(described(b"another key"))


@exercises()
def test_two_mistakes_are_two_sources(exercise):
    solution = exercise.text("solution.py")
    sources = [mutant.source(solution) for mutant in exercise.mutants]
    assert len({*sources, solution}) == len(sources) + 1
