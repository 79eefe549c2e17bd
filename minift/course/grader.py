"""Grade and explain: what the command line, pytest and the teacher's tools all call.

The inputs of an exercise and the answers of its known mistakes are made once for a key and kept, so that a second
submission, or a second save of the same file, costs only its own run.
"""

import hashlib
import threading
from collections import defaultdict
from pathlib import Path

from minift.course.diagnose import explain
from minift.course.judge import PUBLIC_KEY, SEEDS, Answers, Verdict, ask, draw, grade
from minift.course.runner import Runner
from minift.course.spec import Case, Exercise


class Grader:
    """Verdicts with diagnosis, for one key and one runner. A context manager: it owns the runner's process.

    A `patient` one has every known mistake answered before it gives a verdict on a failure. One that is not gives the
    verdict at once; whoever holds it calls `learn` while there is time, then `explain_last`.
    """

    def __init__(
        self, key: bytes = PUBLIC_KEY, seeds: int = SEEDS, runner: Runner | None = None, patient: bool = True
    ) -> None:
        self.key, self.seeds, self.patient = key, seeds, patient
        self.runner = runner or Runner()
        self._cases: dict[str, list[tuple[int, Case]]] = {}
        self._known: dict[str, dict[str, Answers]] = defaultdict(dict)
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._unexplained: tuple[Exercise, Verdict, Answers] | None = None

    def twin(self) -> "Grader":
        """One for another thread, with a runner of its own; what one of them learns, both know."""
        made = Grader(self.key, self.seeds, patient=self.patient)
        made._cases, made._known, made._locks = self._cases, self._known, self._locks
        return made

    def cases(self, exercise: Exercise) -> list[tuple[int, Case]]:
        """The cases of an exercise, each with the number of its check."""
        if exercise.id not in self._cases:
            self._cases[exercise.id] = draw(exercise, self.key, self.seeds)
        return self._cases[exercise.id]

    def learn(self, exercise: Exercise) -> bool:
        """Have one more mutant answer the cases; False if all of them have."""
        with self._locks[exercise.id]:
            known = self._known[exercise.id]
            mutant = next((one for one in exercise.mutants if one.name not in known), None)
            if mutant is None:
                return False
            source = mutant.source(exercise.text("solution.py"))
            known[mutant.name] = ask(exercise, source, self.cases(exercise), self.runner)
            return True

    def known(self, exercise: Exercise) -> dict[str, Answers]:
        """What each mutant of an exercise answers."""
        while self.learn(exercise):
            pass
        return self._known[exercise.id]

    def grade(self, exercise: Exercise, source: str, path: str | Path) -> Verdict:
        """The verdict on a source text that came from `path`."""
        verdict, answers = grade(exercise, source, path, self.runner, self.cases(exercise))
        self._unexplained = None
        if verdict.status == "fail" and answers is not None:
            self._unexplained = exercise, verdict, answers
        if self.patient or len(self._known[exercise.id]) == len(exercise.mutants):
            self.explain_last()
        return verdict

    def explain_last(self) -> Verdict | None:
        """The last failure, if it had no diagnosis yet and a known mistake explains it; that is filled in."""
        if self._unexplained is None:
            return None
        (exercise, verdict, answers), self._unexplained = self._unexplained, None
        if (found := explain(self.cases(exercise), answers, self.known(exercise))) is None:
            return None
        mutant = next(one for one in exercise.mutants if one.name == found[0])
        verdict.misconception, verdict.explanation, verdict.advice = mutant.name, mutant.misconception, mutant.advice
        verdict.explained = [one.name for number, one in enumerate(exercise.checks) if number in found[1]]
        return verdict

    def grade_file(self, exercise: Exercise, path: Path) -> Verdict:
        """The verdict on a file; one that is not there is not started."""
        return self.grade_bytes(exercise, path.read_bytes() if path.is_file() else b"", path.absolute())

    def grade_bytes(self, exercise: Exercise, data: bytes, path: str | Path) -> Verdict:
        """The verdict on the bytes of a file; the hash is theirs."""
        try:
            source = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            source = "raise SyntaxError('the file is not UTF-8 text')"
        verdict = self.grade(exercise, source, path)
        verdict.sha256 = hashlib.sha256(data).hexdigest()
        return verdict

    def close(self) -> None:
        """End the runner's process."""
        self.runner.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
