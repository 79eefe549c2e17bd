"""Where exercises are found: the folders in this package, and packs of other packages by entry point.

A package with exercises of its own names a module whose folder holds them:

    [project.entry-points."minift.course"]
    my-pack = "my_package.exercises"
"""

import importlib.util
import tomllib
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from minift.course.spec import Check, Exercise, Mutant

HERE = Path(__file__).parent / "exercises"


@cache  # reading the metadata of all that is installed takes longer than judging an answer
def packs() -> tuple[Path, ...]:
    """The folders that exercises are read from, our own first."""
    found = [HERE]
    for point in entry_points(group="minift.course"):
        spec = importlib.util.find_spec(point.value)
        if spec is None:
            raise ValueError(f"the exercise pack {point.name} names {point.value}, which cannot be imported")
        found.extend(Path(place) for place in spec.submodule_search_locations or [])
    return tuple(found)


def read_exercise(folder: Path) -> Exercise:
    """One exercise from its folder. ValueError names what the manifest lacks."""
    fields = tomllib.loads((folder / "exercise.toml").read_text(encoding="utf-8"))
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        return Exercise(folder=folder, **fields)
    except TypeError as error:
        raise ValueError(f"{folder / 'exercise.toml'}: {error}") from None


def all_exercises() -> dict[str, Exercise]:
    """Exercise by id, in the order of the course: packs in their order, folders by name within one."""
    found: dict[str, Exercise] = {}
    for pack in packs():
        for manifest in sorted(pack.glob("*/exercise.toml")):
            exercise = read_exercise(manifest.parent)
            if exercise.id in found:
                raise ValueError(
                    f"two exercises are called {exercise.id}: {found[exercise.id].folder}, {exercise.folder}"
                )
            found[exercise.id] = exercise
    return found


def find(wanted: str, among: dict[str, Exercise] | None = None) -> Exercise:
    """An exercise by id (e01), by folder name (e01_absmax) or by what its file is called (e01_absmax.py)."""
    exercises = all_exercises() if among is None else among
    for exercise in exercises.values():
        if wanted.lower() in (exercise.id, exercise.folder.name, exercise.file_name):
            return exercise
    raise ValueError(f"there is no exercise {wanted!r}; there are {', '.join(exercises)}")


def load_checks(exercise: Exercise) -> tuple[Check, ...]:
    """Run checks.py as a module of its own and take its checks, in the order they are written in."""
    path = exercise.folder / "checks.py"
    spec = importlib.util.spec_from_file_location(f"minift_course_checks_{exercise.id}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    checks = tuple(value for value in vars(module).values() if isinstance(value, Check))
    if sum(one.points for one in checks) != exercise.points:
        raise ValueError(f"{path}: the checks give {sum(one.points for one in checks)} points, not {exercise.points}")
    return checks


def load_mutants(exercise: Exercise) -> tuple[Mutant, ...]:
    """The table of mutants.toml. ValueError if one names a check that does not exist."""
    rows = tomllib.loads(exercise.text("mutants.toml"))["mutant"]
    known = {one.name for one in exercise.checks}
    mutants = []
    for row in rows:
        edits = tuple((old, new) for old, new in row["edits"])
        if row["killed_by"] not in known:
            raise ValueError(f"{exercise.id}: mutant {row['name']}: killed_by = {row['killed_by']!r} is no check")
        mutants.append(Mutant(row["name"], edits, row["misconception"], row["advice"], row["killed_by"]))
    return tuple(mutants)
