"""A student's own package: adapters.py says which function is which, and is read, not run."""

import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from minift.course import registry, workspace
from minift.course.adapted import adapted
from minift.course.cli import cli

EXERCISES = registry.all_exercises()
E01, E02, E20 = EXERCISES["e01"], EXERCISES["e02"], EXERCISES["e20"]
MINE = E01.text("solution.py").replace("def quantize", "def to_int8").replace("def dequantize", "def from_int8")
BOTH = '{"quantize": "mylib.int8:to_int8", "dequantize": "mylib.int8:from_int8"}'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A course folder whose starters are gone: the code is in a package."""
    space, _ = workspace.make(tmp_path / "course", [E01, E02], ["e01", "e02"])
    for path in space.folder.glob("e*.py"):
        path.unlink()
    (space.folder / "mylib").mkdir()
    (space.folder / "mylib" / "int8.py").write_text(MINE)
    monkeypatch.chdir(space.folder)
    return space.folder


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value or 0, result.output


def test_functions_of_other_names_in_a_package_are_graded_and_handed_in(folder: Path):
    (folder / "adapters.py").write_text(f'"""Mine."""\nADAPT = {{"e01": {BOTH}}}\nraise SystemExit("never run")\n')
    status, said = run("check", "e01")
    assert status == 0 and "3 of 3 points" in said and str(folder / "mylib" / "int8.py") in said
    with pytest.raises(ValueError, match=r'adapters\.py has no place for e02: add "e02": "module:'):
        run("check", "e02")
    assert "3 of 7 points" in run("submit", "-o", "s.zip")[1]
    with zipfile.ZipFile(folder / "s.zip") as archive:
        assert archive.namelist() == ["e01_absmax.py", "manifest.json"]
        assert archive.read("e01_absmax.py").startswith(MINE.encode())


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("x = 1", "needs a line like ADAPT = "),
        ("ADAPT = (", "needs a line like ADAPT = "),
        ("ADAPT = dict(e01='mylib.int8')", "needs a line like ADAPT = "),
        ("ADAPT = {'e01': 'mylib.int8:to_int8'}", "has quantize, dequantize: ADAPT needs a place for each"),
        ("ADAPT = {'e01': {'quantize': 'mylib.int8:to_int8'}}", "must name quantize, dequantize, and nothing else"),
        ("ADAPT = {'e01': 7}", "must name quantize, dequantize"),
        ("ADAPT = {'e01': '../mylib'}", "is not like mylib.int8:to_int8"),
        ("ADAPT = {'e01': 'mylib.other'}", "but there is no "),
        ("ADAPT = {'e01': {'quantize': 'mylib.int8:a', 'dequantize': 'mylib.more:b'}}", "names several modules"),
    ],
)
def test_a_table_that_is_wrong_is_a_sentence(folder: Path, table: str, said: str):
    (folder / "adapters.py").write_text(table + "\n")
    with pytest.raises(ValueError) as error:
        adapted(folder, E01)
    assert said in str(error.value)


def test_a_module_with_the_names_of_the_page_is_taken_as_it_is(folder: Path):
    (folder / "mylib" / "__init__.py").write_text("y = 2\n")
    (folder / "adapters.py").write_text('ADAPT = {"e01": "mylib"}\n')
    assert adapted(folder, E01) == (folder / "mylib" / "__init__.py", b"y = 2\n")
    assert adapted(folder, E20) is None and adapted(folder / "mylib", E01) is None
