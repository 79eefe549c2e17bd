"""Check at every save, by looking at time and size of the file: that works on every system and mount."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from minift.course.grader import Grader
from minift.course.render import explanation, show
from minift.course.spec import Exercise
from minift.course.workspace import Workspace

PAUSE = 0.2  # seconds between two looks


def stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is saved, or None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _wait(
    path: Path, seen: tuple[int, int] | None, grader: Grader, exercise: Exercise, say: Callable[[str], None]
) -> None:
    """Until the file changes; meanwhile the known mistakes are tried, so that a failure can be explained."""
    while stamp(path) == seen:
        if grader.learn(exercise):
            continue
        if (verdict := grader.explain_last()) is not None:
            say("\n".join(explanation(verdict)))
        time.sleep(PAUSE)


def follow(space: Workspace, exercises: Sequence[Exercise], say: Callable[[str], None], once: bool = False) -> int:
    """Check one exercise after another until all are passed; 0 then, 1 if `once` ended it before."""
    with Grader(patient=once) as grader:
        for exercise in exercises:
            path, seen = space.path(exercise), None
            say(f"Watching {path.absolute()} (page: {exercise.page_name}). Ctrl-C ends.")
            while True:
                if (current := stamp(path)) != seen or current is None:
                    seen = current
                    verdict = grader.grade_file(exercise, path)
                    say(show(verdict))
                    if verdict.status == "pass":
                        break
                    if once:
                        return 1
                _wait(path, seen, grader, exercise, say)
            if space.note_pass(exercise):
                say(f"The solution is in solutions/{exercise.file_name} now: compare it with yours.")
    say("Passed.")
    return 0
