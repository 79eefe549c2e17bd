"""What is handed in: a zip of the student's files with a list of their hashes, the hints used and the points seen."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from minift.course.grader import Grader
from minift.course.spec import Exercise
from minift.course.whole import whole_file
from minift.course.workspace import Workspace, now

MANIFEST = "manifest.json"


def pack_submission(
    space: Workspace, exercises: list[Exercise], output: Path, say: Callable[[str], None]
) -> tuple[int, int]:
    """Grade with the public key, then write the zip. Returns the points earned, and those there are."""
    rows, files = {}, {}
    with Grader() as grader:
        for one in exercises:
            if not space.has(one):
                continue
            path, files[one.file_name] = space.code(one)
            verdict = grader.grade_bytes(one, files[one.file_name], path.absolute())
            space.note(one, verdict.earned, verdict.status == "pass")
            say(f"  {one.id} {one.title}: {verdict.earned} of {verdict.points} ({verdict.status})")
            rows[one.id] = {
                "file": one.file_name,
                "sha256": hashlib.sha256(files[one.file_name]).hexdigest(),
                "earned": verdict.earned,
                "points": verdict.points,
                "status": verdict.status,
                "hints": space.hints.get(one.id, 0),
                "given_up": one.id in space.given_up,
            }
    with whole_file(output) as place, zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(MANIFEST, json.dumps({"made": now(), "exercises": rows}, indent=2))
    return sum(row["earned"] for row in rows.values()), sum(one.points for one in exercises)
