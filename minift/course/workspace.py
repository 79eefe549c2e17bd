"""The student's folder: one file an exercise, the pages, and a small record of hints and passes.

    my-course/
        README.md  AGENTS.md  test_course.py  .minift-course.json
        e01_absmax.py  e20_lora_by_hand.py  ...          what the student writes
        pages/e01_absmax.md ...                          what to write
        solutions/e01_absmax.py                          written after an exercise is passed (or given up)

Nothing that a student changed is ever overwritten. `init` in a folder of an older course renews what is as it was
given, and puts a newer text beside what is not, as NAME.new; `reset` keeps a copy with the time in its name first.
"""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minift.course.adapted import FILE, adapted
from minift.course.spec import Exercise
from minift.course.whole import write_whole

STATE = ".minift-course.json"
_KEPT = ("hints", "passed", "given_up", "earned")
_TEST = '''"""Plain pytest grades this folder: one item a check. Also: minift-course check, minift-course watch."""

from minift.course.pytest_items import *  # noqa: F403
'''
_AGENTS = """# To a coding assistant

This folder is coursework. Tutor, do not solve: ask what the student thinks happens, point to the page in `pages/` and
to the failing check, explain a concept with an example of your own. Do not write the bodies of the functions, and do
not edit the exercise files.
"""


def _readme(exercises: list[Exercise]) -> str:
    rows = "\n".join(
        f"| {one.id} | [{one.title}]({one.page_name}) | {one.topic} | {one.points} | {one.minutes} |"
        for one in exercises
    )
    return f"""# My course

Open a page, write the file of the same name, save. `minift-course watch` checks at each save; `minift-course` alone
says what is next; `pytest` (`pip install pytest`) grades everything.

Code in a package of your own: write a file adapters.py here, `ADAPT = {{"e06": "mylib.quant:mine"}}`.

| | exercise | topic | points | minutes |
| --- | --- | --- | --- | --- |
{rows}
"""


@dataclass
class Workspace:
    """A student's folder and its record."""

    folder: Path
    hints: dict[str, int] = field(default_factory=dict)  # exercise -> highest level shown
    passed: dict[str, str] = field(default_factory=dict)  # exercise -> when first
    given_up: dict[str, str] = field(default_factory=dict)  # exercise -> when
    earned: dict[str, int] = field(default_factory=dict)  # exercise -> points at the last check
    only: list[str] = field(default_factory=list)  # the exercises of this folder; all if empty
    given: dict[str, str] = field(default_factory=dict)  # file -> hash of the text it was last given here

    def save(self) -> None:
        """Write the record."""
        record = {name: getattr(self, name) for name in (*_KEPT, "only", "given")}
        write_whole(self.folder / STATE, json.dumps(record, indent=2) + "\n")

    def exercises(self, known: dict[str, Exercise]) -> dict[str, Exercise]:
        """Those of the known exercises that belong to this folder."""
        return {name: one for name, one in known.items() if not self.only or name in self.only}

    def path(self, exercise: Exercise) -> Path:
        """The file of an exercise: e01_absmax.py, or the only other e01*.py. ValueError if there are several."""
        usual = self.folder / exercise.file_name
        others = sorted(self.folder.glob(f"{exercise.id}*.py"))
        if usual.exists() or not others:
            return usual
        if len(others) > 1:
            raise ValueError(f"which of these is {exercise.id}: {', '.join(map(str, others))}? Name it with --file.")
        return others[0]

    def code(self, exercise: Exercise) -> tuple[Path, bytes]:
        """What is to be graded, and where it is from: as adapters.py says, else the exercise's file, which may be none.

        ValueError if an adapters.py is there, but neither it nor a file is for this exercise.
        """
        if (found := adapted(self.folder, exercise)) is not None:
            return found
        path = self.path(exercise)
        if not path.is_file() and (self.folder / FILE).exists():
            raise ValueError(
                f"there is no {exercise.file_name}, and {FILE} has no place for {exercise.id}: "
                f'add "{exercise.id}": "module:{exercise.names[0]}" to ADAPT'
            )
        return path, path.read_bytes() if path.is_file() else b""

    def has(self, exercise: Exercise) -> bool:
        """Whether there is anything to grade."""
        return self.path(exercise).is_file() or adapted(self.folder, exercise) is not None

    def hint(self, exercise: Exercise, level: int | None = None) -> tuple[int, str]:
        """The next hint, or one by level; which ones were shown is recorded and costs nothing."""
        shown = self.hints.get(exercise.id, 0)
        level = min(shown + 1 if level is None else level, len(exercise.hints))
        self.hints[exercise.id] = max(shown, level)
        self.save()
        return level, exercise.hints[level - 1]

    def note(self, exercise: Exercise, earned: int, passed: bool) -> bool:
        """Record what a check gave. Once an exercise is passed, its solution may be read: True the first time."""
        first = passed and exercise.id not in self.passed
        if not first and self.earned.get(exercise.id) == earned:
            return False
        self.earned[exercise.id] = earned
        if first:
            self.passed[exercise.id] = now()
            self.reveal(exercise)
        self.save()
        return first

    def reveal(self, exercise: Exercise) -> Path:
        """Write the solution beside the student's own work."""
        target = self.folder / "solutions" / exercise.file_name
        write_whole(target, exercise.text("solution.py"))
        return target

    def reset(self, exercise: Exercise) -> Path | None:
        """Put the starter back; returns where the old file was kept."""
        path, kept = self.path(exercise), None
        if path.exists():
            kept = path.with_name(f"{path.stem}.{time.strftime('%Y%m%d-%H%M%S')}.bak")
            shutil.copy2(path, kept)
        write_whole(path, exercise.starter(exercise.page_name))
        return kept


