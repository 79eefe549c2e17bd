"""The house rules: who may import whom, what a wheel holds, what an import costs, what every file has.

Floors: a file imports its own room and lower floors only. The checker reads the source (imports inside functions and
under TYPE_CHECKING count, and so do modules named in importlib calls) and is itself tried on planted sources.
"""

import ast
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import minift

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"minift_kernels", "course"},  # the course stands apart: nothing of the library may help to grade an exercise
    {"atomic", "heap", "numerics", "sources"},
    {"quant"},
    {"optim", "model", "data"},
    {"adapters"},
    {"train"},
    {"study"},
    {"demo", "options", "cli", "roof"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Imports on one floor that the plan draws: converted models are written as a whole or not at all; on the roof the
# `demo` command runs the demo, and both need what `import minift` gives.
DRAWN = {
    ("sources", "atomic"), ("sources", "heap"), ("cli", "options"), ("cli", "demo"), ("cli", "roof"), ("demo", "roof"),
}  # fmt: skip


def source_files() -> dict[str, Path]:
    """Module name -> file, of everything in the two packages."""
    files = {}
    for base, package in ((ROOT, "minift"), (ROOT / "kernels", "minift_kernels")):
        for path in sorted(base.glob(f"{package}/**/*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = source_files()


def room(module: str) -> str:
    """minift.quant.linear -> quant; minift.atomic -> atomic; minift itself -> roof."""
    package, _, rest = module.partition(".")
    return package if package != "minift" else rest.split(".")[0] or "roof"


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("minift", "minift_kernels")


def imported_modules(source: str, module: str, is_package: bool) -> list[tuple[int, str, bool]]:
    """(line, imported module of ours, whether inside a function) for each import of a source text."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *base.split(".")] if base else parts)
            # `from minift import quant` means the room; `from minift import train` the function of that name, or its
            # room: both lie above whoever is not on the roof, so it does not matter which.
            is_room = [f"{base}.{alias.name}" in FILES or alias.name in FLOOR for alias in node.names]
            names = [
                f"{base}.{alias.name}" if base == "minift" and known else base
                for alias, known in zip(node.names, is_room, strict=True)
            ]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        found.extend((getattr(node, "lineno", 0), name, in_function) for name in names if is_ours(name))
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(source), False)
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a source text imports against the rules, one sentence each."""
    own, wrong = room(module), []
    for line, target, in_function in imported_modules(source, module, is_package):
        other = room(target)
        where = f"{module}:{line} imports {target}"
        if own not in FLOOR or other not in FLOOR:
            wrong.append(f"{where}: give the new room a floor in FLOORS")
        elif own == "minift_kernels" and other != own:
            wrong.append(f"{where}: kernels know nothing of minift")
        elif other == "minift_kernels" and own != other and not in_function:
            wrong.append(f"{where}: kernels are imported inside functions only, Triton loads with them")
        elif own != other and FLOOR[other] >= FLOOR[own] and (own, other) not in DRAWN and own != "roof":
            wrong.append(f"{where}: {other} (floor {FLOOR[other]}) is not below {own} (floor {FLOOR[own]})")
    return wrong


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str):
    path = FILES[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


def test_all_rooms_are_known():
    assert {room(module) for module in FILES} <= set(FLOOR)
    assert len(FILES) > 40, "the files were not found"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minift.quant.linear", "from minift.optim.adamw import AdamW"),
        ("minift.quant.linear", "import minift.model.decoder"),
        ("minift.quant.linear", "import torch, minift.train.loop as loop"),
        ("minift.quant.linear", "def f():\n    from minift.adapters import lora"),
        ("minift.quant.linear", "class A:\n    def f(self):\n        import minift.cli"),
        (
            "minift.quant.linear",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minift.train.loop import x",
        ),
        ("minift.quant.linear", "try:\n    import minift.data\nexcept ImportError:\n    pass"),
        ("minift.quant.linear", "from minift import LoraConfig"),
        ("minift.quant.linear", "from minift import train"),
        ("minift.quant.linear", "import minift"),
        ("minift.quant.linear", "from ..model import decoder"),
        ("minift.quant.linear", "from .. import data"),
        ("minift.quant.linear", "import importlib\nimportlib.import_module('minift.train.loop')"),
        ("minift.quant.linear", "from minift_kernels.fourbit import dequantize_4bit"),
        ("minift.quant.linear", "if x:\n    import minift_kernels"),
        ("minift.model.load", "def f(x=None):\n    pass\nfrom minift_kernels import fourbit"),
        ("minift.model.load", "from minift.optim.adamw import AdamW"),
        ("minift.data.encode", "from minift.model.config import ModelConfig"),
        ("minift.numerics.dtypes", "from minift.sources.resolve import resolve"),
        ("minift.atomic", "from minift.sources.resolve import resolve"),
        ("minift.train.loop", "from minift.study.plots.runs import plot"),
        ("minift.train.loop", "from minift.cellar import wine"),
        ("minift.cellar", "from minift.quant import codebook"),
        ("minift_kernels.fourbit", "from minift.quant.codebooks import codebook"),
        ("minift_kernels.fourbit", "def f():\n    import minift"),
    ],
)
def test_planted_imports_are_found(module: str, source: str):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "minift.quant.linear",
            "from minift.quant.fourbit import x\nfrom .codebooks import y\nfrom . import blockwise",
        ),
        ("minift.quant.linear", "from minift.numerics import dtypes\nfrom ..numerics.dtypes import DTYPES"),
        ("minift.quant.fourbit", "def f():\n    from minift_kernels.fourbit import dequantize_4bit"),
        (
            "minift.train.loop",
            "from minift.optim.adamw import AdamW\nfrom minift.data import chat\nimport minift.model.load",
        ),
        ("minift.train.loop", "from minift import data, quant\nfrom minift_extra import x\nimport torch"),
        ("minift.sources.gguf", "from minift.atomic import atomic_folder"),
        ("minift.cli", "import minift\nfrom minift.train.loop import train"),
        ("minift_kernels.fourbit", "import triton\nfrom minift_kernels import other\nfrom . import another"),
    ],
)
def test_allowed_imports_pass(module: str, source: str):
    assert violations(source, module) == []


