"""Every study notebook runs from a clean kernel, shows what is stored, and neither redefines nor imports too much."""

import ast
import importlib.metadata
import importlib.util
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from packaging.requirements import Requirement

from notebooks.outputs import differences, run, stored, studies

ROOT = Path(__file__).parents[2]
PATHS = {path.stem: path for path in studies()}
LONG_OUTPUT = 30_000  # characters of text that one cell may show
EXERCISES = {path.stem for path in (ROOT / "notebooks" / "exercises").glob("*.ipynb")}


def notebooks():
    return pytest.mark.parametrize("name", PATHS)


def code_of(name: str) -> list[NotebookNode]:
    return [cell for cell in stored(PATHS[name]).cells if cell.cell_type == "code"]


def text_of(name: str) -> str:
    return "\n".join(cell.source for cell in stored(PATHS[name]).cells if cell.cell_type == "markdown")


def parsed(cell: NotebookNode) -> ast.Module:
    """The code of a cell without IPython's own lines (%pip, !ls)."""
    lines = (re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in cell.source.splitlines())
    return ast.parse("\n".join(lines))


@pytest.mark.notebooks
@pytest.mark.timeout(1200)
@notebooks()
def test_it_runs_and_shows_what_is_stored(name: str, real: Path, monkeypatch: pytest.MonkeyPatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    assert differences(stored(PATHS[name]), run(PATHS[name])) == []


@notebooks()
def test_it_was_run_from_top_to_bottom(name: str):
    cells = code_of(name)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert sum(bool(cell.outputs) for cell in cells) >= 4
    nbformat.validate(stored(PATHS[name]))


@notebooks()
def test_it_tells_nothing_about_a_machine(name: str):
    text = re.sub(r'"image/png": "[^"]*"', "", PATHS[name].read_text(encoding="utf-8"))
    assert re.findall(r"/home/\w+|/Users/\w+|/root\b|/tmp/\w+|C:\\\\Users", text) == []
    assert re.findall(r"https?://(?:localhost|127|10\.|192\.168)", text) == []
    here = (str(Path.home()), tempfile.gettempdir() + "/", f"{ROOT.anchor}{ROOT.parts[1]}/")
    assert [place for place in here if place in text] == []
    assert not re.search(r" at 0x[0-9a-f]{6,}", text), "an address differs on every run"


@notebooks()
def test_what_a_cell_shows_is_short_enough_to_read(name: str):
    for cell in code_of(name):
        for output in cell.outputs:
            shown = output.get("text", "") + "".join(output.get("data", {}).get("text/html", ""))
            assert len(shown) <= LONG_OUTPUT, cell.id


@cache
def installed() -> frozenset[str]:
    """The distributions that `pip install minift[notebooks]` brings, as far as they are installed here."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in importlib.metadata.requires("minift") or []]
    waiting = [one for one in waiting if one.marker is None or one.marker.evaluate({"extra": "notebooks"})]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop().name).lower()
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        needed = (Requirement(line) for line in lines)
        waiting += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return frozenset(found)


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of the modules that are imported."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def foreign(names: set[str]) -> set[str]:
    """Those that neither Python, minift nor its `notebooks` extra brings."""
    owners = importlib.metadata.packages_distributions()
    ours = {"minift", "minift_kernels", *sys.stdlib_module_names}
    return {
        name
        for name in names - ours
        if not any(re.sub(r"[-_.]+", "-", owner).lower() in installed() for owner in owners.get(name, []))
    }


@notebooks()
def test_it_imports_only_what_is_installed_with_it(name: str):
    assert foreign(set().union(*(imports(parsed(cell)) for cell in code_of(name)))) == set()


def test_the_test_of_imports_knows_a_stranger():
    assert foreign({"peft", "torch", "IPython", "json", "minift", "pytest"}) == {"peft", "pytest"}


@cache
def library_names() -> frozenset[str]:
    """Names of functions and classes that the library defines."""
    found = set()
    for path in (ROOT / "minift").rglob("*.py"):
        if "course" not in path.parts:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return frozenset(found)


@notebooks()
def test_it_redefines_nothing_of_the_library(name: str):
    for cell in code_of(name):
        nodes = [node for node in ast.walk(parsed(cell)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert {node.name for node in nodes} & library_names() == set()
        assert all((node.end_lineno or 0) - node.lineno < 16 for node in nodes), "long code belongs into the library"


@notebooks()
def test_it_asks_before_it_answers_and_says_where_to_go(name: str):
    text, first = text_of(name), code_of(name)[0].source
    assert text.startswith(f"# {name[:2]} ")
    assert text.count("**Predict") >= 2
    assert "Break it" in text
    assert "Next" in text
    assert "%pip install --quiet .." in first and 'find_spec("minift")' in first


@notebooks()
def test_every_file_and_exercise_that_it_names_exists(name: str):
    text = text_of(name)
    for place in re.findall(r"`((?:minift|kernels|tests|benchmarks|notebooks)/[\w/.]+\.\w+)`", text):
        assert (ROOT / place).exists(), place
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / "notebooks" / link).exists(), link
    assert set(re.findall(r"minift-course check (\w+)", text)) <= {stem.split("_")[0] for stem in EXERCISES}


def test_there_is_no_hole_in_the_reading_order():
    assert [int(name[:2]) for name in PATHS] == [*range(len(PATHS))]
    assert len(PATHS) >= 24
