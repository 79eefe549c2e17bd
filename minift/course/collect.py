"""Who handed in what: folders, zips and single files, with the names that learning platforms give them.

    submissions/
        alice/e01_absmax.py ...                                      a folder a student
        bob.zip                                                      `minift-course submit`, or any zip of files
        carol_e01_absmax.py                                          single files
        doejane_LATE_12345_67890_e01_absmax.py                       Canvas
        Jane Doe_12345_assignsubmission_file_/e01_absmax.py          Moodle

Nothing is unpacked to disk, and nothing is run. What a student's own record says of hints is taken along; whoever
wants to can change it, so it tells what was hard and counts for nothing.
"""

import contextlib
import hashlib
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from minift.course.spec import Exercise
from minift.course.submission import MANIFEST
from minift.course.workspace import STATE

LARGEST = 1 << 20  # bytes of one source file
ALTOGETHER = 1 << 26  # bytes that are read of one zip
_LEFT_OUT = {"solutions", "pages", "__MACOSX", "__pycache__", "site-packages"}
_RECORDS = (MANIFEST, STATE)
_PLATFORM = re.compile(r"(_LATE)?_(\d+)_(assignsubmission_.*|\d+_.*)$")
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError)


@dataclass
class Submission:
    """One student's files: exercise id -> (where it came from, its bytes)."""

    student: str
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    problem: str = ""
    hints: dict[str, int] = field(default_factory=dict)  # exercise -> highest level shown

    @property
    def digest(self) -> str:
        """A hash of everything that was handed in: what was graded before need not be graded again."""
        whole = hashlib.sha256()
        for exercise, (_, data) in sorted(self.files.items()):
            whole.update(exercise.encode() + hashlib.sha256(data).digest())
        whole.update(json.dumps(self.hints, sort_keys=True).encode())
        return whole.hexdigest()


def student_of(name: str) -> str:
    """The student in the name of a folder or file, without what the platform added."""
    return _PLATFORM.sub("", name) or name


def _number_of(name: str) -> str:
    """The platform's number of the student, which tells two of one name apart; empty if there is none."""
    found = _PLATFORM.search(name)
    return found[2] if found else ""


def _exercise_of(name: str, exercises: list[Exercise]) -> Exercise | None:
    """Which exercise a file is: e01_absmax.py, e01.py, anything_e01_absmax.py, also in upper case."""
    stem = PurePosixPath(name).name.lower()
    if not stem.endswith(".py") or stem.startswith(("bughunt_", "test_", ".")):
        return None
    found = [one for one in exercises if re.search(rf"(^|_){re.escape(one.id)}(?![0-9])", stem)]
    return found[0] if found else None


def _add(submission: Submission, exercises: list[Exercise], name: str, data: bytes, where: str) -> None:
    parts = PurePosixPath(name).parts
    exercise = None if _LEFT_OUT.intersection(parts) else _exercise_of(name, exercises)
    if exercise is None:
        return
    # Of several files for one exercise the one with the usual name counts, wherever it lies.
    known = submission.files.get(exercise.id)
    if known is None or PurePosixPath(name).name == exercise.file_name:
        submission.files[exercise.id] = (where, data)


def _add_hints(submission: Submission, exercises: list[Exercise], data: bytes) -> None:
    """The hints of a manifest.json or of a folder's own record; one that is none is passed over."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        record: Any = json.loads(data)
        handed_in = record.get("exercises")
        told = {name: row["hints"] for name, row in handed_in.items()} if handed_in else record["hints"]
        for one in exercises:
            if type(told.get(one.id)) is int and 0 < told[one.id] <= len(one.hints):
                submission.hints[one.id] = told[one.id]


def _read_zip(submission: Submission, path: Path, exercises: list[Exercise]) -> None:
    room = ALTOGETHER
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                record = PurePosixPath(info.filename).name in _RECORDS
                if info.is_dir() or not (record or _exercise_of(info.filename, exercises)):
                    continue
                room -= info.file_size
                if info.file_size > LARGEST or room < 0:
                    submission.problem = f"{path.name}/{info.filename} has {info.file_size} bytes, which is too much"
                    continue
                if record:
                    _add_hints(submission, exercises, archive.read(info))
                else:
                    _add(submission, exercises, info.filename, archive.read(info), f"{path}/{info.filename}")
    except _UNREADABLE as error:
        submission.problem = f"{path.name} cannot be read: {error}"


def _read_file(submission: Submission, path: Path, exercises: list[Exercise], name: str) -> None:
    """A zip or a source file; other files are passed over."""
    if path.suffix.lower() == ".zip":
        _read_zip(submission, path, exercises)
    elif path.name in _RECORDS or _exercise_of(name, exercises):
        try:
            if path.stat().st_size > LARGEST:
                submission.problem = f"{name} has {path.stat().st_size} bytes, which is too much"
            elif path.name in _RECORDS:
                _add_hints(submission, exercises, path.read_bytes())
            else:
                _add(submission, exercises, name, path.read_bytes(), str(path))
        except OSError as error:
            submission.problem = f"{name} cannot be read: {error}"


def read_submission(path: Path, exercises: list[Exercise], student: str = "") -> Submission:
    """The files of one student from a folder, a zip or a single file."""
    submission = Submission(student or student_of(path.stem if path.is_file() else path.name))
    if path.is_dir():
        for inside in sorted(path.rglob("*")):
            if inside.is_file() and not inside.is_symlink():
                _read_file(submission, inside, exercises, inside.relative_to(path).as_posix())
    else:
        _read_file(submission, path, exercises, path.name)
    if not submission.files and not submission.problem:
        submission.problem = f"{path.name} holds no file called like {exercises[0].file_name}"
    return submission


def _student_of_file(path: Path, exercises: list[Exercise]) -> str:
    exercise = _exercise_of(path.name, exercises)
    platform = student_of(path.stem)
    if platform != path.stem or exercise is None:
        return platform
    return re.split(rf"_?{re.escape(exercise.id)}(?![0-9])", path.stem, flags=re.IGNORECASE)[0] or path.stem


def collect(folder: Path, exercises: list[Exercise], records: Path | None = None) -> Iterator[Submission]:
    """All submissions in a folder, by student; `records`, should it lie there, is none. ValueError if there are none.

    Two students of one name are told apart by the platform's number: Jane Doe (991), Jane Doe (992).
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: unpack it into a folder, or grade it as one submission with --one")
    found: dict[tuple[str, str], Submission] = {}
    for path in sorted(folder.iterdir()):
        kind = path.suffix.lower()
        if path.name.startswith(".") or not (path.is_dir() or kind in (".zip", ".py")):
            continue
        if records is not None and path.resolve() == records.resolve():
            continue
        one = read_submission(path, exercises, _student_of_file(path, exercises) if kind == ".py" else "")
        known = found.setdefault((one.student, _number_of(path.name)), Submission(one.student))
        known.files |= one.files
        known.hints |= one.hints
        known.problem = known.problem or one.problem
    if not found:
        raise ValueError(
            f"{folder} has no submissions: a folder, a zip or files such as alice_e01_absmax.py for each student"
        )
    names = [name for name, _ in found]
    for (name, number), one in found.items():
        if names.count(name) > 1 and number:
            one.student = f"{name} ({number})"
    yield from sorted(found.values(), key=lambda one: one.student)
