"""For Gradescope: results.json of one submission, and the zip that their machines run.

Contract: /autograder/{source,submission,results/results.json}; setup.sh once, run_autograder for each submission. Of
a check graded with the teacher's own key a student sees the sentence and the recognised mistake, not the numbers.
"""

import json
import stat
import zipfile
from pathlib import Path
from typing import Any

_SETUP = """#!/usr/bin/env bash
set -e
python3 -m pip install --index-url https://download.pytorch.org/whl/cpu torch
python3 -m pip install {package}
"""
_RUN = """#!/usr/bin/env bash
cd /autograder/source
python3 -m minift.course grade /autograder/submission --one --seeds {seeds}{exercises}{key} \\
    --gradescope /autograder/results/results.json --json /tmp/records --csv /tmp/grades.csv
"""


def results(record: dict[str, Any], secret: bool) -> dict[str, Any]:
    """The contents of results.json for one record; `secret`: graded with a key that students do not have."""
    tests = []
    for name, row in record["exercises"].items():
        for number, check in enumerate(row["checks"], 1):
            passed = check["status"] == "pass"
            said = [] if passed else [check["message"] if not secret else check["status"].replace("_", " ")]
            explained = check["name"] in row.get("explained", [])
            if explained:
                said += [f"This is exactly what you get when {row['explanation']}.", row["advice"]]
            tests.append({
                "name": f"{name} {row['title']}: {check['sentence']}",
                "number": f"{name}.{number}",
                "score": check["earned"],
                "max_score": check["points"],
                "status": "passed" if passed else "failed",
                "output": "\n".join(said),
                "tags": [row["misconception"]] if explained else [],
                "visibility": "visible",
            })  # fmt: skip
    files = "\n".join(f"{name}: {row['path']} sha256 {row['sha256'][:16]}" for name, row in record["exercises"].items())
    return {"score": record["earned"], "output": files, "tests": tests, "stdout_visibility": "hidden"}


def write_results(record: dict[str, Any], path: Path, secret: bool) -> None:
    """Write results.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results(record, secret), indent=1), encoding="utf-8")


def build(output: Path, key: Path | None, exercises: str, seeds: int, wheel: Path | None) -> None:
    """The autograder zip: both scripts, the key and, where minift comes from a file, its wheel."""
    files = {
        "setup.sh": _SETUP.format(package=f"/autograder/source/{wheel.name}" if wheel else "minift"),
        "run_autograder": _RUN.format(
            seeds=seeds,
            exercises=f" --exercises {exercises}" if exercises else "",
            key=" --seed-key seed.key" if key else "",
        ),
    }
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFREG | 0o755) << 16
            archive.writestr(info, text)
        if key is not None:
            archive.write(key, "seed.key")
        if wheel is not None:
            archive.write(wheel, wheel.name)
