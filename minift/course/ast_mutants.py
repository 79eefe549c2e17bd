"""A second net under the hand-picked mistakes: small changes to the solution, made by rule, which checks should notice.

    a + b -> a - b    a < b -> a <= b    3 -> 4    -1 -> -2    round -> floor    a @ b -> b @ a    a statement left out

One that every check accepts is either the same function after all, or a hole in the checks. Which of the two is for the
author to say: survivors.toml in the exercise's folder gives a reason for each, and the self-check fails on any other.
"""

import ast
import copy
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from minift.course.judge import PUBLIC_KEY, draw, grade
from minift.course.runner import Runner
from minift.course.spec import Exercise

AT_LEAST = 0.9  # of the changes that are not explained away must be noticed
_OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
              ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
              ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.Pow: ast.Mult}  # fmt: skip
_COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
                ast.Is: ast.IsNot, ast.NotEq: ast.Eq, ast.IsNot: ast.Is, ast.In: ast.NotIn,
                ast.NotIn: ast.In}  # fmt: skip
_NAMES = {"round": "floor", "floor": "round", "ceil": "floor", "amax": "amin", "amin": "amax", "max": "min",
          "min": "max", "sum": "mean", "mean": "sum", "abs": "neg", "zeros_like": "ones_like",
          "ones_like": "zeros_like", "zeros": "ones", "ones": "zeros", "tril": "triu", "triu": "tril", "sin": "cos",
          "cos": "sin", "repeat_interleave": "repeat", "log": "exp", "exp": "log", "any": "all",
          "all": "any"}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A changed solution; `text` is the expression before and after and its statement, and names the change."""

    text: str
    source: str


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    """The small changes of one node, each a new node."""
    if isinstance(node, ast.BinOp):
        if type(node.op) in _OPERATORS:
            yield ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right)
        if isinstance(node.op, ast.MatMult | ast.Sub | ast.Div):
            yield ast.BinOp(node.right, node.op, node.left)
    elif isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
        yield ast.AugAssign(node.target, _OPERATORS[type(node.op)](), node.value)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        yield ast.Compare(node.left, [_COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
        if node.value not in (0, 1):
            yield ast.Constant(0)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield node.value
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield ast.Attribute(node.value, _NAMES[node.attr], node.ctx)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)


def _inside(node: ast.AST, path: tuple = ()) -> Iterator[tuple[tuple, ast.AST]]:
    """Every node below one with the way to it; annotations and docstrings are no code."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not _is_text(child):
                yield (*path, (name, index)), child
                yield from _inside(child, (*path, (name, index)))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _replaced(tree: ast.AST, path: tuple, new: ast.AST) -> ast.AST:
    """A copy of the tree with another node at the end of a path."""
    tree = copy.deepcopy(tree)
    parent: ast.AST = tree
    for name, index in path[:-1]:
        parent = getattr(parent, name) if index is None else getattr(parent, name)[index]
    name, index = path[-1]
    if index is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[index] = new
    return ast.fix_missing_locations(tree)


def _statement_at(tree: ast.AST, path: tuple) -> str:
    """The smallest statement around the end of a path: its first line, of a definition the name."""
    found = node = tree
    for name, index in path:
        node = getattr(node, name) if index is None else getattr(node, name)[index]
        found = node if isinstance(node, ast.stmt) else found
    return f"def {found.name}" if isinstance(found, ast.FunctionDef) else ast.unparse(found).splitlines()[0]


def changes(source: str) -> list[Change]:
    """All small changes of the functions and constants of a source, each once."""
    tree, found = ast.parse(source), {}
    for path, node in _inside(tree):
        news = list(_changed(node))
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Expr | ast.Continue | ast.Break) and len(path) > 1:
            news.append(ast.Pass())
        for new in news:
            text = f"{ast.unparse(node)} -> {ast.unparse(ast.fix_missing_locations(new))}"
            statement = _statement_at(tree, path)
            if statement != ast.unparse(node):
                text += f" in {statement}"
            change = Change(text, ast.unparse(_replaced(tree, path, new)))
            found.setdefault(change.source, change)
    return [change for change in found.values() if change.source != ast.unparse(tree)]


@dataclass
class Net:
    """What became of the changes: how many there are, which survived without a reason, which with one."""

    total: int = 0
    explained: dict[str, str] = field(default_factory=dict)
    holes: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)  # reasons for changes that are noticed, or that do not exist

    @property
    def noticed(self) -> float:
        """The share of the changes that are not the same function after all which a check rejects."""
        asked = self.total - len(self.explained)
        return 1.0 if asked == 0 else 1 - len(self.holes) / asked


def reasons(exercise: Exercise) -> dict[str, str]:
    """survivors.toml: change -> why it cannot be noticed."""
    if not (exercise.folder / "survivors.toml").exists():
        return {}
    return {row["change"]: row["reason"] for row in tomllib.loads(exercise.text("survivors.toml"))["survivor"]}


def cast_net(exercise: Exercise, runner: Runner) -> Net:
    """Grade every small change of an exercise's solution."""
    known, net, survived = reasons(exercise), Net(), set()
    hasty = replace(exercise, seconds=min(exercise.seconds, 4.0))
    cases = draw(exercise, PUBLIC_KEY, 2)
    for change in changes(exercise.text("solution.py")):
        net.total += 1
        verdict, _ = grade(hasty, change.source, "change", runner, cases)
        if verdict.earned < exercise.points:
            continue
        survived.add(change.text)
        if change.text in known:
            net.explained[change.text] = known[change.text]
        else:
            net.holes.append(change.text)
    net.stale = [text for text in known if text not in survived]
    return net


def format_net(exercise: Exercise, net: Net) -> str:
    """The share and the survivors, as text."""
    lines = [f"  {net.total} automatic changes, {100 * net.noticed:.0f} % noticed, {len(net.explained)} explained"]
    lines += [f"  PROBLEM {exercise.id}: not noticed: {text}" for text in net.holes]
    return "\n".join(lines + [f"  PROBLEM {exercise.id}: survivors.toml is out of date: {text}" for text in net.stale])
