"""What a class found hard: how many passed each check, which mistakes were made, which files are the same.

Files count as the same if they are once comments, docstrings and names are taken away. That is a lead to look at, not a
proof: a short exercise has few solutions.
"""

import ast
import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from minift.course.policy import parse


def shape_of(source: str) -> str | None:
    """A hash of the structure of a source, names and docstrings left out; None if it cannot be parsed."""
    try:
        tree = parse(source)
    except ValueError:
        tree = None
    if tree is None:
        return None
    kinds: list[str] = []
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
        constant = repr(node.value) if isinstance(node, ast.Constant) else ""
        attribute = node.attr if isinstance(node, ast.Attribute) else ""
        kinds.append(f"{type(node).__name__}{constant}{attribute}")
    return hashlib.sha256("|".join(kinds).encode()).hexdigest()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records that `grade` wrote. ValueError if there are none."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    records = [record for record in records if isinstance(record, dict) and "exercises" in record]
    if not records:
        raise ValueError(f"{folder} has no records: make them with `minift-course grade SUBMISSIONS --json {folder}`")
    return records


@dataclass(frozen=True)
class Found:
    """What the class made of one exercise."""

    id: str
    title: str
    points: int
    earned: float  # on average
    statuses: list[tuple[str, int]]  # the most frequent first
    checks: list[tuple[str, int]]  # sentence -> percent of the class that pass it
    mistakes: list[tuple[str, str, int]]  # name, misconception, how many made it
    hints: int  # students who took any
    seconds: float  # of grading, in the middle of the class


@dataclass(frozen=True)
class ClassReport:
    """What both forms of the report, text and page, are made from."""

    students: list[dict[str, Any]]  # the records
    points: int
    average: float
    exercises: list[Found]
    same: list[tuple[str, list[str]]]  # exercise -> students whose files are the same


def _found(name: str, rows: list[dict[str, Any]]) -> Found:
    mistakes = Counter((row["misconception"], row["explanation"]) for row in rows if row["misconception"])
    passed = [sum(row["checks"][i]["status"] == "pass" for row in rows) for i in range(len(rows[0]["checks"]))]
    return Found(
        id=name,
        title=rows[0]["title"],
        points=rows[0]["points"],
        earned=sum(row["earned"] for row in rows) / len(rows),
        statuses=Counter(row["status"] for row in rows).most_common(),
        checks=[(rows[0]["checks"][i]["sentence"], 100 * count // len(rows)) for i, count in enumerate(passed)],
        mistakes=[(label, text, count) for (label, text), count in mistakes.most_common()],
        hints=sum(row.get("hints", 0) > 0 for row in rows),
        seconds=median(row["seconds"] for row in rows),
    )


def examine(records: list[dict[str, Any]]) -> ClassReport:
    """Count: exercise by exercise, and which students' files are the same."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        for name, row in record["exercises"].items():
            if row.get("shape") and row["status"] != "not_started":
                groups[name, row["shape"]].append(record["student"])
    names = records[0]["exercises"]
    rows = {name: [one["exercises"][name] for one in records if name in one["exercises"]] for name in names}
    return ClassReport(
        students=records,
        points=records[0]["points"],
        average=sum(record["earned"] for record in records) / len(records),
        exercises=[_found(name, rows[name]) for name in names],
        same=[(name, students) for (name, _), students in groups.items() if len(students) > 1],
    )


def format_class(report: ClassReport) -> str:
    """The report as text, exercise by exercise."""
    lines = [f"{len(report.students)} submissions, {report.average:.1f} of {report.points} points on average"]
    for one in report.exercises:
        statuses = ", ".join(f"{count} {word}" for word, count in one.statuses)
        hints = f"; hints taken by {one.hints}" if one.hints else ""
        lines += ["", f"{one.id} {one.title}: {statuses}{hints}"]
        lines += [f"  {percent:3d} %  {sentence}" for sentence, percent in one.checks]
        lines += [f"  {count:3d} x  {label}: {text}" for label, text, count in one.mistakes]
    same = [f"  {name}: {', '.join(students)}" for name, students in report.same]
    return "\n".join([*lines, "", "the same but for names and comments (a lead, not a proof):", *(same or ["  none"])])
