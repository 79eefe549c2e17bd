"""The committed notebooks are what the sources give now, are valid, and a reader can run them to full points."""

import contextlib
import io
import json
import linecache
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from minift.course import registry
from minift.course.cli import cli
from minift.course.notebook import load_ipython_extension
from minift.course.notebook_files import files, notebook

EXERCISES = registry.all_exercises()
COMMITTED = Path(__file__).parents[2] / "notebooks" / "exercises"


def exercises():
    return pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES.keys())


def cells_of(exercise) -> dict[str, dict[str, Any]]:
    return {cell["id"].removeprefix(f"{exercise.id}-"): cell for cell in json.loads(notebook(exercise))["cells"]}


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_committed_notebooks_are_what_the_sources_give():
    if not COMMITTED.exists():
        pytest.skip("needs a checkout: the notebooks are not in the wheel")
    there = {path.name: path.read_text(encoding="utf-8") for path in COMMITTED.iterdir() if path.is_file()}
    expected = files(EXERCISES.values())
    different = [name for name in {*there, *expected} if there.get(name) != expected.get(name)]
    assert different == [], "out of date: run `minift-course notebooks --output notebooks/exercises`"


@exercises()
def test_a_notebook_holds_the_exercise_and_nothing_of_the_machine(exercise):
    text, cells = notebook(exercise), cells_of(exercise)
    assert source_of(cells["page"]) == exercise.text("README.md").strip("\n")
    answer = source_of(cells["answer"])
    assert answer.startswith(f"%%minift_check {exercise.id}\n") and "README.md" not in answer
    starter = exercise.text("starter.py")
    assert answer.split("\n", 1)[1] in starter and all(f"{name}" in answer for name in exercise.names)
    assert all(hint in source_of(cells["hints"]) for hint in exercise.hints)
    code = [cell for cell in cells.values() if cell["cell_type"] == "code"]
    assert len(code) == 2 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert exercise.text("solution.py").split('"""')[2][:200] not in text
    assert str(Path.home()) not in text and not re.search(r"\d{4}-\d\d-\d\d", text)


@exercises()
def test_a_notebook_is_valid(exercise):
    nbformat = pytest.importorskip("nbformat", reason="nbformat comes with the notebooks extra")
    nbformat.validate(nbformat.reads(notebook(exercise), as_version=4))


def test_the_command_writes_what_has_changed_only(tmp_path: Path):
    def run() -> str:
        result = CliRunner().invoke(cli, ["notebooks", "--output", str(tmp_path), "--exercises", "e01,e20"])
        assert result.exit_code == 0, result.output
        return result.output

    assert "2 notebooks" in run() and {path.name for path in tmp_path.iterdir()} == {
        "README.md", "e01_absmax.ipynb", "e20_lora_by_hand.ipynb",
    }  # fmt: skip
    assert "0 files written" in run()
    (tmp_path / "e01_absmax.ipynb").write_text("mine")
    assert "1 files written" in run()
    assert (tmp_path / "e01_absmax.ipynb").read_text(encoding="utf-8") == notebook(EXERCISES["e01"])


class Shell:
    """What of IPython a generated notebook uses: one extension, one magic, cells that are run."""

    def __init__(self) -> None:
        self.space: dict[str, Any] = {}

    def register_magic_function(self, function, kind, name) -> None:
        assert kind == "cell" and name == "minift_check"
        self.magic = function

    def run_cell(self, text: str) -> None:
        if text.strip() == "%load_ext minift.course.notebook":
            load_ipython_extension(self)
        elif text.startswith("%%minift_check "):
            line, cell = text.split("\n", 1)
            self.magic(line.removeprefix("%%minift_check"), cell)
        else:
            name = f"<cell {len(linecache.cache)}>"
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # Triton reads its source
            exec(compile(text, name, "exec"), self.space)


@pytest.fixture(scope="module")
def shell():
    """A shell in which the preparation has been run: the cell is the same in every notebook."""
    made = Shell()
    made.run_cell(source_of(cells_of(EXERCISES["e01"])["load"]))
    yield made
    made.magic.__self__.grader.close()


def printed_by(shell, text: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        shell.run_cell(text)
    return said.getvalue()


@exercises()
def test_the_answer_cell_is_graded(shell, exercise):
    """The starter as it stands gets nothing; with the solution in its place the cell gets everything."""
    cell = source_of(cells_of(exercise)["answer"])
    said = printed_by(shell, cell)
    assert f"0 of {exercise.points} points" in said and "TODO" in said, said
    said = printed_by(shell, f"%%minift_check {exercise.id}\n{exercise.text('solution.py')}")
    assert f"{exercise.points} of {exercise.points} points" in said, said


def test_a_wrong_name_is_a_sentence(shell):
    assert printed_by(shell, "%%minift_check e99\nx = 1\n").startswith("there is no exercise 'e99'; there are e01")


def test_in_ipython_itself(tmp_path: Path, monkeypatch):
    interactive = pytest.importorskip("IPython.core.interactiveshell", reason="IPython comes with the notebooks extra")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    real, cells = interactive.InteractiveShell(), cells_of(EXERCISES["e01"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for text in (source_of(cells["load"]), f"%%minift_check e01\n{EXERCISES['e01'].text('solution.py')}"):
            real.run_cell(text).raise_error()
    real.magics_manager.magics["cell"]["minift_check"].__self__.grader.close()
    assert "3 of 3 points" in said.getvalue()
    assert "quantize" in real.user_ns  # the cell has been run in the notebook, too


@pytest.mark.slow
def test_in_a_jupyter_kernel(tmp_path: Path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat comes with the notebooks extra")
    nbclient = pytest.importorskip("nbclient", reason="nbclient comes with the notebooks extra")
    pytest.importorskip("ipykernel", reason="ipykernel comes with the notebooks extra")
    made = nbformat.reads(notebook(EXERCISES["e01"]), as_version=4)
    done = nbclient.NotebookClient(made, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (answer,) = [cell for cell in done.cells if cell["id"] == "e01-answer"]
    assert "0 of 3 points" in "".join(output.get("text", "") for output in answer["outputs"])
