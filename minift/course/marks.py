"""A teacher's run: every submission graded, one JSON file a student, one CSV for all.

Resumable: a student whose files, exercises and key have not changed is read from the JSON file. In parallel: every
thread has a runner of its own, and so its own child processes; what the known mistakes answer is shared. A submission
that breaks its process costs the others nothing.
"""

import csv
import hashlib
import json
import math
import re
import threading
import tomllib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minift.course.class_report import shape_of
from minift.course.collect import Submission
from minift.course.grader import Grader
from minift.course.judge import PUBLIC_KEY, SEEDS, Verdict
from minift.course.spec import Exercise
from minift.course.whole import whole_file, write_whole

_FILES = ("checks.py", "exercise.toml", "mutants.toml", "solution.py", "drive.py")

COLUMNS = ("points", "status", "passed", "misconception", "sha256")


def plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON can hold it."""
    checks = [asdict(one) | {"earned": one.earned, "size": None} for one in verdict.checks]
    return asdict(verdict) | {
        "status": verdict.status, "earned": verdict.earned, "points": verdict.points, "checks": checks
    }  # fmt: skip


def grade_submission(submission: Submission, exercises: list[Exercise], grader: Grader) -> dict[str, Any]:
    """One student's record: exercise id -> verdict. What was not handed in is not started."""
    record: dict[str, Any] = {"student": submission.student, "problem": submission.problem, "exercises": {}}
    for one in exercises:
        where, data = submission.files.get(one.id, ("(not handed in)", b""))
        verdict = grader.grade_bytes(one, data, where)
        shape = shape_of(data.decode("utf-8", "replace"))
        record["exercises"][one.id] = plain(verdict) | {"shape": shape, "hints": submission.hints.get(one.id, 0)}
    record["earned"] = sum(row["earned"] for row in record["exercises"].values())
    record["points"] = sum(row["points"] for row in record["exercises"].values())
    return record


def stamp_of(submission: Submission, exercises: list[Exercise], key: bytes, seeds: int) -> str:
    """What a record depends on; the key itself is not written anywhere."""
    parts = [submission.digest, hashlib.sha256(key).hexdigest(), str(seeds)]
    for one in exercises:
        parts += [one.id, *(one.text(name) for name in _FILES if (one.folder / name).exists())]
        parts += [name for name in one.requires if find_spec(name) is None]  # graded again once it is installed
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def record_path(out: Path, student: str) -> Path:
    """A file name for a student, whatever the name is made of."""
    safe = re.sub(r"[^\w.-]+", "_", student)[:80]
    return out / f"{safe}-{hashlib.sha256(student.encode()).hexdigest()[:8]}.json"


def _read_record(path: Path, stamp: str) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("stamp") == stamp else None


def grade_all(
    submissions: Iterable[Submission],
    exercises: list[Exercise],
    out: Path,
    key: bytes = PUBLIC_KEY,
    seeds: int = SEEDS,
    jobs: int = 1,
    progress: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Grade what is not graded yet; returns the records of all students, by name.

    Stopped (Ctrl-C), it ends what is running and keeps the records that are complete.
    """
    out.mkdir(parents=True, exist_ok=True)
    own, graders = threading.local(), [Grader(key, seeds)]
    for one in exercises:  # loaded and drawn once, before threads ask for them
        graders[0].cases(one)
        list(one.mutants)

    def grader() -> Grader:
        if not hasattr(own, "grader"):
            own.grader = graders[0].twin()
            graders.append(own.grader)
        return own.grader

    def work(submission: Submission) -> dict[str, Any]:
        path, stamp = record_path(out, submission.student), stamp_of(submission, exercises, key, seeds)
        record = _read_record(path, stamp)
        if record is None:
            record = grade_submission(submission, exercises, grader()) | {"stamp": stamp}
            write_whole(path, json.dumps(record, indent=1))
        progress()
        return record

    pool = ThreadPoolExecutor(jobs)
    try:
        records = [done.result() for done in as_completed([pool.submit(work, one) for one in submissions])]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for one in graders:
            one.close()
    return sorted(records, key=lambda record: record["student"])


def read_weights(path: Path, exercises: list[Exercise]) -> dict[str, float]:
    """What to multiply an exercise's points by in a total, as a TOML file says: `e01 = 2`, `e07 = 0`; 1 for the others.

    ValueError if the file is no TOML, names an exercise that is not graded, or holds anything but numbers from 0 on.
    """
    try:
        weights = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}; write lines such as e01 = 2") from error
    known = [one.id for one in exercises]
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(f"{path} weighs {name}, which is not among {known[0]} to {known[-1]} that are graded")
        if type(weight) not in (int, float) or not 0 <= weight < math.inf:
            raise ValueError(f"{path}: {name} = {weight!r}; a weight is a number from 0 on")
    return weights


def total(points: Mapping[str, int], weights: Mapping[str, float]) -> float:
    """Points of all exercises together, to the hundredth where weights make them broken."""
    value = round(sum(weights.get(name, 1) * count for name, count in points.items()), 2)
    return int(value) if value == int(value) else value


def total_of(record: dict[str, Any], weights: Mapping[str, float]) -> tuple[float, float]:
    """A student's total, and the most it could be."""
    rows = record["exercises"].items()
    return (
        total({name: row["earned"] for name, row in rows}, weights),
        total({name: row["points"] for name, row in rows}, weights),
    )


def _text(value: Any) -> Any:
    """A name that starts like a formula must not become one in a spreadsheet."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def write_csv(
    records: list[dict[str, Any]], exercises: list[Exercise], path: Path, weights: Mapping[str, float]
) -> None:
    """One row a student; the second row holds what could be had. Weights change the totals only."""
    header = ["student", "total", "max", *(f"{one.id} {name}" for one in exercises for name in COLUMNS)]
    best: list[Any] = ["(maximum)", *(2 * [total({one.id: one.points for one in exercises}, weights)])]
    for one in exercises:
        best += [one.points, "pass", f"{len(one.checks)}/{len(one.checks)}", "", ""]
    with whole_file(path) as place, open(place, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([header, best])
        for record in records:
            row = [_text(record["student"]), *total_of(record, weights)]
            for one in exercises:
                found = record["exercises"][one.id]
                passed = sum(check["status"] == "pass" for check in found["checks"])
                row += [found["earned"], found["status"], f"{passed}/{len(found['checks'])}"]
                row += [found["misconception"], found["sha256"]]
            writer.writerow(row)
