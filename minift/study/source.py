"""The source of a function, as a notebook shows it: what is explained is what runs."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Python source. A notebook shows it highlighted, with its place in the library; `print` gives it as it is."""

    code: str
    place: str

    def __str__(self) -> str:
        return self.code

    def __repr__(self) -> str:
        return f"# {self.place}\n{self.code}"

    def _repr_markdown_(self) -> str:
        return f"`{self.place}`\n\n```python\n{self.code}```"


def show(thing: Callable | type, docstring: bool = False) -> Source:
    """The source of a function, method or class of this library.

    Args:
        docstring: keep its docstring; off by default, since the notebook around it is one.

    Raises:
        TypeError: what has no source in Python, such as a builtin.
    """
    thing = inspect.unwrap(thing)
    code = inspect.cleandoc("\n" + inspect.getsource(thing)) + "\n"
    if not docstring and thing.__doc__:
        code = _without_docstring(code)
    return Source(code, f"{thing.__module__.replace('.', '/')}.py, {thing.__qualname__}")


def _without_docstring(code: str) -> str:
    import ast

    (node,) = ast.parse(code).body
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    first = node.body[0]
    lines = code.splitlines(keepends=True)
    assert first.end_lineno is not None
    return "".join(lines[: first.lineno - 1] + lines[first.end_lineno :]).replace(":\n\n", ":\n", 1)
