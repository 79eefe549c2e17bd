"""The first version of a new exercise: complete, graded, and about nothing yet (it doubles a tensor).

It passes the self-check as it is, so that its author changes something that works instead of filling in blanks.
"""

from pathlib import Path

_FILES = {
    "exercise.toml": """id = "{id}"
title = "{title}"
topic = "my topic"
points = 1
minutes = 20
names = ["double"]
hints = ["A direction.", "Invariant: something that must hold.", "Nearly the steps."]
""",
    "README.md": """# {id} {title} (1 point, 20 minutes)

Why this is worth knowing, and the formula.

**By hand.** x = [1, -2]: 2 x = [2, -4].

**Write** `double(x) -> y`: float32, the shape of x.
""",
    "starter.py": '''"""{id} {title}: README.md says what to write. Check with: minift-course check {id}"""

from torch import Tensor


def double(x: Tensor) -> Tensor:
    """Returns twice x."""
    # TODO
    raise NotImplementedError
''',
    "solution.py": '''"""{id} {title}."""

from torch import Tensor


def double(x: Tensor) -> Tensor:
    """Returns twice x."""
    return 2 * x
''',
    "checks.py": '''"""{id}: the oracle is float64."""

import torch

from minift.course.spec import Case, check


@check(points=1)
def twice(draw):
    """Every element is doubled, whatever its sign."""
    x = torch.randn(3, 7, generator=draw)
    # Doubling is exact in binary floating point.
    yield Case("double", {{"x": x}}, (x.double() * 2).float(), about="3 rows of 7")
''',
    "equivalents/add.py": '"""Adds x to itself."""\n\n\ndef double(x):\n    return x + x\n',
    "equivalents/halve.py": '"""Divides by a half."""\n\n\ndef double(x):\n    return x / 0.5\n',
    "mutants.toml": """[[mutant]]
name = "square"
edits = [["2 * x", "x * x"]]
misconception = "x is squared instead of doubled"
advice = "Twice x is x + x."
killed_by = "twice"

[[mutant]]
name = "magnitude"
edits = [["2 * x", "2 * x.abs()"]]
misconception = "the sign is lost"
advice = "Do not take the absolute value."
killed_by = "twice"

[[mutant]]
name = "unchanged"
edits = [["2 * x", "x + 0"]]
misconception = "x comes back as it was"
advice = "Multiply by two."
killed_by = "twice"
""",
}


def scaffold(folder: Path) -> list[Path]:
    """Write a new exercise into a folder called like e27_my_topic. ValueError if the name is no good or it exists."""
    name, _, topic = folder.name.partition("_")
    if not topic or not name.isalnum() or not name[-1].isdigit() or name != name.lower():
        raise ValueError(f"call it like e27_my_topic, not {folder.name!r}")
    if folder.exists():
        raise ValueError(f"{folder} exists")
    paths = []
    for file, text in _FILES.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(id=name, title=topic.replace("_", " ").capitalize()), encoding="utf-8")
        paths.append(path)
    return paths
