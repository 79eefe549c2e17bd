"""Exercises in a notebook: `%load_ext minift.course.notebook`, then a cell that begins with `%%minift_check e01`.

The text of the cell is what is graded, in the same child process as a file would be: what other cells define does not
count, so that a cell which passes here passes everywhere. The cell is run in the notebook, too. Lines for the notebook
itself (%%time, %matplotlib inline, !ls) mean nothing in that process and are left out of what is graded.
"""

import ast
import re
from typing import Any

from minift.course import registry
from minift.course.grader import Grader
from minift.course.policy import parse
from minift.course.render import show

# What every starter imports, on one line, which has the number of the line with the magic.
PRELUDE = "import torch; import torch.nn.functional as F; from torch import Tensor"
_MAGIC = re.compile(r"^([ \t]*)(?=%%?[A-Za-z]|!|\?)", re.MULTILINE)


def graded_text(cell: str) -> str:
    """The file that a cell stands for, with the notebook's numbers of lines."""
    tree = _tree(cell)
    if tree is None:  # a line may begin with % in Python, too, so only in a text that is none
        cell = _MAGIC.sub(lambda found: f"{found[1]}pass  # " if found[1] else "# ", cell)
        tree = _tree(cell)
    future = [node for node in tree.body if _is_future(node)] if tree else []
    if not future:
        return f"{PRELUDE}\n{cell}"
    # Imports from __future__ must be the first statements of a file.
    lines = cell.encode().splitlines(keepends=True)
    line, column = (future[-1].end_lineno or 1) - 1, future[-1].end_col_offset or 0
    lines[line] = lines[line][:column] + f"; {PRELUDE}".encode() + lines[line][column:]
    return "\n" + b"".join(lines).decode()


def _tree(cell: str) -> ast.Module | None:
    try:
        return parse(cell)
    except ValueError:  # nested too deeply: the judge says so
        return None


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


class Cells:
    """The magic, with one warm process for all cells of a notebook."""

    def __init__(self, shell: Any) -> None:
        self.shell, self.grader = shell, Grader()

    def minift_check(self, line: str, cell: str) -> None:
        """%%minift_check e01: run this cell and grade its text."""
        try:
            exercise = registry.find(line.strip())
        except ValueError as error:
            print(error)
            return
        self.shell.run_cell(cell)
        print(show(self.grader.grade(exercise, graded_text(cell), f"this cell, for {exercise.id}")))


def load_ipython_extension(shell: Any) -> None:
    """Called by `%load_ext minift.course.notebook`."""
    shell.register_magic_function(Cells(shell).minift_check, "cell", "minift_check")
