"""Check at every save, by looking at time and size of the file: that works on every system and mount.

In a terminal single keys do the rest: n next exercise, h hint, l list, r run again, q quit.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from minift.course import registry
from minift.course.grader import Grader
from minift.course.keys import Keys
from minift.course.render import explanation, listing, show
from minift.course.spec import Exercise
from minift.course.workspace import Workspace

PAUSE = 0.2  # seconds between two looks
HELP = "Keys: n next, h hint, l list, r run again, q quit."


def stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is saved, or None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


class Watch:
    """One run of `watch`: the exercises that are left, one of them at hand."""

    def __init__(
        self, space: Workspace, exercises: Sequence[Exercise], say: Callable[[str], None], grader: Grader, keys: Keys
    ) -> None:
        self.space, self.say, self.grader, self.keys = space, say, grader, keys
        self.left = list(exercises)

    def run(self, once: bool) -> int:
        """Until all are passed (0), q is pressed or, with `once`, one was checked (1)."""
        while self.left:
            exercise = self.left[0]
            path = self.space.code(exercise)[0]
            ends = HELP if self.keys.active else "Ctrl-C ends."
            self.say(f"Watching {path.absolute()} (page: {exercise.page_name}). {ends}")
            if self._until_passed(exercise, path, once):
                self.left.remove(exercise)
            elif once or self.left[0] is exercise:
                return 1
        self.say("Passed.")
        return 0

    def _until_passed(self, exercise: Exercise, path: Path, once: bool) -> bool:
        """False if it was left without being passed."""
        while True:
            seen = stamp(path)
            verdict = self.grader.grade_bytes(exercise, self.space.code(exercise)[1], path.absolute())
            self.say(show(verdict))
            if self.space.note(exercise, verdict.earned, verdict.status == "pass"):
                self.say(f"The solution is in solutions/{exercise.file_name} now: compare it with yours.")
            if verdict.status == "pass":
                return True
            if once or self._wait(exercise, path, seen) in ("n", "q"):
                return False

    def _wait(self, exercise: Exercise, path: Path, seen: tuple[int, int] | None) -> str:
        """Until the file changes or a key ends the waiting; meanwhile the known mistakes are tried."""
        while stamp(path) == seen:
            learning = self.grader.learn(exercise)
            if not learning and (verdict := self.grader.explain_last()) is not None:
                self.say("\n".join([f"  {', '.join(verdict.explained)}:", *explanation(verdict)]))
            key = self.keys.wait(0.0 if learning else PAUSE)
            if key in ("r", "q") or (key == "n" and self._next()):
                return key
            if key:
                self.say(self._answer(key, exercise))
        return ""

    def _next(self) -> bool:
        """Put the exercise at hand behind the others; False if there is no other."""
        self.left.append(self.left.pop(0))
        return len(self.left) > 1

    def _answer(self, key: str, exercise: Exercise) -> str:
        if key == "h":
            number, text = self.space.hint(exercise)
            return f"Hint {number} of {len(exercise.hints)}: {text}"
        if key == "l":
            return listing(self.space.exercises(registry.all_exercises()).values(), self.space)
        return "There is no other exercise to go on to." if key == "n" else HELP


def follow(
    space: Workspace, exercises: Sequence[Exercise], say: Callable[[str], None], once: bool = False,
    keys: Keys | None = None,
) -> int:  # fmt: skip
    """Check one exercise after another until all are passed; 0 then, 1 if q or `once` ended it before."""
    with Grader(patient=once) as grader, keys or Keys() as pressed:
        return Watch(space, exercises, say, grader, pressed).run(once)
