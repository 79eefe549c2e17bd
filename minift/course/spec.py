"""What an exercise is made of: checks, the cases they draw, the mistakes it knows.

A check is a generator function in an exercise's `checks.py`. It is given a seeded `torch.Generator`, draws inputs with
it and yields cases: which function is called with what, and what must come back.

    @check(points=1)
    def rounds_to_nearest(draw):
        \"\"\"Every value comes back within half a step.\"\"\"        # the sentence a student sees
        x = torch.randn(3, 7, generator=draw)
        yield Case("quantize", {"x": x}, expect=oracle(x))

Expected values are computed there and then, by something independent of the solution: a float64 formula, autograd, a
torch builtin, recorded bytes.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minift.course.policy import parse


@dataclass(frozen=True)
class Case:
    """One call and what it must return.

    `call` names a function of the submission, or one of the exercise's drive.py, which is then given the submission's
    module first. `given` are the arguments, by name: tensors, torch.Generators, numbers, texts, lists, tuples, dicts.
    Numbers must lie within atol + rtol * |expected|, everything else must be equal; shapes and dtypes always.
    """

    call: str
    given: dict[str, Any]
    expect: Any = None
    atol: float = 0.0
    rtol: float = 0.0
    accept: Callable[[Any], str | None] | None = None  # instead of expect: None if right, else what is wrong
    raises: str | None = None  # instead of expect: the exception that must come
    names: tuple[str, ...] = ()  # of the returned parts, for messages; two or more make a comparison table
    changes: dict[str, torch.Tensor] = field(default_factory=dict)  # arguments written to -> their storage afterwards
    about: str = ""  # what is special about this input


@dataclass(frozen=True)
class Check:
    """Cases that are right or wrong together, for some points."""

    name: str
    sentence: str
    points: int
    draw: Callable[[torch.Generator], Iterator[Case]]

    def cases(self, seed: int) -> list[Case]:
        """The cases of one seed; the same seed gives the same cases everywhere."""
        return list(self.draw(torch.Generator().manual_seed(seed)))


def check(points: int) -> Callable[[Callable[[torch.Generator], Iterator[Case]]], Check]:
    """Turn a generator function into a check; the first paragraph of its docstring is what students see."""

    def decorate(function: Callable[[torch.Generator], Iterator[Case]]) -> Check:
        sentence = " ".join(inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].split())
        if not sentence:
            raise ValueError(f"the check {function.__name__} needs a docstring: the sentence that students see")
        return Check(function.__name__, sentence, points, function)

    return decorate


@dataclass(frozen=True)
class Mutant:
    """A mistake that people make: the solution with some text replaced."""

    name: str
    edits: tuple[tuple[str, str], ...]
    misconception: str  # completes "this is exactly what you get when ..."
    advice: str
    killed_by: str  # the name of a check

    def source(self, solution: str) -> str:
        """The wrong solution. ValueError if the text to replace is not in the solution exactly once."""
        for old, new in self.edits:
            if solution.count(old) != 1:
                raise ValueError(
                    f"mutant {self.name}: {old!r} is {solution.count(old)} times in the solution, not once"
                )
            solution = solution.replace(old, new)
        return solution


@dataclass(frozen=True)
class Exercise:
    """A folder `eNN_name` with exercise.toml and the files beside it."""

    folder: Path
    id: str
    title: str
    topic: str
    points: int
    minutes: int
    names: tuple[str, ...]  # the functions and classes that a student writes
    hints: tuple[str, ...]
    needs: tuple[str, ...] = ()  # exercises that are good to have done before
    banned: tuple[str, ...] = ()  # dotted names such as torch.nn.functional.gelu
    requires: tuple[str, ...] = ()  # modules without which it cannot be graded, such as triton
    seconds: float = 10.0  # wall time of one run of all checks
    memory_mb: int = 1024  # beyond what torch takes

    def text(self, name: str) -> str:
        """The text of a file of the exercise: README.md, starter.py, solution.py."""
        return (self.folder / name).read_text(encoding="utf-8")

    def starter(self, page: str) -> str:
        """The file that a student begins with; `page` is where README.md lies for him."""
        return self.text("starter.py").replace("README.md", page, 1)

    @property
    def page_name(self) -> str:
        """Where the page lies in a course folder."""
        return f"pages/{self.folder.name}.md"

    @property
    def file_name(self) -> str:
        """The student's file: e01_absmax.py."""
        return f"{self.folder.name}.py"

    @property
    def drive(self) -> str | None:
        """The source of drive.py, which runs beside the submission, if the exercise has one."""
        return self.text("drive.py") if (self.folder / "drive.py").exists() else None

    @property
    def equivalents(self) -> dict[str, str]:
        """Right answers written differently: name -> source."""
        return {path.stem: path.read_text(encoding="utf-8") for path in sorted(self.folder.glob("equivalents/*.py"))}

    @cached_property
    def checks(self) -> tuple[Check, ...]:
        """The checks of checks.py, in its order."""
        from minift.course.registry import load_checks

        return load_checks(self)

    @cached_property
    def mutants(self) -> tuple[Mutant, ...]:
        """The mistakes of mutants.toml."""
        from minift.course.registry import load_mutants

        return load_mutants(self)

    def defined_in(self, source: str) -> bool:
        """Whether a source text defines any of the exercise's names: has it been started at all?"""
        tree = parse(source)
        if tree is None:
            return True  # loading it will say what is wrong with it
        nodes = list(ast.walk(tree))
        defined = {getattr(node, "name", None) for node in nodes}
        defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        return not defined.isdisjoint(self.names)
