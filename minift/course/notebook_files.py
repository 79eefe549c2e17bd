"""The exercises as notebooks, one each, made from the same page and starter that the course folder is made from.

    page          README.md
    preparation   %load_ext minift.course.notebook
    your answer   %%minift_check e01 and the starter, to be written in place and run
    hints         three, folded up

Nothing in them depends on when, where or by whom they were made: what is committed can be compared with what the
sources give now. No output is stored, so that a reader sees nothing that was not run in front of him.
"""

import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minift.course.spec import Exercise

_PREPARATION = """Run this cell once. Then write your answer in the cell after it and run that, as often as you
like: its text is graded, whatever else the notebook has defined.

In a fresh environment: `pip install -e ".[notebooks]"` in a clone of the repository."""
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def _cell(exercise: Exercise, name: str, kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "cell_type": kind,
        "id": f"{exercise.id}-{name}",
        "metadata": {},
        "source": text.strip("\n").splitlines(keepends=True),
    }
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def _starter(exercise: Exercise) -> str:
    """The starter without its docstring, which speaks of files."""
    text = exercise.text("starter.py")
    tree = ast.parse(text)
    begin = tree.body[0].end_lineno if ast.get_docstring(tree) is not None else 0
    return "".join(text.splitlines(keepends=True)[begin:]).strip("\n")


def _hints(exercise: Exercise) -> str:
    folded = (
        f"<details><summary>Hint {number}</summary>\n\n{hint}\n\n</details>"
        for number, hint in enumerate(exercise.hints, 1)
    )
    return "\n\n".join(folded)


def notebook(exercise: Exercise) -> str:
    """The text of an exercise's notebook, in format 4.5."""
    cells = [
        _cell(exercise, "page", "markdown", exercise.text("README.md")),
        _cell(exercise, "preparation", "markdown", _PREPARATION),
        _cell(exercise, "load", "code", "%load_ext minift.course.notebook"),
        _cell(exercise, "answer", "code", f"%%minift_check {exercise.id}\n{_starter(exercise)}"),
        _cell(exercise, "hints", "markdown", _hints(exercise)),
    ]
    whole = {"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def index(exercises: Iterable[Exercise]) -> str:
    """The page that lists the notebooks."""
    rows = "\n".join(
        f"| [{one.id}]({one.folder.name}.ipynb) | {one.title} | {one.topic} | {one.points} | {one.minutes} |"
        for one in exercises
    )
    return f"""# The exercises as notebooks

Each holds one exercise of the course: the page, the starter, a cell that is graded when it is run, three hints. They
are made by `minift-course notebooks --output notebooks/exercises`; edit the sources in `minift/course/exercises/`.

| | exercise | topic | points | minutes |
| --- | --- | --- | --- | --- |
{rows}
"""


def files(exercises: Iterable[Exercise]) -> dict[str, str]:
    """File name -> text, of a folder of notebooks."""
    exercises = list(exercises)
    notebooks = {f"{one.folder.name}.ipynb": notebook(one) for one in exercises}
    return {"README.md": index(exercises)} | notebooks


def write(folder: Path, exercises: Iterable[Exercise]) -> list[str]:
    """Write what is not there in this form already; returns the names of the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in files(exercises).items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8", newline="\n")
            written.append(name)
    return written
