"""Is an exercise fit to grade people? For its authors: every promise of the course, on as many seeds as wanted.

    starter        no points, "not started"
    solution       full points on every seed, and so every equivalent
    mutants        rejected on every seed, by the check they name; the diagnosis names them
    tolerances     the worst right answer stays below a quarter of a tolerance, the best wrong one is above four
    inputs         no tensor has two equal dimensions: a square one hides a transposed answer
    the page       three hints, at most one page, ASCII, the names are in the starter

Printed as a kill matrix: which check rejects which mistake.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from minift.course.diagnose import explain
from minift.course.judge import PUBLIC_KEY, Answers, Verdict, ask, blank, draw, grade, judge_answers
from minift.course.policy import violations
from minift.course.runner import Runner
from minift.course.spec import Case, Exercise, Mutant

RIGHT_AT_MOST, WRONG_AT_LEAST = 0.25, 4.0
LINES_OF_A_PAGE = 60


@dataclass
class Report:
    """What was found: sentences about what is wrong, and the tables an author looks at."""

    problems: list[str] = field(default_factory=list)
    kills: dict[str, dict[str, int]] = field(default_factory=dict)  # mutant -> check -> on how many draws rejected
    worst_right: float = 0.0
    best_wrong: float = math.inf
    draws: int = 0


def key_of(number: int) -> bytes:
    """The keys that the self-check grades with: the public one first."""
    return PUBLIC_KEY if number == 0 else f"selfcheck {number}".encode()


def check_page(exercise: Exercise, report: Report) -> None:
    """Manifest, page, starter, and that no known mistake is stopped by the policy before it is judged."""
    page, starter, solution = (exercise.text(name) for name in ("README.md", "starter.py", "solution.py"))
    sources = [solution, *exercise.equivalents.values(), *(mutant.source(solution) for mutant in exercise.mutants)]
    rules = {
        "three hints are needed": len(exercise.hints) == 3,
        f"README.md is longer than a page ({LINES_OF_A_PAGE} lines)": len(page.splitlines()) <= LINES_OF_A_PAGE,
        "README.md has no worked example, marked **By hand.**": "**By hand.**" in page,
        "the texts must be ASCII, for terminals of every kind": (page + starter + "".join(exercise.hints)).isascii(),
        "the starter has no TODO and NotImplementedError": "TODO" in starter and "NotImplementedError" in starter,
        "two equivalents are needed": len(exercise.equivalents) >= 2,
        "three mutants are needed": len(exercise.mutants) >= 3,
        "the names of the manifest must be in the starter and the solution": all(
            f" {name}(" in text or f"class {name}" in text for name in exercise.names for text in (starter, solution)
        ),
        "the solution, an equivalent or a mutant is against the policy": not any(
            violations(source, exercise.banned) for source in sources
        ),
    }
    report.problems += [f"{exercise.id}: {sentence}" for sentence, kept in rules.items() if not kept]


def _tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple, dict)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(part, f"{name}[{key!r}]")


def check_shapes(exercise: Exercise, cases: list[tuple[int, Case]], report: Report, key: bytes) -> None:
    """No dimension of an input equals another one: with such a tensor swapped dimensions go unnoticed."""
    for number, case in cases:
        for argument, given in case.given.items():
            for name, tensor in _tensors(given, argument):
                sizes = [size for size in tensor.shape if size > 1]
                if len(set(sizes)) < len(sizes):
                    report.problems.append(
                        f"{exercise.id} {key!r}: {exercise.checks[number].name} gives {case.call} {name} of shape "
                        f"{tuple(tensor.shape)}: two equal dimensions hide a transposed answer"
                    )


def _size(verdict: Verdict) -> float:
    return max((one.size for one in verdict.checks), default=0.0)


def _check_right(exercise: Exercise, cases: list[tuple[int, Case]], runner: Runner, report: Report, key: bytes) -> None:
    for name, source in {"solution": exercise.text("solution.py"), **exercise.equivalents}.items():
        verdict, _ = grade(exercise, source, name, runner, cases)
        report.worst_right = max(report.worst_right, _size(verdict))
        if verdict.earned != exercise.points or _size(verdict) > RIGHT_AT_MOST:
            bad = [one for one in verdict.checks if one.size > RIGHT_AT_MOST or one.status != "pass"]
            said = "; ".join(f"{one.name}: {one.message} ({one.size:.3g} tolerances)" for one in bad)
            report.problems.append(f"{exercise.id} {name} {key!r}: {verdict.status} {said} {verdict.printed[-300:]}")


def _check_wrong(
    exercise: Exercise, mutant: Mutant, cases: list[tuple[int, Case]], known: dict[str, Answers], report: Report
) -> str | None:
    verdict = blank(exercise, "", mutant.name, "")
    judge_answers(verdict, cases, known[mutant.name])
    row = report.kills.setdefault(mutant.name, {one.name: 0 for one in exercise.checks})
    for one in verdict.checks:
        row[one.name] += one.status != "pass"
    (named,) = [one for one in verdict.checks if one.name == mutant.killed_by]
    report.best_wrong = min(report.best_wrong, named.size)
    if named.status == "pass" or named.size < WRONG_AT_LEAST:
        return f"{named.name} gives {named.status}, {named.size:.3g} tolerances"
    if verdict.status != "fail":
        return None
    said = explain(cases, known[mutant.name], known)
    return None if said is not None and said[0] == mutant.name else f"the diagnosis says {said}"


def check_draw(exercise: Exercise, key: bytes, runner: Runner, report: Report) -> None:
    """Everything that depends on the inputs, for the inputs of one key."""
    cases, solution = draw(exercise, key, 1), exercise.text("solution.py")
    report.draws += 1
    check_shapes(exercise, cases, report, key)
    _check_right(exercise, cases, runner, report, key)
    known = {mutant.name: ask(exercise, mutant.source(solution), cases, runner) for mutant in exercise.mutants}
    for mutant in exercise.mutants:
        if problem := _check_wrong(exercise, mutant, cases, known, report):
            report.problems.append(f"{exercise.id} {mutant.name} {key!r}: {problem}")


def check_exercise(exercise: Exercise, runner: Runner, seeds: int = 2) -> Report:
    """All promises of one exercise on `seeds` draws of its inputs."""
    report = Report()
    check_page(exercise, report)
    for number in range(seeds):
        check_draw(exercise, key_of(number), runner, report)
    starter, _ = grade(exercise, exercise.text("starter.py"), "starter.py", runner, draw(exercise, PUBLIC_KEY, 1))
    if starter.earned or starter.status != "not_started":
        report.problems.append(f"{exercise.id}: the starter gets {starter.earned} points, status {starter.status}")
    idle = [one.name for one in exercise.checks if not any(row[one.name] for row in report.kills.values())]
    report.problems += [f"{exercise.id}: no mutant is rejected by {name}" for name in idle]
    return report


def format_report(exercise: Exercise, report: Report) -> str:
    """The kill matrix and the margins, as text."""
    width = max(map(len, report.kills), default=0)
    checks = ", ".join(one.name for one in exercise.checks)
    lines = [f"{exercise.id} {exercise.title}: {report.draws} draws of {checks}"]
    for mutant in exercise.mutants:
        marks = " ".join(
            f"{'!' if name == mutant.killed_by else ' '}{'x' if count == report.draws else '.' if not count else '~'}"
            for name, count in report.kills[mutant.name].items()
        )
        lines.append(f"  {mutant.name:{width}s} {marks}")
    lines.append("  x rejected on every draw, ~ on some, . never; ! the check it must be rejected by")
    lines.append(f"  worst right answer {report.worst_right:.3g} tolerances, best wrong one {report.best_wrong:.3g}")
    return "\n".join(lines + [f"  PROBLEM {problem}" for problem in report.problems])
