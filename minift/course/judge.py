"""The judge: draws inputs, has the child call the submission with them, compares what comes back, gives points.

It never imports a submission. Inputs come from HMAC(key, exercise, check, number): with the public key everybody sees
the same numbers; with a teacher's own key nobody can know them beforehand, although there is no hidden file.
"""

import hashlib
import hmac
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minift.course.compare import Difference, compare, table
from minift.course.policy import violations
from minift.course.registry import packs
from minift.course.runner import Ended, Runner
from minift.course.spec import Case, Exercise

PUBLIC_KEY = b"minift"
SEEDS = 2
# From the least to the most telling: an exercise has the last of these that one of its checks has.
STATUSES = ("pass", "not_started", "fail", "import_error", "memory", "timeout", "crash", "policy", "not_graded")
ADVICE = {
    "not_started": "nothing is written yet: replace `raise NotImplementedError`",
    "import_error": "the file could not be loaded, so nothing in it was graded",
    "timeout": "it took longer than it may: look for a loop that does not end, or for a Python loop over elements",
    "memory": "it asked for more memory than it may have: look at the shapes of what it makes",
    "crash": "the process ended in the middle (os._exit, a crash in C code, killed)",
    "policy": "this is not part of the exercise, so nothing was graded",
}  # fmt: skip


@dataclass
class CheckVerdict:
    """One check of one submission."""

    name: str
    sentence: str
    points: int
    status: str = "pass"
    message: str = ""
    details: list[str] = field(default_factory=list)
    size: float = 0.0  # the largest difference, in tolerances

    @property
    def earned(self) -> int:
        """All of its points or none."""
        return self.points if self.status == "pass" else 0


@dataclass
class Verdict:
    """One exercise of one submission: what was graded, where, and the result of every check."""

    exercise: str
    title: str
    path: str
    sha256: str
    isolation: str
    checks: list[CheckVerdict]
    message: str = ""
    printed: str = ""
    seconds: float = 0.0
    misconception: str = ""  # filled in by the diagnosis: the name of a mutant, its text and advice
    explanation: str = ""
    advice: str = ""
    explained: list[str] = field(default_factory=list)  # the checks that fail just as the mutant does

    @property
    def status(self) -> str:
        """One word for the exercise."""
        seen = {one.status for one in self.checks} or {"not_graded"}
        if "pass" in seen and "not_started" in seen:
            seen.add("fail")
        return max(seen, key=STATUSES.index)

    @property
    def earned(self) -> int:
        """Points."""
        return sum(one.earned for one in self.checks)

    @property
    def points(self) -> int:
        """Points that can be had."""
        return sum(one.points for one in self.checks)


@dataclass
class Answers:
    """What a source answered to every case of an exercise: case number -> frame, or the status it ended with."""

    frames: dict[int, dict[str, Any]]
    died: dict[int, str]
    loaded: dict[str, Any]
    printed: str
    seconds: float