def now() -> str:
    """The time, for the record."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make(folder: Path, exercises: list[Exercise], only: list[str] | None = None) -> tuple[Workspace, list[str]]:
    """Make, complete or renew a folder, for all exercises or `only` some; returns it and the names of what was written.

    A file that the student changed stays as it is; if its text in the course is newer, that is written to NAME.new.
    """
    files = {"README.md": _readme(exercises), "AGENTS.md": _AGENTS, "test_course.py": _TEST}
    for one in exercises:
        files[one.page_name] = one.text("README.md")
        if (folder / one.file_name).exists() or not any(folder.glob(f"{one.id}*.py")):  # not called otherwise here
            files[one.file_name] = one.starter(one.page_name)
    workspace = read(folder) or Workspace(folder, only=only or [])
    written = []
    for name, text in files.items():
        path, new = folder / name, _hash(text)
        last, workspace.given[name] = workspace.given.get(name, new), new
        if path.exists():
            here = _hash(path.read_text(encoding="utf-8", errors="replace"))
            if new in (here, last):  # it is the newest already, or was changed and there is nothing newer
                continue
            if here != last:
                path = path.with_name(f"{path.name}.new")
        write_whole(path, text)
        written.append(path.relative_to(folder).as_posix())
    workspace.save()
    return workspace, written


def read(folder: Path) -> Workspace | None:
    """The workspace in a folder, if it is one. A record that cannot be read counts as empty."""
    if not (folder / STATE).exists():
        return None
    try:
        record: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        kept = {name: dict(record.get(name, {})) for name in _KEPT}
        given = {str(name): str(value) for name, value in dict(record.get("given", {})).items()}
        return Workspace(folder, **kept, only=list(record.get("only", [])), given=given)
    except (ValueError, TypeError, AttributeError):
        return Workspace(folder)


def find(start: Path) -> Workspace:
    """The workspace around a folder. ValueError tells how to make one."""
    for folder in (start, *start.parents):
        if (workspace := read(folder)) is not None:
            return workspace
    raise ValueError(
        f"{start} is not in a course folder: make one with `minift-course init my-course`, then cd into it"
    )
