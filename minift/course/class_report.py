"""What a class found hard: how many passed each check, which mistakes were made, which files are the same.

Files count as the same if they are once comments, docstrings and names are taken away. That is a lead to look at, not a
proof: a short exercise has few solutions.
"""

import ast
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
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


def _lines_of(name: str, rows: list[dict[str, Any]]) -> list[str]:
    statuses = Counter(row["status"] for row in rows)
    lines = [f"{name} {rows[0]['title']}: " + ", ".join(f"{count} {word}" for word, count in statuses.most_common())]
    for number, check in enumerate(rows[0]["checks"]):
        passed = sum(row["checks"][number]["status"] == "pass" for row in rows)
        lines.append(f"  {100 * passed // len(rows):3d} %  {check['sentence']}")
    mistakes = Counter((row["misconception"], row["explanation"]) for row in rows if row["misconception"])
    lines += [f"  {count:3d} x  {label}: {text}" for (label, text), count in mistakes.most_common()]
    return lines


def format_class(records: list[dict[str, Any]]) -> str:
    """The report as text, exercise by exercise."""
    lines = [f"{len(records)} submissions, {sum(r['earned'] for r in records) / len(records):.1f} points on average"]
    for name in records[0]["exercises"]:
        lines += ["", *_lines_of(name, [r["exercises"][name] for r in records if name in r["exercises"]])]
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        for name, row in record["exercises"].items():
            if row.get("shape") and row["status"] != "not_started":
                groups[name, row["shape"]].append(record["student"])
    same = [f"  {name}: {', '.join(students)}" for (name, _), students in groups.items() if len(students) > 1]
    return "\n".join([*lines, "", "the same but for names and comments (a lead, not a proof):", *(same or ["  none"])])
