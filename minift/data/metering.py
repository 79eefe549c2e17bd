"""What a template may spend, and what its steps cost.

A rendering may spend WORK_LIMIT characters, items and steps, write OUTPUT_LIMIT characters, and take TIME_LIMIT seconds
of its own thread's processor time, so that a busy machine stops nobody's honest template. The clock alone would not do:
one step inside C (`'a' * 10 ** 10`, `'%999999999d' % 1`) is over only when the memory is.

Whatever a template makes is paid for by its size, written out as a tree:

    "abc" -> 3     [x, x] -> 1 + 2 * (ITEM + size(x))     so ten lists of ten times the one before cost 10 ** 10

Then everything that is done with it in C (compare, print, sort, copy) takes about as long as was paid for. Steps that
make far more than they are given pay before: the tables METHOD_COSTS and FILTER_COSTS, and `operator_cost`.
"""

import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from typing import Any

import jinja2

SOURCE_LIMIT = 1_000_000  # characters of a template; published ones have up to 20,000
WORK_LIMIT = 200_000_000  # a conversation is handled some ten times over: trimmed, glued, written
OUTPUT_LIMIT = 10_000_000  # characters: some three million tokens
TIME_LIMIT = 5.0  # seconds; a rendering takes some microseconds a message
ITEM = 50  # what an item of a list or dict costs beside its own size: about as many characters are copied meanwhile
DEPTH_LIMIT = 100  # of lists in lists
INTEGER_BITS = 10_000  # beyond, one division takes as long as a loop


class TemplateStopped(jinja2.TemplateRuntimeError):
    """The template asked for more than one rendering may have."""


class Meter:
    """What one rendering has spent, has written and has marked."""

    def __init__(self) -> None:
        self.work = 0
        self.charges = 0
        self.deadline = time.thread_time() + TIME_LIMIT
        self.written = 0
        self.marks: list[tuple[int, int]] = []

    def charge(self, amount: int) -> None:
        self.work += abs(amount) + 1  # no argument that a template chooses can pay anything back
        self.charges += 1
        if self.work > WORK_LIMIT:
            raise TemplateStopped(f"it handles more than {WORK_LIMIT:,} characters and items")
        if not self.charges % 32 and time.thread_time() > self.deadline:  # the clock costs as much as a step
            raise TemplateStopped(f"it runs for more than {TIME_LIMIT:g} seconds")

    def write(self, text: str) -> None:
        self.written += len(text)
        if self.written > OUTPUT_LIMIT:
            raise TemplateStopped(f"it writes more than {OUTPUT_LIMIT:,} characters")

    def made(self, value: Any) -> Any:
        """Pay for a value, and pass it on."""
        self.charge(len(value) if type(value) is str else size(value))
        return value


def size(value: Any, depth: int = 0) -> int:
    """Characters and items of a value, written out as a tree."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        if value.bit_length() > INTEGER_BITS:
            raise TemplateStopped("it computes with a number of thousands of digits")
        return 1
    if isinstance(value, Mapping):
        items: Iterable[Any] = (part for pair in value.items() for part in pair)
    elif isinstance(value, (list, tuple, set, KeysView, ValuesView, ItemsView)):
        items = value
    else:  # opaque: it is written in few characters, whatever it refers to
        return 1
    if depth == DEPTH_LIMIT:
        raise TemplateStopped(f"it nests values more than {DEPTH_LIMIT} deep")
    total = 1
    for item in items:
        total += ITEM + size(item, depth + 1)
        if total > WORK_LIMIT:  # the same list ten times in a list, ten levels deep, never ends otherwise
            break
    return total


# --- what is paid before


def _width(_text: Any, *args: Any, **kwargs: Any) -> int:
    return sum(abs(number) for number in (*args, *kwargs.values()) if isinstance(number, int))


def _replaced(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> int:
    return (str(text).count(str(old)) if old else len(str(text)) + 1) * len(str(new))


def _joined(text: Any, items: Any, *_: Any, **__: Any) -> int:
    return sum(len(text) + size(item) for item in items) if isinstance(items, (list, tuple)) else 0


def _stripped(text: Any, *args: Any, **kwargs: Any) -> int:
    """Each character at the ends is looked up among those to strip."""
    return len(str(text)) * sum(len(given) for given in (*args, *kwargs.values()) if isinstance(given, str))


def _formatted(text: Any, *args: Any, **kwargs: Any) -> int:
    """`'%5d' % x`: every width that the text names, and each argument at every place."""
    return _fields(str(text), "%", r"%[^a-zA-Z%]*\*", [args, kwargs])


def _filled(text: Any, *args: Any, **kwargs: Any) -> int:
    """`'{:5}'.format(x)`, where doubled braces stand for themselves."""
    return _fields(text.replace("{{", "").replace("}}", ""), "{", r"\{[^}]*\{", [args, kwargs])


def _fields(text: str, sign: str, width_from_argument: str, arguments: Any) -> int:
    if re.search(width_from_argument, text):
        raise TemplateStopped("it takes the width of a format from an argument")
    widths = sum(int(digits[:18]) for digits in re.findall(r"\d+", text))
    return widths + text.count(sign) * size(arguments)


def _indented(value: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    per_line = width if isinstance(width, int) else len(str(width))
    return (str(value).count("\n") + 1) * per_line


def _dumped(value: Any, ensure_ascii: Any = False, indent: Any = None, *_: Any, **__: Any) -> int:
    return size(value) * (len(indent) if isinstance(indent, str) else int(indent or 0))


def _rounded(_value: Any, precision: int = 0, *_: Any, **__: Any) -> int:
    return 10_000 * precision  # 10 ** precision is a number with so many digits


def _summed(_values: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, (int, float)):
        raise TemplateStopped("it sums what are not numbers, which copies the sum for every item")
    return 0


METHOD_COSTS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _width),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _stripped),
    "replace": _replaced,
    "join": _joined,
    **dict.fromkeys(("format", "format_map"), _filled),
}
FILTER_COSTS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("batch", "center", "slice"), _width),
    "format": _formatted,
    "indent": _indented,
    "replace": _replaced,
    "round": _rounded,
    "sum": _summed,
    "tojson": _dumped,
    "trim": _stripped,
}


def operator_cost(operator: str, left: Any, right: Any) -> int:
    size((left, right))  # refuses numbers of thousands of digits
    if operator == "%" and isinstance(left, str):
        return _formatted(left, right)
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > INTEGER_BITS:
            raise TemplateStopped("it computes with a number of thousands of digits")
    elif operator == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(one, (str, list, tuple)):
                return size(one) * max(times, 0)
    return 0
