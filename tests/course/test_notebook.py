"""The cell magic grades the text of a cell, whatever else the notebook has defined."""

import contextlib
import io

import pytest

from minift.course import registry
from minift.course.notebook import load_ipython_extension

E01 = registry.find("e01")
CELL = E01.text("solution.py").split("from torch import Tensor\n")[1]  # no imports: those of the starter are there


@pytest.fixture(scope="module")
def magic():
    class Shell:
        ran: list[str] = []  # noqa: RUF012 (one shell, one list)

        def run_cell(self, cell):
            self.ran.append(cell)

        def register_magic_function(self, function, kind, name):
            self.magic = {"kind": kind, "name": name, "function": function}

    shell = Shell()
    load_ipython_extension(shell)
    assert (shell.magic["kind"], shell.magic["name"]) == ("cell", "minift_check")
    yield shell
    shell.magic["function"].__self__.grader.close()


def said(magic, line: str, cell: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        magic.magic["function"](line, cell)
    return text.getvalue()


def test_a_cell_is_run_and_graded(magic):
    assert "3 of 3 points" in said(magic, " e01 ", CELL)
    assert magic.ran[-1] == CELL


def test_a_wrong_cell_is_explained(magic):
    assert "cut off towards zero" in said(magic, "e01", CELL.replace("torch.round(x / scale)", "(x / scale)"))


def test_what_another_cell_defined_does_not_count(magic):
    assert "0 of 3 points" in said(magic, "e01", "answer = 1\n")