def test_relative_imports_of_a_package():
    assert violations("from .quant import codebook", "minift", is_package=True) == []
    assert violations("from .linear import Linear4bit", "minift.quant", is_package=True) == []
    assert len(violations("from ..train import loop", "minift.quant", is_package=True)) == 1


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The paths in a wheel that is built from a copy of the tracked files: what a fresh clone would give."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: the wheel is built from the tracked files")
    checkout, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, checkout / name)
    if importlib.util.find_spec("setuptools") and importlib.util.find_spec("build"):
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist)]
    else:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(dist), "."]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_installs_two_packages(wheel_names: list[str]):
    """Anything else on the top level would shadow other people's packages (`tests`, `kernels`, `benchmarks`)."""
    top = {name.split("/")[0] for name in wheel_names}
    assert top == {"minift", "minift_kernels", f"minift-{minift.__version__}.dist-info"}


def test_wheel_holds_every_module_and_asset(wheel_names: list[str]):
    """A room that pyproject.toml does not list would be missing from the wheel, but not from an editable install."""
    modules = {
        name.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
        for name in wheel_names
        if name.endswith(".py")
    }
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split()
    wanted = {module for module, path in FILES.items() if path.relative_to(ROOT).as_posix() in tracked}
    assert modules == wanted
    assets = {path.relative_to(ROOT).as_posix() for path in (ROOT / "minift" / "assets").glob("*.jsonl")}
    assert assets and assets <= set(wheel_names)
    assert "minift/py.typed" in wheel_names


def test_wheel_holds_no_tests(wheel_names: list[str]):
    named = ("test", "conftest", "peers")  # a file or a folder; pytest_items.py is what a student's own tests import
    unwanted = [name for name in wheel_names if any(part.startswith(named) for part in name.lower().split("/"))]
    assert unwanted == []


# --- importing --------------------------------------------------------------------------------------------------------

HEAVY = ["triton", "transformers", "peft", "trl", "bitsandbytes", "matplotlib", "datasets", "accelerate"]


def test_import_is_light():
    """Peers are for tests, plots and GPU kernels for those who use them. A process of its own: here all are loaded."""
    code = "import json, sys, minift; print(json.dumps(sorted(name.split('.')[0] for name in sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert "torch" in loaded and "minift" in loaded
    assert loaded & set(HEAVY) == set()


# --- every file, every name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FILES)
def test_file_has_a_docstring_and_fits(module: str):
    text = FILES[module].read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring and docstring.strip(), f"{module} has no docstring: it is the lesson"
    assert len(text.splitlines()) <= 400, f"{module} has more than one idea"


PUBLIC = ("minift", "minift.adapters", "minift.numerics", "minift.quant")


def has_docstring(value: object) -> bool:
    """Its own, not one inherited or made up: a dataclass without one is given its signature."""
    docstring = vars(value).get("__doc__") if isinstance(value, type) else getattr(value, "__doc__", None)
    return bool(docstring) and not (isinstance(value, type) and docstring.startswith(f"{value.__name__}("))


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in PUBLIC for name in importlib.import_module(package).__all__],
)
def test_public_name_exists_and_is_explained(package: str, name: str):
    value = getattr(importlib.import_module(package), name)
    assert has_docstring(value), f"{package}.{name} has no docstring"


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_listed_once(package: str):
    names = importlib.import_module(package).__all__
    assert len(names) == len(set(names)) > 0
