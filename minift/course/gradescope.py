"""For Gradescope: results.json of one submission, and the zip that their machines run.

Contract: /autograder/{source,submission,results/results.json}; setup.sh once, run_autograder for each submission. Of
a check graded with the teacher's own key a student sees the sentence and the recognised mistake, not the numbers.
"""

import json
import stat
import zipfile
from collections.abc import Mapping
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from minift.course.marks import total_of
from minift.course.whole import whole_file, write_whole

_SETUP = """#!/usr/bin/env bash
set -e
{torch}python3 -m pip install /autograder/source/{wheel}
"""
_TORCH = """python3 -m pip install --index-url {url} '{requirement}'
"""
_RUN = """#!/usr/bin/env bash
cd /autograder/source
python3 -m minift.course grade /autograder/submission --one --seeds {seeds}{exercises}{key}{weights} \\
    --gradescope /autograder/results/results.json --json /tmp/records --csv /tmp/grades.csv
"""


def results(record: dict[str, Any], secret: bool, weights: Mapping[str, float]) -> dict[str, Any]:
    """The contents of results.json for one record; `secret`: graded with a key that students do not have."""
    tests = []
    for name, row in record["exercises"].items():
        weight = weights.get(name, 1)
        for number, check in enumerate(row["checks"], 1):
            passed = check["status"] == "pass"
            said = [] if passed else [check["message"] if not secret else check["status"].replace("_", " ")]
            explained = check["name"] in row.get("explained", [])
            if explained:
                said += [f"This is exactly what you get when {row['explanation']}.", row["advice"]]
            tests.append({
                "name": f"{name} {row['title']}: {check['sentence']}",
                "number": f"{name}.{number}",
                "score": weight * check["earned"],
                "max_score": weight * check["points"],
                "status": "passed" if passed else "failed",
                "output": "\n".join(said),
                "tags": [row["misconception"]] if explained else [],
                "visibility": "visible",
            })  # fmt: skip
    files = "\n".join(f"{name}: {row['path']} sha256 {row['sha256'][:16]}" for name, row in record["exercises"].items())
    return {"score": total_of(record, weights)[0], "output": files, "tests": tests, "stdout_visibility": "hidden"}


def write_results(record: dict[str, Any], path: Path, secret: bool, weights: Mapping[str, float]) -> None:
    """Write results.json."""
    write_whole(path, json.dumps(results(record, secret, weights), indent=1))


def build(
    output: Path, wheel: Path, exercises: str, seeds: int, key: Path | None, weights: Path | None, index_url: str | None
) -> None:
    """The autograder zip: both scripts, minift's wheel, and the key and the weights if there are any.

    index_url: a pip index with torch for CPUs; without one pip's usual torch is installed, on Linux that for GPUs.
    """
    (requirement,) = [one for one in requires("minift") or () if one.startswith("torch")]
    given = {"seed.key": key, "weights.toml": weights}
    files = {
        "setup.sh": _SETUP.format(
            torch=_TORCH.format(url=index_url, requirement=requirement) if index_url else "", wheel=wheel.name
        ),
        "run_autograder": _RUN.format(
            seeds=seeds,
            exercises=f" --exercises {exercises}" if exercises else "",
            key=" --seed-key seed.key" if key else "",
            weights=" --weights weights.toml" if weights else "",
        ),
    }
    with whole_file(output) as place, zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFREG | 0o755) << 16
            archive.writestr(info, text)
        archive.write(wheel, wheel.name)
        for name, path in given.items():
            if path is not None:
                archive.write(path, name)