def seed_of(key: bytes, exercise: str, check: str, number: int) -> int:
    """The seed of a check's nth draw: 63 bits of the HMAC."""
    digest = hmac.new(key, f"{exercise}|{check}|{number}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw(exercise: Exercise, key: bytes = PUBLIC_KEY, seeds: int = SEEDS) -> list[tuple[int, Case]]:
    """All cases of an exercise, each with the number of its check."""
    return [
        (number, case)
        for number, one in enumerate(exercise.checks)
        for nth in range(seeds)
        for case in one.cases(seed_of(key, exercise.id, one.name, nth))
    ]


def ask(exercise: Exercise, source: str, cases: list[tuple[int, Case]], runner: Runner) -> Answers:
    """Have the child answer every case. If it dies, the check it died in is over, and the others have one more try."""
    answers = Answers({}, {}, {}, "", 0.0)
    pending = list(range(len(cases)))
    for _ in range(2):
        calls = [(i, {"call": cases[i][1].call, "given": cases[i][1].given}) for i in pending]
        request = {
            "name": exercise.file_name, "source": source, "drive": exercise.drive, "names": list(exercise.names),
            "banned": list(exercise.banned), "preload": list(exercise.requires), "calls": calls,
            "secret": [str(pack) for pack in packs()],
        }  # fmt: skip
        ended = runner.run(request, exercise.seconds, exercise.memory_mb)
        reached = _take(ended, answers, len(cases))
        pending = [i for i in pending if i not in answers.frames]
        if ended.how == "done" or not pending:
            return answers
        guilty = cases[reached][0] if reached in pending else None
        answers.died |= dict.fromkeys((i for i in pending if guilty in (None, cases[i][0])), ended.how)
        pending = [i for i in pending if i not in answers.died]
        if guilty is None:
            return answers
    answers.died |= dict.fromkeys(pending, "timeout" if "timeout" in answers.died.values() else "crash")
    return answers


def _take(ended: Ended, answers: Answers, count: int) -> int | None:
    """File the frames of one run; returns the case that was begun last. Numbers of no case are a submission's own."""
    reached, known = None, range(count)
    answers.printed, answers.seconds = ended.printed, answers.seconds + ended.seconds
    for frame in ended.frames:
        if type(frame.get("begin")) is int and frame["begin"] in known:
            reached = frame["begin"]
        elif type(frame.get("end")) is int and frame["end"] in known:
            answers.frames[frame["end"]] = frame
        else:
            answers.loaded |= frame
    return reached


def _shape_of_change(case: Case, changed: dict[str, Any]) -> str | None:
    """What is wrong with the arguments after the call, or None."""
    for name in changed:
        if name not in case.changes:
            return f"the argument {name} was changed; work on a copy of it"
    for name, storage in case.changes.items():
        have = changed.get(name)
        if have is None:
            return f"nothing was written to {name}"
        wrong = compare(Case("", {}, storage, case.atol, case.rtol), have)
        if wrong.size > 1:
            return f"{name}, with the memory around it: {wrong.message}"
    return None


def examine(case: Case, frame: dict[str, Any]) -> tuple[str, Difference]:
    """Status and difference of one answer."""
    if refusals := frame.get("refusals"):
        return "policy", Difference(math.inf, str(refusals[0]))
    if "missing" in frame:
        return "not_started", Difference(math.inf, f"there is no {frame['missing']} in the file")
    if "raised" in frame:
        return _raised(case, frame)
    if case.raises:
        return "fail", Difference(math.inf, f"no {case.raises} was raised")
    found = compare(case, frame.get("value"))
    if found.size <= 1 and (change := _shape_of_change(case, frame.get("changed") or {})):
        found = Difference(math.inf, change)
    return ("fail" if found.size > 1 else "pass"), found


def _raised(case: Case, frame: dict[str, Any]) -> tuple[str, Difference]:
    kind, message = str(frame["raised"]), str(frame.get("message", ""))
    line = f" (line {frame['line']} of your file)" if frame.get("line") else ""
    if kind == case.raises:
        return "pass", Difference(0.0)
    if kind == "NotImplementedError" and not message:  # torch raises it too, with a message, for a dtype it lacks
        return "not_started", Difference(math.inf, "not written yet")
    memory = kind in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in message
    return ("memory" if memory else "fail"), Difference(math.inf, f"{kind}: {' '.join(message.split())[:300]}{line}")


def blank(exercise: Exercise, source: str, path: str | Path, isolation: str) -> Verdict:
    """A verdict to be filled in."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    checks = [CheckVerdict(one.name, one.sentence, one.points) for one in exercise.checks]
    return Verdict(exercise.id, exercise.title, str(path), digest, isolation, checks)


def grade(
    exercise: Exercise, source: str, path: str | Path, runner: Runner, cases: list[tuple[int, Case]]
) -> tuple[Verdict, Answers | None]:
    """The verdict on one source text, and what it answered, if it was run; `path` is only where the text came from."""
    verdict = blank(exercise, source, path, runner.isolation)
    if stopped := _before(exercise, source):
        return _all(verdict, *stopped), None
    answers = ask(exercise, source, cases, runner)
    try:
        judge_answers(verdict, cases, answers)
    except Exception as error:  # whoever forges the frames must not stop the grading of a class
        said = f"what came back is no answer of the judge's own process ({type(error).__name__}: {error})"
        return _all(verdict, "crash", said[:300]), None
    return verdict, answers


def _before(exercise: Exercise, source: str) -> tuple[str, str] | None:
    """What can be said without running anything."""
    lacking = [name for name in exercise.requires if find_spec(name) is None]
    if lacking:
        return "not_graded", f"{', '.join(lacking)} is not installed here, so this exercise gets no points"
    if found := violations(source, exercise.banned):
        return "policy", "; ".join(found[:3])
    return None if exercise.defined_in(source) else ("not_started", ADVICE["not_started"])


def _all(verdict: Verdict, status: str, message: str) -> Verdict:
    verdict.message = message
    for one in verdict.checks:
        one.status, one.message, one.size = status, message, math.inf
    return verdict


def judge_answers(verdict: Verdict, cases: list[tuple[int, Case]], answers: Answers) -> None:
    """Fill in the checks of a verdict from what was answered. A check without a single answer is never passed."""
    verdict.printed, verdict.seconds = answers.printed, answers.seconds
    if refused := answers.loaded.get("refusals"):
        _all(verdict, "policy", str(refused[0]))
        return
    if error := answers.loaded.get("import"):
        line = f"line {error['line']}: " if error.get("line") else ""
        _all(verdict, "import_error", f"{line}{error['raised']}: {error['message']}")
        return
    answered = {number for i, (number, _) in enumerate(cases) if i in answers.frames or i in answers.died}
    for number, one in enumerate(verdict.checks):
        if number not in answered:
            one.status, one.message, one.size = "crash", ADVICE["crash"], math.inf
    for i, (number, case) in enumerate(cases):
        one = verdict.checks[number]
        if i in answers.frames:
            status, found = examine(case, answers.frames[i])
        else:
            ended = answers.died.get(i, "crash")
            status, found = ended, Difference(math.inf, ADVICE[ended])
        one.size = max(one.size, found.size)
        if one.status == "pass" and status != "pass":
            one.status, one.message = status, f"{found.message}{f' (input: {case.about})' if case.about else ''}"
            if status == "fail" and "value" in answers.frames.get(i, {}):
                one.details = table(case, answers.frames[i]["value"])
    if any(one.status == "policy" for one in verdict.checks):
        _all(verdict, "policy", next(one.message for one in verdict.checks if one.status == "policy"))
