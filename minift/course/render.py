"""What a person reads after a check: one screen, plain ASCII, the most useful line first."""

from collections.abc import Iterable

from minift.course.judge import ADVICE, Verdict
from minift.course.spec import Exercise
from minift.course.workspace import Workspace

_WORDS = {
    "pass": "PASS", "fail": "FAIL", "not_started": "TODO", "timeout": "TIME", "memory": "MEM ", "crash": "DIED",
    "policy": "RULE", "import_error": "LOAD", "not_graded": "----",
}  # fmt: skip
_PRINTED_LINES = 20


def ascii_only(text: str) -> str:
    """For consoles of every kind: what is not ASCII becomes an escape."""
    return text.encode("ascii", "backslashreplace").decode()


def _points(number: int) -> str:
    return f"{number} point{'' if number == 1 else 's'}"


def heading(verdict: Verdict) -> list[str]:
    """What was graded, and for how much: always with path and hash."""
    return [
        f"{verdict.exercise} {verdict.title}: {verdict.earned} of {_points(verdict.points)}",
        f"  graded: {verdict.path}",
        f"          sha256 {verdict.sha256[:16]}, {verdict.seconds:.2f} s",
    ]


def explanation(verdict: Verdict) -> list[str]:
    """The recognised mistake, if there is one."""
    if not verdict.explanation:
        return []
    return [f"        this is exactly what you get when {verdict.explanation}", f"        -> {verdict.advice}"]


def show_checks(verdict: Verdict) -> list[str]:
    """One line a check, and more for the first that is wrong."""
    lines, detailed, explained = [], False, False
    for one in verdict.checks:
        earned = str(one.points) if one.status == "pass" else f"0/{one.points}"
        lines.append(f"  {_WORDS[one.status]}  {one.sentence}  [{one.name}, {earned}]")
        if one.status in ("pass", "not_started") or one.message == verdict.message:
            continue
        lines.append(f"        {one.message}")
        if not detailed:
            lines += [f"        {line}" for line in one.details]
            detailed = True
        if not explained and one.name in verdict.explained:
            lines += explanation(verdict)
            explained = True
    return lines


def show(verdict: Verdict, isolation: bool = False) -> str:
    """The whole screen of one exercise."""
    lines = heading(verdict)
    if verdict.message:
        lines += [f"  {_WORDS[verdict.status]}  {verdict.message}"]
        if verdict.status in ADVICE and ADVICE[verdict.status] != verdict.message:
            lines.append(f"        {ADVICE[verdict.status]}")
    lines += show_checks(verdict)
    if verdict.printed.strip() and verdict.status != "pass":
        printed = verdict.printed.strip().splitlines()
        lines.append("  printed by your code:")
        lines += [f"    | {line[:160]}" for line in printed[:_PRINTED_LINES]]
        if len(printed) > _PRINTED_LINES:
            lines.append(f"    | ... {len(printed) - _PRINTED_LINES} more lines")
    if verdict.status == "not_started" and not verdict.message:
        lines.append(f"  {ADVICE['not_started']}, save, and check again")
    if verdict.status in ("fail", "not_started"):
        lines.append(f"  -> a hint: minift-course hint {verdict.exercise}")
    if verdict.status == "pass":
        lines.append("  ----  graded with the public numbers; whoever grades your submission may draw others")
    if isolation:
        lines.append(f"  isolation: {verdict.isolation}")
    return ascii_only("\n".join(lines))


def listing(exercises: Iterable[Exercise], space: Workspace) -> str:
    """One line an exercise: passed, points so far, minutes, what is good to have done before; the sum below."""
    lines, earned, total = [], 0, 0
    for one in exercises:
        done = one.id in space.passed
        points = one.points if done else space.earned.get(one.id, 0)
        mark = "done" if done else "part" if points else "    "
        earned, total = earned + points, total + one.points
        needs = f"  after {', '.join(one.needs)}" if one.needs else ""
        worth = f"{points:2d}/{one.points} points  {one.minutes:2d} min"
        lines.append(f"  {mark}  {one.id:3s}  {one.title:40s} {worth}  {one.topic}{needs}")
    return ascii_only("\n".join([*lines, f"  {earned} of {total} points"]))
