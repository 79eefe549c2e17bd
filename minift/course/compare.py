"""Is an answer the expected one, and if not, where and how does it differ?

A difference is measured in tolerances: 1 is the most that is accepted. The audit of the tolerances (`selfcheck`)
looks at that number: the worst right answer must stay well below 1, the best wrong one well above.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from minift.course.detect import likely_cause
from minift.course.spec import Case

_NOUNS = {bool: "True or False", int: "a number", float: "a number", str: "a text", torch.dtype: "a dtype"}
_AROUND = 12  # characters of a text that are shown on both sides of its first difference


@dataclass(frozen=True)
class Difference:
    """How far an answer is off, in tolerances, and one or two sentences if that is too far."""

    size: float
    message: str | None = None


def _kind(value: Any) -> str:
    """What was answered."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return "None (is a return missing?)" if value is None else f"{type(value).__name__} {value!r}"[:80]


def _wanted(value: Any) -> str:
    """What kind of thing is expected, not its value: whoever returns nothing must not be given the whole answer."""
    if isinstance(value, torch.Tensor):
        return _kind(value)
    if isinstance(value, list | tuple):
        return f"{len(value)} parts, a {type(value).__name__}"
    if isinstance(value, dict):
        return f"a dict with {len(value)} keys"
    return "None" if value is None else _NOUNS.get(type(value), f"a {type(value).__name__}")


def _show(value: Any, other: Any = None) -> str:
    """Six digits, or as many as it takes to see that it differs from the other."""
    if not isinstance(value, float):
        return str(value)[:80]
    short = f"{value:.6g}"
    return short if other is None or short != f"{other:.6g}" else f"{value:.17g}"


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64 if tensor.is_floating_point() else torch.int64)


def distances(expected: torch.Tensor, actual: torch.Tensor, atol: float, rtol: float) -> torch.Tensor:
    """Per element |actual - expected| in tolerances; 0 where equal (also nan and nan), inf where that was needed."""
    want, have = _wide(expected), _wide(actual)
    same = (want == have) | (want.isnan() & have.isnan()) if want.is_floating_point() else want == have
    allowed = atol + rtol * want.double().abs()
    far = (have - want).double().abs() / allowed
    far = torch.where(torch.isnan(far), torch.full_like(far, math.inf), far)
    return torch.where(same, torch.zeros_like(far), far)


def _tensor(name: str, expected: torch.Tensor, actual: Any, case: Case) -> Difference:
    if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape or actual.dtype != expected.dtype:
        more = ""
        if isinstance(actual, torch.Tensor) and actual.dim() == 2 and actual.mT.shape == expected.shape:
            more = " (transposed?)"
        return Difference(math.inf, f"{name} is {_kind(actual)}, expected {_wanted(expected)}{more}")
    far = distances(expected, actual, case.atol, case.rtol)
    worst = float(far.max()) if far.numel() else 0.0
    if worst <= 1:
        return Difference(worst)
    wrong = far > 1
    place = [int(i) for i in wrong.nonzero()[0]]
    index = f"[{', '.join(map(str, place))}]" if place else ""
    have, want = actual[tuple(place)].item(), expected[tuple(place)].item()
    cause = likely_cause(expected, actual, wrong)
    return Difference(
        worst,
        f"first mismatch at {name}{index}: yours {_show(have, want)}, expected {_show(want, have)}; "
        f"{int(wrong.sum())} of {wrong.numel()} wrong{f'; {cause}' if cause else ''}",
    )


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an int may be larger than any float64
        return math.inf if value > 0 else -math.inf


def _distance(want: float, have: float, atol: float, rtol: float) -> float:
    """`distances` of one number: answers hold thousands of them, and making tensors of each took most of a verdict."""
    if want == have or (math.isnan(want) and math.isnan(have)):
        return 0.0
    allowed = atol + rtol * abs(want)
    far = abs(have - want) / allowed if allowed else math.inf
    return math.inf if math.isnan(far) else far


