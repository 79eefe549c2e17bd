"""Why is it wrong? The known mistakes answer the same cases; the one that answers like the submission explains it.

A mutant explains a failed check if it gives the same answer to every case of it that the submission got wrong; of
several, the one that explains most checks, and then the one that agrees on most of the other cases. So a recognised
mistake is a fact about this input, not a guess. Of two mistakes made at once the one with more to show is named, beside
the checks where it alone is at work; the other has its turn when that one is mended.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from minift.course.compare import compare
from minift.course.judge import Answers, examine
from minift.course.spec import Case

ROUNDING = 1e-6  # relative, for answers that are examined rather than compared


def same_answer(case: Case, one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two answers to a case are one and the same: values within the tolerance, or one kind of exception."""
    if one is None or other is None or one is other:
        return one is other
    if "value" not in one or "value" not in other:
        return "raised" in one and one.get("raised") == other.get("raised")
    rtol = ROUNDING if case.accept else case.rtol
    pairs = [(one.get(part), other.get(part)) for part in ("value", "changed")]
    return all(compare(Case("", {}, a, case.atol, rtol), b).size <= 1 for a, b in pairs)


def _agreement(cases: list[tuple[int, Case]], one: Answers, other: Answers, which: Iterable[int]) -> Iterator[bool]:
    return (same_answer(cases[i][1], one.frames.get(i), other.frames.get(i)) for i in which)


def explain(cases: list[tuple[int, Case]], answers: Answers, known: dict[str, Answers]) -> tuple[str, set[int]] | None:
    """The mutant that gives the same answers where these are wrong, and the checks of which that holds; or None."""
    wrong: dict[int, list[int]] = defaultdict(list)
    for i, frame in answers.frames.items():
        if examine(cases[i][1], frame)[0] == "fail":
            wrong[cases[i][0]].append(i)
    # An exception of the same kind says little: it counts only where everything else is explained as well.
    told = {number for number, those in wrong.items() if all("value" in answers.frames[i] for i in those)}
    best, most = None, (0, 0)
    for name, mutant in known.items():
        checks = {number for number, those in wrong.items() if all(_agreement(cases, answers, mutant, those))}
        if len(checks) < len(wrong):
            checks &= told
        if checks:  # for nearly all mutants the first look said no: the other cases are compared for what is left
            shown = len(checks), sum(_agreement(cases, answers, mutant, range(len(cases))))
            if shown > most:
                best, most = (name, checks), shown
    return best
