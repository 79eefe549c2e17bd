"""The cell magic grades the text of a cell, whatever else the notebook has defined."""

import __future__

import contextlib
import io

import pytest

from minift.course import registry
from minift.course.notebook import PRELUDE, graded_text, load_ipython_extension

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


@pytest.mark.parametrize(
    "first",
    [
        "from __future__ import annotations\n",
        '"""Mine."""\nfrom __future__ import (\n    annotations,  # for the types\n)  # ä\n',
        "%%time\n",
        "%%time\nfrom __future__ import annotations; import math\n",
        "%matplotlib inline\n!ls\n?torch\nif True:\n    %time 1\n",
    ],
)
def test_what_belongs_to_the_notebook_is_no_mistake(magic, first: str):
    assert "3 of 3 points" in said(magic, "e01", first + CELL)
    assert magic.ran[-1] == first + CELL  # the notebook runs the cell as it is


@pytest.mark.parametrize("first", ["", "from __future__ import annotations  # first\n", "%%time\n"])
def test_lines_keep_the_numbers_that_the_notebook_shows(first: str):
    """The magic is line 1 of the cell, so the text below it begins with line 2."""
    shown = ["%%minift_check e01", *(first + "1 / 0\n").splitlines()]
    graded = graded_text(first + "1 / 0\n").splitlines()
    assert len(graded) == len(shown) and graded.index("1 / 0") == shown.index("1 / 0")
    assert sum(PRELUDE in line for line in graded) == 1
    code = compile("\n".join(graded), "cell", "exec", dont_inherit=True)
    assert bool(code.co_flags & __future__.annotations.compiler_flag) == ("__future__" in first)


def test_a_line_that_begins_with_a_remainder_is_python():
    cell = "x = (7\n     %two)\n"
    assert graded_text(cell) == f"{PRELUDE}\n{cell}"
