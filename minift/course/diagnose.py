"""Why is it wrong? The known mistakes answer the same cases; the one that answers like the submission explains it.

A mutant explains a submission if it gives the same answer to every case that the submission got wrong; of several, the
one that also agrees on most of the other cases. So a recognised mistake is a fact about this input, not a guess.
"""

from typing import Any

from minift.course.compare import compare
from minift.course.judge import Answers, examine
from minift.course.spec import Case

ROUNDING = 1e-6  # relative, for answers that are examined rather than compared


def same_answer(case: Case, one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two answers to a case are one and the same: values within the tolerance, or one kind of exception."""
    if one is None or other is None:
        return one is other
    if "value" not in one or "value" not in other:
        return "raised" in one and one.get("raised") == other.get("raised")
    rtol = ROUNDING if case.accept else case.rtol
    pairs = [(one.get(part), other.get(part)) for part in ("value", "changed")]
    return all(compare(Case("", {}, a, case.atol, rtol), b).size <= 1 for a, b in pairs)


def explain(cases: list[tuple[int, Case]], answers: Answers, known: dict[str, Answers]) -> str | None:
    """The name of the mutant that gives the same answers wherever these are wrong, or None."""
    wrong = [i for i, frame in answers.frames.items() if examine(cases[i][1], frame)[0] == "fail"]
    best, most = None, -1
    for name, mutant in known.items():
        agree = {i: same_answer(case, answers.frames.get(i), mutant.frames.get(i)) for i, (_, case) in enumerate(cases)}
        if wrong and all(agree[i] for i in wrong) and sum(agree.values()) > most:
            best, most = name, sum(agree.values())
    return best
