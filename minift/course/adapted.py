"""Code that a student keeps in a package of his own: adapters.py in the course folder says what is where.

    ADAPT = {
        "e06": "mylib.quant:double_quant",             the one function of e06, whatever it is called
        "e01": {"quantize": "mylib.int8:to_int8", "dequantize": "mylib.int8:from_int8"},
        "e07": "mylib.maps",                           a module in which the names are those of the page
    }

The table is read, not run. One file goes to the judge: the text of that module with a line `quantize = to_int8` below
it. So all names of an exercise come from one module, and it imports no other module of the student's.
"""

import ast
from pathlib import Path
from typing import Any

from minift.course.policy import parse
from minift.course.spec import Exercise

FILE = "adapters.py"


def _table(path: Path) -> dict[str, Any]:
    """ADAPT of adapters.py; empty without that file. ValueError if it is no plain table."""
    if not path.exists():
        return {}
    tree = parse(path.read_text(encoding="utf-8-sig"))
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and any(
            isinstance(one, ast.Name) and one.id == "ADAPT" for one in node.targets
        ):
            try:
                table = ast.literal_eval(node.value)
            except ValueError:
                table = None
            if isinstance(table, dict):
                return table
    raise ValueError(f'{path} needs a line like ADAPT = {{"e01": "mylib.int8"}}, with texts only, since it is not run')


def _targets(exercise: Exercise, entry: Any) -> dict[str, tuple[str, str]]:
    """Name on the page -> (module, name there)."""
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        if name and len(exercise.names) > 1:
            raise ValueError(f"{exercise.id} has {', '.join(exercise.names)}: ADAPT needs a place for each of them")
        entry = {wanted: f"{module}:{name or wanted}" for wanted in exercise.names}
    if not isinstance(entry, dict) or entry.keys() != set(exercise.names):
        raise ValueError(f"ADAPT of {exercise.id} must name {', '.join(exercise.names)}, and nothing else")
    found = {}
    for wanted, place in entry.items():
        module, _, name = str(place).partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), name)):
            raise ValueError(f"ADAPT of {exercise.id}: {place!r} is not like mylib.int8:to_int8")
        found[wanted] = module, name
    if len({module for module, _ in found.values()}) > 1:
        raise ValueError(f"ADAPT of {exercise.id} names several modules; its functions must be in one")
    return found


def adapted(folder: Path, exercise: Exercise) -> tuple[Path, bytes] | None:
    """The module that stands for an exercise, and the text to grade; None if adapters.py does not name it.

    ValueError says what is wrong with the entry.
    """
    table = _table(folder / FILE)
    if exercise.id not in table:
        return None
    targets = _targets(exercise, table[exercise.id])
    module = next(iter(targets.values()))[0]
    base = folder.joinpath(*module.split("."))
    path = next((one for one in (base.with_suffix(".py"), base / "__init__.py") if one.is_file()), None)
    if path is None:
        raise ValueError(f"ADAPT of {exercise.id} names {module}, but there is no {base.with_suffix('.py')}")
    aliases = "".join(f"{wanted} = {name}\n" for wanted, (_, name) in targets.items() if wanted != name)
    return path, path.read_bytes() + f"\n{aliases}".encode() if aliases else path.read_bytes()
