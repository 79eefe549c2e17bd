"""A Jinja environment in which a program from the internet can neither reach out nor run on.

Jinja's sandbox closes the ways *out*: Python's attributes, files, changing what it was given. It leaves the ways to
*never come back*: `range(100000)` inside `range(100000)`, a text that doubles itself, lists of lists of the same list.
Signals and killed threads cannot stop those everywhere (Windows, threads, one long step inside C), so the work is
metered where it is done (metering.py has the prices):

    {% for x in y %} A {{ x ~ z }} {% endfor %}    what a template says
    every round, every " A "                       the syntax tree gets a step in front of each body and text
    x ~ z                                          ... and `~`, [...], {...} and slices pass through a filter
    filters, tests, calls, operators, {{ }}        pass through the environment's hooks, and their result is measured

Left out, as no chat template needs them: filters that search text for HTML, `lipsum`, methods of numbers, and four
methods of strings.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from minift.data import metering
from minift.data.metering import FILTER_COSTS, METHOD_COSTS, Meter, TemplateStopped, operator_cost, size

STRING_METHODS = frozenset(dir(str)) - {"encode", "expandtabs", "maketrans", "translate"}
REMOVED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# Filters that only the changed syntax tree names: a name with a space cannot be written in a template.
STEP, JOINED, MADE, SLICED = "a step", "a joined text", "a made value", "a slice"


class MeteredContext(Context):
    """The variables of one rendering, and its meter."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.meter = Meter()

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        context = super().derived(locals)
        context.meter = self.meter  # type: ignore[attr-defined]
        return context


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with a meter. Compile templates with `from_string`; `filters` are set before."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, filters: dict[str, Callable[..., Any]] | None = None, **options: Any):
        super().__init__(finalize=_finalize, **options)
        self.context_class = MeteredContext
        self.globals.pop("lipsum")
        self.globals["dict"] = TemplateDict()
        self.globals["namespace"] = TemplateNamespace
        allowed = {name: one for name, one in self.filters.items() if name not in REMOVED_FILTERS} | (filters or {})
        self.filters = {name: _metered(one, FILTER_COSTS.get(name)) for name, one in allowed.items()}
        self.filters |= {"join": _join, STEP: _step, JOINED: _concatenate, MADE: _made, SLICED: _sliced}
        self.tests = {name: _metered(one) for name, one in self.tests.items()}

    def from_string(self, source: str | nodes.Template, *args: Any, **kwargs: Any) -> jinja2.Template:
        if isinstance(source, str):
            if len(source) > metering.SOURCE_LIMIT:
                raise TemplateStopped(f"it has more than {metering.SOURCE_LIMIT:,} characters itself")
            source = self.parse(source)
        return super().from_string(Instrument().visit(source).set_environment(self), *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in STRING_METHODS:
            return False
        return not isinstance(obj, (int, float, bytes)) and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = context.meter
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            name: str = getattr(method, "__name__", "")
            if name == "join" and args:
                args = (list(args[0]), *args[1:])  # a generator can be walked once only
            if cost := METHOD_COSTS.get(name):
                meter.charge(cost(owner, *args, **kwargs))
        meter.charge(0)
        return meter.made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = context.meter
        if not (type(left) is str and operator == "+"):  # the most frequent by far, and its result is paid for below
            meter.charge(operator_cost(operator, left, right))
        return meter.made(super().call_binop(context, operator, left, right))


class TemplateDict:
    """`dict(...)` and `dict.fromkeys(...)`, without the class behind them."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class TemplateNamespace(Namespace):
    """`namespace(...)`: no names with an underscore, and written as one word, as it may refer to itself."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names with an underscore are Python's")


class Instrument(NodeTransformer):
    """Puts the steps and the measuring filters into the syntax tree."""

    def _with_step(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, _stepping(0))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _with_step  # noqa: N815 (jinja2's names)

    def visit_Output(self, node: nodes.Output) -> Any:  # noqa: N802
        text = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        self.generic_visit(node)
        return [_stepping(text), node] if text else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), JOINED)

    def visit_List(self, node: Any) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        constant = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        return node if constant or getattr(node, "ctx", "load") != "load" else _filter(node, MADE)

    visit_Tuple = visit_Dict = visit_List  # noqa: N815

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, SLICED) if isinstance(node.arg, nodes.Slice) else node


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _stepping(amount: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter(nodes.Const(amount), STEP))


def _metered(function: Callable[..., Any], cost: Callable[..., int] | None = None) -> Callable[..., Any]:
    """A filter or a test that pays: one step, what `cost` says before, and its result."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @wraps(function)
    def metered(context: Any, *args: Any, **kwargs: Any) -> Any:
        meter = context.meter
        meter.charge(cost(*args, **kwargs) if cost else 0)
        if wanted == "context":
            args = (context, *args)
        elif wanted == "eval_context":
            args = (context.eval_ctx, *args)
        elif wanted == "environment":
            args = (context.environment, *args)
        return meter.made(function(*args, **kwargs))

    return pass_context(metered)


@pass_context
def _finalize(context: Any, value: Any) -> Any:
    """What {{ }} writes."""
    return context.meter.made(value if type(value) is str else str(context.meter.made(value)))


@pass_context
def _step(context: Any, amount: Any) -> None:
    context.meter.charge(amount)


@pass_context
def _made(context: Any, value: Any) -> Any:
    return context.meter.made(value)


@pass_context
def _sliced(context: Any, value: Any) -> Any:
    context.meter.charge(len(value) if hasattr(value, "__len__") else 0)  # its items were paid for before
    return value


@pass_context
def _concatenate(context: Any, values: list[Any]) -> str:
    context.meter.charge(size(values))
    return "".join(map(str, values))


@pass_context
def _join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = list(value)
    if attribute is not None:
        items = list(context.environment.call_filter("map", items, kwargs={"attribute": attribute}, context=context))
    context.meter.charge(size(items) + len(items) * size(d))
    return str(d).join(map(str, items))