def _number(name: str, expected: float, actual: Any, case: Case) -> Difference:
    if isinstance(actual, torch.Tensor) and actual.numel() == 1:
        actual = actual.item()
    if isinstance(actual, bool) or not isinstance(actual, int | float):
        return Difference(math.inf, f"{name} is {_kind(actual)}, expected a number")
    size = _distance(_float(expected), _float(actual), case.atol, case.rtol)
    return Difference(size, f"{name} is {_show(actual)}, expected {_show(expected)}" if size > 1 else None)


def parts(name: str, expected: Any, actual: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """The leaves of two nested answers side by side; where the nesting differs, the smallest parts that differ."""
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple) and len(expected) == len(actual):
        for i, (want, have) in enumerate(zip(expected, actual, strict=True)):
            yield from parts(names[i] if i < len(names) else f"{name}[{i}]", want, have)
    elif isinstance(expected, dict) and isinstance(actual, dict) and expected.keys() == actual.keys():
        for key, want in expected.items():
            yield from parts(f"{name}[{key!r}]", want, actual[key])
    else:
        yield name, expected, actual


def _leaf(name: str, expected: Any, actual: Any, case: Case) -> Difference:
    if isinstance(expected, torch.Tensor):
        return _tensor(name, expected, actual, case)
    if isinstance(expected, int | float) and not isinstance(expected, bool):
        return _number(name, expected, actual, case)
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        return Difference(math.inf, f"{name} has {len(actual)} parts, expected {len(expected)}")
    if isinstance(expected, dict) and isinstance(actual, dict):
        lacking = [f"lacks the key {key!r}" for key in expected if key not in actual][:1]
        return Difference(
            math.inf, f"{name} {(lacking or ['has keys that are not expected'])[0]}: {list(actual)}"[:200]
        )
    if type(expected) is not type(actual):
        return Difference(math.inf, f"{name} is {_kind(actual)}, expected {_wanted(expected)}")
    if expected == actual:
        return Difference(0.0)
    if isinstance(expected, str):
        return Difference(math.inf, _text(name, expected, actual))
    return Difference(math.inf, f"{name} is {actual!r}, expected {expected!r}"[:200])


def _text(name: str, expected: str, actual: str) -> str:
    """Where two texts begin to differ."""
    place = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), None)
    if place is None:
        place = min(len(expected), len(actual))
        longer = "short" if len(actual) < len(expected) else "long"
        return f"{name} is right up to character {place}, and then too {longer} ({abs(len(actual) - len(expected))})"
    near = slice(max(0, place - _AROUND), place + _AROUND)
    return f"{name} differs from character {place} on: yours {actual[near]!r}, expected {expected[near]!r}"


def table(case: Case, actual: Any) -> list[str]:
    """Named tensors one a line: exact, approximate, largest difference. For gradients by hand (after A. Karpathy)."""
    pairs = list(parts("the answer", case.expect, actual, case.names))
    if len(case.names) != len(pairs) or not all(isinstance(want, torch.Tensor) for _, want, _ in pairs):
        return []
    lines = [f"{'':12s} exact  approximate  largest difference"]
    for name, want, have in pairs:
        if not isinstance(have, torch.Tensor) or have.shape != want.shape:
            lines.append(f"{name:12s} {_kind(have)}")
            continue
        far = distances(want, have, case.atol, case.rtol)
        gap = float((_wide(want) - _wide(have)).abs().max()) if want.numel() else 0.0
        lines.append(f"{name:12s} {bool((far == 0).all())!s:5s}  {bool((far <= 1).all())!s:11s}  {gap:.3g}")
    return lines


def compare(case: Case, actual: Any) -> Difference:
    """The largest difference of an answer, with the message of the first part that is wrong."""
    if case.accept is not None:
        try:
            wrong = case.accept(actual)
        except Exception as error:
            wrong = f"the answer is {_kind(actual)}, which cannot be examined ({type(error).__name__}: {error})"
        return Difference(math.inf if wrong else 0.0, wrong)
    each = [_leaf(name, want, have, case) for name, want, have in parts("the answer", case.expect, actual, case.names)]
    size = max((one.size for one in each), default=0.0)
    return Difference(size, next((one.message for one in each if one.size > 1), None))
