"""What a submission may not import or name: found in its source, before it runs, with the line.

The child refuses the same things while it runs (`worker/guard.py`); the scan gives the better message and also sees
what is imported already. Of a dotted name the last part counts: `F.gelu` and `torch.nn.functional.gelu` are one.
"""

import ast
import warnings

from minift.course.worker.guard import ANSWERS

_MODULES = (
    *ANSWERS, "subprocess", "multiprocessing", "socket", "ctypes", "_ctypes", "_posixsubprocess", "importlib",
    "requests", "urllib", "http", "gc", "faulthandler", "signal", "shutil", "runpy", "code", "pickle",
)  # fmt: skip
_BUILTINS = ("__import__", "eval", "exec", "compile", "breakpoint")
_ATTRIBUTES = ("addaudithook", "_getframe", "__subclasses__", "__globals__", "__builtins__")


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ".", *(f"{node.module or ''}.{alias.name}" for alias in node.names)]
    return []


def parse(source: str) -> ast.Module | None:
    """The tree of a source text; None if it is no Python. ValueError if it is nested too deeply to be looked at."""
    try:
        with warnings.catch_warnings():  # such as "invalid escape sequence": for the child to print, with the file name
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    except (RecursionError, MemoryError):
        raise ValueError("the code is nested too deeply to be looked at before it is run") from None


def violations(source: str, banned: tuple[str, ...] = ()) -> list[str]:
    """One sentence for each place of a source text that is against the rules; none if it is no Python."""
    try:
        tree = parse(source)
    except ValueError as error:
        return [str(error)]
    nodes = [] if tree is None else list(ast.walk(tree))
    last = {path.split(".")[-1]: path for path in banned}
    found: dict[str, None] = {}
    for node in nodes:
        line = getattr(node, "lineno", 0)
        for name in _imported(node):
            if name.split(".")[0] in _MODULES:
                found[f"line {line}: {name.split('.')[0]} may not be imported here"] = None
            elif name in banned:
                found[f"line {line}: this exercise is solved without {name}"] = None
        if isinstance(node, ast.Name) and node.id in _BUILTINS:
            found[f"line {line}: {node.id} may not be used here"] = None
        elif isinstance(node, ast.Attribute) and node.attr in _ATTRIBUTES:
            found[f"line {line}: {node.attr} may not be used here"] = None
        elif isinstance(node, ast.Attribute) and node.attr in last:
            found[f"line {line}: this exercise is solved without {last[node.attr]}"] = None
    return list(found)
