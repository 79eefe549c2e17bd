"""Exercises in a notebook: `%load_ext minift.course.notebook`, then a cell that begins with `%%minift_check e01`.

The text of the cell is what is graded, in the same child process as a file would be: what other cells define does not
count, so that a cell which passes here passes everywhere. The cell is run in the notebook, too.
"""

from typing import Any

from minift.course import registry
from minift.course.grader import Grader
from minift.course.render import show

# What every starter imports, on one line, so that the numbers of the cell's own lines move by one only.
PRELUDE = "import torch; import torch.nn.functional as F; from torch import Tensor\n"


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
        print(show(self.grader.grade(exercise, PRELUDE + cell, f"this cell, for {exercise.id}")))


def load_ipython_extension(shell: Any) -> None:
    """Called by `%load_ext minift.course.notebook`."""
    shell.register_magic_function(Cells(shell).minift_check, "cell", "minift_check")
